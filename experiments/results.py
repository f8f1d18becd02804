"""Results that survive: a folder that belongs to one configuration, its finished rows, and its networks."""

import contextlib
import csv
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pandas as pd
import tyro

from ecjax import compact
from ecjax.networks import Params

_PACKAGES = ("ecjax", "jax", "jaxlib", "flax", "optax", "numpy", "tensorflow-datasets", "scikit-learn")
_NO_NUMBER = {"output", "data_dir", "keep_stages", "python"}  # change none; other data are told by their digest
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EISDIR}
_ROOM = 2**24  # bytes, more than a run of default size writes without --save
_ELSEWHERE = "Choose another folder, or delete this one to start afresh"
_DAMAGED = "the file is damaged. Cut it off before that line to go on from there, or delete its folder to start afresh"
_RESUMES = "Finished rows are written at once: started again with the same flags, a run that was stopped goes on."


def command(config: type, main: Callable[[Any], None], description: str) -> None:
    """Runs an experiment with the flags of the command line; if it is stopped, says what is saved and how to go on."""
    prog = f"python -m experiments.{Path(sys.argv[0]).stem}"
    try:
        main(tyro.cli(config, prog=prog, description=f"{description}\n{_RESUMES}"))
    except (KeyboardInterrupt, OSError) as stop:
        interrupted = isinstance(stop, KeyboardInterrupt)
        if not interrupted and stop.errno not in _DISK:
            raise
        notes = getattr(stop, "__notes__", ["nothing was to be saved yet"])
        print(f"{'stopped' if interrupted else stop}: {'; '.join(notes)}", file=sys.stderr)
        print(f"to go on: {shlex.join(sys.orig_argv)}", file=sys.stderr)
        raise SystemExit(130 if interrupted else 1) from None


class Rows:
    """The finished rows of a run, in memory and in a csv file, to which each is appended at once."""

    def __init__(self, path: Path):
        """Reads the rows of an earlier start, but for a last line without an end; a damaged line is a SystemExit."""
        self.path, self.columns, self._rows, self._bytes = path, [], [], 0
        if not path.exists():
            return
        with path.open("r+b") as file:
            content = file.read()
            self._bytes = file.truncate(content.rfind(b"\n") + 1)
        lines = content[: self._bytes].decode(errors="replace").splitlines()
        self.columns = next(csv.reader(lines), [])
        for number, line in enumerate(lines[1:], 2):
            cells = [_number(cell) for cell in next(csv.reader([line]), [])]
            kinds = [isinstance(cell, str) for cell in cells]
            expected = kinds if number == 2 else expected
            if len(cells) != len(self.columns) or kinds != expected or "\ufffd" in line:
                raise SystemExit(f"line {number} of {path} is no row of {', '.join(self.columns)[:200]}: {_DAMAGED}")
            self._rows.append(dict(zip(self.columns, cells, strict=True)))

    def count(self, **keys: Any) -> int:
        """How many finished rows have these values in these columns; without any, how many there are."""
        return sum(all(row.get(name) == value for name, value in keys.items()) for row in self._rows)

    def add(self, row: dict[str, Any]) -> None:
        """Appends a finished row, which is on disk when this returns; the first of all names the columns."""
        self.columns = self.columns or list(row)
        if not row.keys() <= set(self.columns):
            raise SystemExit(f"line 1 of {self.path} is not {','.join(row)}. {_ELSEWHERE}")
        line = pd.DataFrame([row], columns=self.columns, dtype=object)  # an int stays one where others are missing
        text = line.to_csv(header=not self._bytes, index=False, lineterminator="\n")
        with self.path.open("ab") as file:
            if file.tell() != self._bytes:
                raise SystemExit(f"another process writes to {self.path}: wait for it or stop it, and start again")
            file.write(text.encode())
            file.flush()
            os.fsync(file)
            self._bytes = file.tell()
        self._rows.append(row)

    def frame(self) -> pd.DataFrame:
        """All finished rows, in the order in which they were finished."""
        return pd.DataFrame(self._rows, columns=self.columns)


