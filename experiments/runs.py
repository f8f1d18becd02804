"""Runs that survive: a folder that belongs to one configuration, what it holds already, and the line that goes on."""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ecjax import compact
from ecjax.networks import Params
from experiments.datasets import Dataset
from experiments.rows import Line, Rows

_PACKAGES = ("ecjax", "jax", "jaxlib", "flax", "optax", "numpy", "tensorflow-datasets", "scikit-learn")
# These change no number. Data that lie elsewhere are told apart by their digest.
_FREE = {"output", "data_dir", "python"}
# What only an earlier start can have written, and what a start would go on from.
_OURS = ("results.csv", "report.csv", "trained")
# More than a run of default size writes without --save.
_ROOM = 2**24
_ELSEWHERE = "another folder, or delete this one to start afresh"
_HELP = "Finished rows are written at once: started again with the same flags, a run that was stopped goes on."
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def command(config: type, main: Callable[[Any], None], description: str) -> None:
    """Runs an experiment with the flags of the command line; when stopped, says what is saved and how to go on.

    Args:
        config: a dataclass of flags.
        main: the experiment.
        description: for ``--help``.
    """
    spec = sys.modules["__main__"].__spec__
    prog = f"python -m {spec.name if spec else main.__module__}"
    try:
        main(tyro.cli(config, prog=prog, description=f"{description}\n{_HELP}"))
    except (KeyboardInterrupt, OSError) as stop:
        interrupted = isinstance(stop, KeyboardInterrupt)
        if not interrupted and stop.errno not in _DISK:
            raise
        notes = getattr(stop, "__notes__", ["nothing was to be saved yet"])
        print(f"{'stopped' if interrupted else stop}: {'; '.join(notes)}", file=sys.stderr)
        print(f"to go on: {shlex.join(sys.orig_argv)}", file=sys.stderr)
        raise SystemExit(130 if interrupted else 1) from None


@contextlib.contextmanager
def opened(
    folder: Path,
    config: Any,
    plan: Sequence[Sequence[Line]],
    values: Mapping[str, type[int] | type[float]],
    **facts: Any,
) -> Iterator[Rows]:
    """The rows of a run in ``results.csv`` of its folder, with those of an earlier start.

    Args:
        folder: for the results; made if need be.
        config: the flags, a dataclass.
        plan: the keys of each row of each unit (see ``Rows``).
        values: the columns after the keys, and their types.
        facts: what else goes into ``config.json`` (see ``claim``).

    Raises:
        SystemExit: a folder that cannot be written to, that belongs to another run, or whose rows are damaged.
    """
    claim(folder, config, **facts)
    rows = Rows(folder / "results.csv", plan, values)
    try:
        yield rows
    except (KeyboardInterrupt, OSError) as stop:
        saved = Rows(rows.path, plan, values)  # read again: it may have stopped just after rows were written
        stop.add_note(f"{saved.count()} of {saved.planned()} rows are saved in {saved.path}")
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
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    machine = {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
    content = dataclasses.asdict(config) | facts | machine | {"versions": versions}
    text = json.dumps(content, indent=2, default=str) + "\n"
    path, partial = folder / "config.json", folder / ".config.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(os.urandom(_ROOM))
            file.flush()
            os.fsync(file.fileno())
        if not path.exists():
            _require_fresh(folder)
            partial.write_text(text)
            partial.replace(path)  # so that it is whole or not there
        earlier = path.read_bytes()
    except OSError as error:
        raise SystemExit(f"the folder {folder} cannot be used: {error.strerror}") from error
    _require_same(path, earlier, json.loads(text), {field.name for field in dataclasses.fields(config)})


def _require_fresh(folder: Path) -> None:
    strange = [name for name in _OURS if (folder / name).exists()]
    if strange:
        raise SystemExit(
            f"{folder} holds {', '.join(strange)} but no config.json to say of which run. Choose {_ELSEWHERE}"
        )


def _require_same(path: Path, earlier: bytes, now: dict[str, Any], flags: set[str]) -> None:
    try:
        before = _flat(json.loads(earlier))
    except (ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
        raise SystemExit(f"{path} is damaged: {error!r}. Choose {_ELSEWHERE}") from error
    now = _flat(now)
    differing = [name for name in now | before if name not in _FREE and before.get(name) != now.get(name)]
    if differing:
        shown = {name: "--" + name.replace("_", "-") if name in flags else name for name in differing}
        words = [
            f"{shown[name]} was {before.get(name, 'absent')} there, is {now.get(name, 'absent')}" for name in differing
        ]
        raise SystemExit(f"{path.parent} holds another run: {'; '.join(words)}. Choose {_ELSEWHERE}")


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    versions = {f"{package} version": version for package, version in content["versions"].items()}
    return {name: value for name, value in content.items() if name != "versions"} | versions


def digest(data: Dataset) -> str:
    """Tells data sets apart: the beginning of the SHA-256 of all arrays."""
    found = hashlib.sha256()
    for array in (data.train_inputs, data.train_targets, data.test_inputs, data.test_targets):
        found.update(f"{array.dtype} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array))
    return found.hexdigest()[:16]


def trained(folder: Path, name: str, activation: str, seeds: int, train: Callable[[], Params]) -> Params:
    """The params of every seed, stacked along a leading axis: those an earlier start trained, or trained now and kept.

    Training again would give the same bits, but takes minutes; the files take 4 bytes a parameter, and are checked.

    Args:
        folder: of the run.
        name: of the networks in that folder.
        activation: its name, kept with the params.
        seeds: how many networks.
        train: trains them; called if a file is missing.

    Raises:
        SystemExit: a damaged file.
    """
    paths = [folder / "trained" / f"{name}-{seed}.safetensors" for seed in range(seeds)]
    if all(path.exists() for path in paths):
        try:
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(compact.load(path).params for path in paths))
        except ValueError as error:
            raise SystemExit(f"{error}. Delete it, and start again") from error
    params = train()
    paths[0].parent.mkdir(exist_ok=True)
    for seed, path in enumerate(paths):
        compact.save(path, jax.tree.map(lambda leaf, seed=seed: np.asarray(leaf[seed]), params), activation)
    return params
