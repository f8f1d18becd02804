"""The state of a run in stages, kept in a folder after each: a run that was stopped goes on where it was."""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from ecjax import _checksum, _trees
from ecjax._writing import write_whole

_FACTS = "run.json"
_ALIKE = 0.05  # of the spread of the targets: far more than rounding on other devices
Save = Callable[[int, Any], None]


@contextlib.contextmanager
def kept(folder: str | os.PathLike | None, facts: Mapping[str, Any], state: Any) -> Iterator[tuple[int, Any, Save]]:
    """How many stages there have been, the state after them, and a function that keeps the state after a stage.

    Orbax writes the arrays of a state; a stage is there when it is whole. What tells one run from another, options,
    params and inputs, is in ``run.json`` beside them.

    Args:
        folder: made if it is not there; None keeps nothing.
        facts: options of the run, by name; of arrays and functions, what can be told of them.
        state: before the first stage. Its targets, unless they are among the facts, tell whether the network is the
            same.

    Raises:
        ValueError: a folder of another run, or of something else.
    """
    if folder is None:
        yield 0, state, lambda number, state: None
        return
    import orbax.checkpoint as ocp  # takes a second, and few need it

    folder = Path(folder).absolute()
    _claim(folder, {name: _told(value) for name, value in facts.items()})
    with ocp.CheckpointManager(folder / "stages", options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:

        def save(number: int, state: Any) -> None:
            manager.save(number, args=ocp.args.StandardSave(_arrays(state)))
            manager.wait_until_finished()

        number = manager.latest_step() or 0
        if number:
            found = manager.restore(number, args=ocp.args.StandardRestore(_arrays(state)))
            earlier = _with_arrays(state, found)
            own = state.targets is not None and "targets" not in facts  # the network's own answers
            if own and not _near(state.targets, earlier.targets):
                raise _of_another_run(folder, "the network answers otherwise than it did there")
            state = earlier
        yield number, state, save


def _arrays(state: PyTree) -> dict[str, Array | np.ndarray]:
    """The arrays of a state under their number; random keys as what they are made of."""
    leaves = enumerate(jax.tree.leaves(state))
    return {str(number): _numbers(leaf) for number, leaf in leaves if _trees.is_array(leaf)}


def _numbers(leaf: Array | np.ndarray) -> Array | np.ndarray:
    return jax.random.key_data(leaf) if _trees.is_key(leaf) else leaf


def _with_arrays(state: PyTree, found: Mapping[str, Array | np.ndarray]) -> PyTree:
    def back(number, leaf):
        if not _trees.is_array(leaf):
            return leaf
        array = found[str(number)]
        if isinstance(leaf, jax.Array) and not leaf.committed:
            array = jnp.asarray(np.asarray(array))  # which Orbax has tied to the device where it was
        if not _trees.is_key(leaf):
            return array
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))

    leaves, tree = jax.tree.flatten(state)
    return jax.tree.unflatten(tree, [back(*numbered) for numbered in enumerate(leaves)])


def _claim(folder: Path, facts: dict[str, str]) -> None:
    """Writes down what the folder is for, or compares with what it says."""
    path = folder / _FACTS
    if not path.exists():
        if jax.process_index() == 0:  # of several, the others may come while this one writes
            if folder.exists() and any(folder.iterdir()):
                raise ValueError(
                    f"checkpoints={str(folder)!r} holds other files, and no run in stages; name a new folder"
                )
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(facts, indent=2).encode())
        return
    before = json.loads(path.read_text())
    names = [name for name in facts | before if facts.get(name) != before.get(name)]
    if names:
        differing = (f"{name} was {before.get(name)} there, is {facts.get(name)}" for name in names)
        raise _of_another_run(folder, "; ".join(differing))


def _of_another_run(folder: Path, why: str) -> ValueError:
    return ValueError(
        f"checkpoints={str(folder)!r} holds another run: {why}. Name another folder, or delete this one to start afresh"
    )


@jax.jit
def _near(now: Array, before: Array) -> Array:
    return jnp.abs(now - before).mean() <= _ALIKE * jnp.abs(now - now.mean()).mean()


def _told(value: Any) -> str:
    """What tells a value from others in words that another process would find as well."""
    if isinstance(value, functools.partial):
        given = [*map(_told, value.args), *(f"{name}={_told(x)}" for name, x in value.keywords.items())]
        return f"{_told(value.func)}({', '.join(given)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = (f"{field.name}={_told(getattr(value, field.name))}" for field in dataclasses.fields(value))
        return f"{type(value).__name__}({', '.join(given)})"
    if callable(value) and (inner := inspect.unwrap(value)) is not value:
        return _told(inner)
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)  # a plain object's repr is where it lies
        return f"{named.__module__}.{named.__qualname__}"
    arrays = {path: leaf for path, leaf in _trees.by_path(value).items() if _trees.is_array(leaf)}
    if not arrays:
        return repr(value)
    shapes = [f"{path} {leaf.dtype}{list(leaf.shape)}".strip() for path, leaf in arrays.items()]
    sums = [int(_checksum.of_array(_numbers(leaf))) for leaf in arrays.values()]
    every = hashlib.sha256(repr([*zip(shapes, sums, strict=True)]).encode()).hexdigest()[:8]
    return f"{len(arrays)} arrays of sum {every} ({', '.join(shapes[:2])}{', …' * (len(arrays) > 2)})"