def _number(cell: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(cell or "nan")
    return cell


@contextlib.contextmanager
def opened(folder: Path, config: Any, data: Sequence[Any] = (), **facts: Any) -> Iterator[Rows]:
    """The rows in ``results.csv`` of a folder that belongs to this configuration (see ``claim``)."""
    claim(folder, config, data, **facts)
    rows = Rows(folder / "results.csv")
    try:
        yield rows
    except (KeyboardInterrupt, OSError) as stop:  # perhaps just after a row was written, so they are read again
        stop.add_note(f"{Rows(rows.path).count()} rows are saved in {rows.path}")
        raise


def claim(folder: Path, config: Any, data: Sequence[Any] = (), **facts: Any) -> None:
    """Makes a folder that of one configuration: writes flags, data and facts to ``config.json``, or compares with it.

    A folder that cannot be written to, has no room, or belongs to another configuration is a SystemExit.
    """
    facts |= {"output": folder, "python": platform.python_version(), "device": jax.devices()[0].device_kind}
    facts |= {f"{package} version": importlib.metadata.version(package) for package in _PACKAGES}
    if data:
        arrays = b"".join(f"{array.dtype} {array.shape} ".encode() + array.tobytes() for array in data[1:])
        facts |= {"data": data[0], "data_sha256": hashlib.sha256(arrays).hexdigest()[:16]}
    text = json.dumps(vars(config) | facts, indent=2, default=str) + "\n"
    path, partial, now = folder / "config.json", folder / ".config.json", json.loads(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(os.urandom(_ROOM))
            file.flush()
            os.fsync(file)
        if not path.exists():
            strange = [name for name in ("results.csv", "report.csv", "trained") if (folder / name).exists()]
            if strange:
                raise SystemExit(f"{folder} holds {strange[0]} but no config.json to say of which run. {_ELSEWHERE}")
            partial.write_text(text)
            partial.replace(path)  # so that it is whole or not there
        before = dict(json.loads(path.read_bytes()).items())
    except OSError as error:
        raise SystemExit(f"the folder {folder} cannot be used: {error.strerror}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise SystemExit(f"{path} is damaged: {error!r}. {_ELSEWHERE}") from error
    words = {name: f"--{name.replace('_', '-')}" for name in vars(config)}
    differing = [
        f"{words.get(name, name)} was {before.get(name, 'absent')} there, is {now.get(name, 'absent')}"
        for name in now | before
        if name not in _NO_NUMBER and before.get(name) != now.get(name)
    ]
    if differing:
        raise SystemExit(f"{folder} holds another run: {'; '.join(differing)}. {_ELSEWHERE}")


def trained(folder: Path, name: str, train: Callable[..., Params], *arguments: Any) -> Params:
    """What ``train(*arguments)`` gives, or gave to an earlier start, bit for bit."""
    path = folder / "trained" / f"{name}.safetensors"
    if path.exists():
        try:
            return jax.tree.map(jnp.asarray, compact.load(path).params)
        except ValueError as error:
            raise SystemExit(f"{error}. Delete it, and start again") from error
    params = train(*arguments)
    path.parent.mkdir(exist_ok=True)
    compact.save(path, params)
    return params


class Folder:
    """Collects pruned networks in a folder; each and its rows of the report are written at once."""

    def __init__(self, path: Path, activation: str, task: Any, config: Any, **facts: Any):
        """Goes on where an earlier start with the same configuration was (see ``claim``)."""
        claim(path, config, task.data, **facts)
        self.path, self.activation, self.rows = path, activation, Rows(path / "report.csv")
        self.network, self.inputs = task.network, jnp.asarray(task.data.train_inputs[:256])

    def add(self, params: Params, method: str, sparsity: float, seed: int) -> None:
        """Measures a network if it is the first of its method and sparsity, and saves it then."""
        smaller, small = compact.compact(self.network, params, self.inputs)
        given = self.network, params, smaller, small, self.inputs
        for form in compact.report(*given, activation=self.activation) if not seed else ():
            row = {"method": method, "sparsity": sparsity, "seed": seed} | form._asdict() | {"flops": form.flops.total}
            times = {f"microseconds_batch_{batch}": 1e6 * seconds for batch, seconds in row.pop("seconds").items()}
            if not self.rows.count(method=method, sparsity=sparsity, name=form.name, runtime=form.runtime):
                self.rows.add(row | times)
        compact.save(self.place(method, sparsity, seed), small, network=smaller, inputs=self.inputs)

    def place(self, method: str, sparsity: float, seed: int) -> Path:
        """The file of a network, which is there when all else that belongs to it is."""
        return self.path / f"{method.replace(' ', '-').replace(',', '')}-{sparsity:g}-{seed}.safetensors"
