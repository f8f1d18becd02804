"""Results that survive: a folder that belongs to one configuration, its finished rows, and its trained networks."""

import contextlib
import csv
import dataclasses
import errno
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shlex
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from flax import traverse_util

_PACKAGES = ("ecjax", "jax", "jaxlib", "flax", "optax", "numpy", "tensorflow-datasets", "scikit-learn")
_NO_NUMBER = {"output", "data_dir", "python"}  # they change no number; other data are told apart by their digest
_WRITTEN = ("results.csv", "report.csv", "trained")
_ROOM = 2**24  # bytes, more than a run of default size writes without --save
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_ELSEWHERE = "another folder, or delete this one to start afresh"
_RESUMES = "Finished rows are written at once: started again with the same flags, a run that was stopped goes on."


def command(config: type, main: Callable[[Any], None], description: str) -> None:
    """Runs an experiment with the flags of the command line; when it is stopped, says what is saved and how to go on.

    Args:
        config: a dataclass of flags.
        main: the experiment.
        description: for ``--help``.
    """
    spec = sys.modules["__main__"].__spec__
    prog = f"python -m {spec.name if spec else main.__module__}"
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
        """Reads the rows of an earlier start, if there are any, and cuts off a last line without an end.

        Raises:
            SystemExit: a damaged line, or a file that cannot be read and written.
        """
        self.path, self._rows, self._columns, self._bytes = path, [], [], 0
        if not path.exists():
            return
        try:
            with path.open("r+b") as file:
                content = file.read()
                self._bytes = file.truncate(content.rfind(b"\n") + 1)
        except OSError as error:
            raise SystemExit(f"{path} cannot be read and written: {error.strerror}") from error
        self._read(content[: self._bytes].decode(errors="replace"))

    def _read(self, text: str) -> None:
        for number, line in enumerate(text.split("\n")[:-1], 1):
            cells = next(csv.reader([line]), [])
            if number == 1:
                self._columns = cells
                continue
            row = dict(zip(self._columns, map(_number, cells), strict=False))
            numbers = [isinstance(value, str) for value in row.values()]
            if number == 2:
                expected = numbers
            if len(cells) != len(self._columns) or numbers != expected or "\ufffd" in line:
                raise SystemExit(
                    f"line {number} of {self.path} is no row of {', '.join(self._columns)[:200]}: the file is damaged. "
                    "Cut it off before that line to go on from there, or delete its folder to start afresh"
                )
            self._rows.append(row)

    def __len__(self) -> int:
        return len(self._rows)

    def has(self, **keys: Any) -> bool:
        """Whether a finished row has these values in these columns."""
        return any(all(row.get(name) == value for name, value in keys.items()) for row in self._rows)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends finished rows, all with the same columns; they are on disk when this returns.

        Raises:
            SystemExit: the file has other columns, or another process has written to it.
            OSError: the disk is full, or fails.
        """
        rows = [dict(row) for row in rows]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for row in rows:
            if not self._columns:
                self._columns = list(row)
                writer.writerow(self._columns)
            if list(row) != self._columns:
                raise SystemExit(f"line 1 of {self.path} is not {','.join(row)}. Choose {_ELSEWHERE}")
            writer.writerow("" if value is None or value != value else value for value in row.values())
        with self.path.open("ab") as file:
            if file.tell() != self._bytes:
                raise SystemExit(f"another process writes to {self.path}: wait for it or stop it, and start again")
            file.write(text.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())
            self._bytes = file.tell()
        self._rows += rows

    def frame(self) -> pd.DataFrame:
        """All finished rows, in the order in which they were finished."""
        return pd.DataFrame(self._rows, columns=self._columns)


def _number(cell: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(cell or "nan")
    return cell


@contextlib.contextmanager
def opened(folder: Path, config: Any, **facts: Any) -> Iterator[Rows]:
    """The rows in ``results.csv`` of a folder that belongs to this configuration (see ``claim``)."""
    claim(folder, config, **facts)
    rows = Rows(folder / "results.csv")
    try:
        yield rows
    except (KeyboardInterrupt, OSError) as stop:
        # Read again, as it may have stopped just after a row was written.
        stop.add_note(f"{len(Rows(rows.path))} rows are saved in {rows.path}")
        raise


def claim(folder: Path, config: Any, **facts: Any) -> None:
    """Makes a folder that of one configuration, before any work: writes ``config.json``, or compares with it.

    Args:
        folder: made if need be.
        config: the flags, a dataclass.
        facts: what else the numbers depend on; a fact replaces the flag of its name.

    Raises:
        SystemExit: a folder that cannot be written to, has no room, or belongs to another configuration.
    """
    versions = {f"{package} version": importlib.metadata.version(package) for package in _PACKAGES}
    machine = {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
    text = json.dumps(dataclasses.asdict(config) | facts | machine | versions, indent=2, default=str) + "\n"
    path, partial = folder / "config.json", folder / ".config.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(os.urandom(_ROOM))
            file.flush()
            os.fsync(file.fileno())
        strange = [name for name in _WRITTEN if (folder / name).exists()]
        if strange and not path.exists():
            raise SystemExit(
                f"{folder} holds {', '.join(strange)} but no config.json to say of which run: choose {_ELSEWHERE}"
            )
        if not path.exists():
            partial.write_text(text)
            partial.replace(path)  # so that it is whole or not there
        earlier = path.read_bytes()
    except OSError as error:
        raise SystemExit(f"the folder {folder} cannot be used: {error.strerror}") from error
    now, flags = json.loads(text), {field.name for field in dataclasses.fields(config)}
    try:
        before = dict(json.loads(earlier).items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise SystemExit(f"{path} is damaged: {error!r}. Choose {_ELSEWHERE}") from error
    differing = [
        f"{'--' + name.replace('_', '-') if name in flags else name} was {before.get(name, 'absent')} there, "
        f"is {now.get(name, 'absent')}"
        for name in now | before
        if name not in _NO_NUMBER and before.get(name) != now.get(name)
    ]
    if differing:
        raise SystemExit(f"{folder} holds another run: {'; '.join(differing)}. Choose {_ELSEWHERE}")


def digest(arrays: Iterable[Any]) -> str:
    """Tells data sets apart: the beginning of the SHA-256 of their arrays; what is no array is left out."""
    found = hashlib.sha256()
    for array in arrays:
        if isinstance(array, np.ndarray):
            found.update(f"{array.dtype} {array.shape} ".encode())
            found.update(np.ascontiguousarray(array))
    return found.hexdigest()[:16]


def trained(folder: Path, name: str, train: Callable[[], dict]) -> dict:
    """Trained params: those that an earlier start left in the folder, or trained now and kept there, bit for bit.

    Args:
        folder: of the run.
        name: of these params in that folder.
        train: gives the params, nested dicts of arrays; called if the file is missing.

    Raises:
        SystemExit: a damaged file.
    """
    path = folder / "trained" / f"{name}.npz"
    if path.exists():
        try:
            with np.load(path) as file:
                return traverse_util.unflatten_dict({key: jnp.asarray(file[key]) for key in file}, sep="/")
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise SystemExit(f"{path} is damaged: {error}. Delete it, and start again") from error
    params = train()
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/"))
    partial.replace(path)  # so that it is whole or not there
    return params
