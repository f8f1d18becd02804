"""The state of a run in stages, kept in a folder after each: a run that was stopped goes on where it was."""

import contextlib
import dataclasses
import functools
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

from ecjax import _trees

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
            if "targets" not in facts:  # those of the run are the network's own answers
                _require_same_answers(folder, state.targets, earlier.targets)
            state = earlier
        yield number, state, save


def _arrays(state: PyTree) -> dict[str, Array | np.ndarray]:
    """The arrays of a state under their number; random keys as what they are made of."""
    leaves = enumerate(jax.tree.leaves(state))
    return {str(n): jax.random.key_data(x) if _is_key(x) else x for n, x in leaves if _trees.is_array(x)}


def _with_arrays(state: PyTree, found: Mapping[str, Array | np.ndarray]) -> PyTree:
    def back(number, leaf):
        if not _trees.is_array(leaf):
            return leaf
        array = found[str(number)]
        if isinstance(leaf, jax.Array) and not leaf.committed:
            array = jnp.asarray(np.asarray(array))  # which Orbax has tied to the device where it was
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array

    leaves, tree = jax.tree.flatten(state)
    return jax.tree.unflatten(tree, [back(*numbered) for numbered in enumerate(leaves)])


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _claim(folder: Path, facts: dict[str, str]) -> None:
    """Writes down what the folder is for, or compares with what it says."""
    path, partial = folder / _FACTS, folder / f".{_FACTS}"
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"checkpoints={str(folder)!r} holds other files, and no run in stages; name a new folder")
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(facts, indent=2))
            partial.replace(path)  # so that it is whole or not there
        return
    before = json.loads(path.read_text())
    names = [name for name in facts | before if facts.get(name) != before.get(name)]
    if names:
        differing = "; ".join(f"{name} was {before.get(name)} there, is {facts.get(name)}" for name in names)
        raise ValueError(
            f"checkpoints={str(folder)!r} holds another run: {differing}. Name another folder, or delete this one to "
            "start afresh"
        )


def _require_same_answers(folder: Path, now: Any, before: Any) -> None:
    if now is not None and not _near(now, before):
        raise ValueError(
            f"checkpoints={str(folder)!r} holds another run: the network answers otherwise than it did there. Name "
            "another folder, or delete this one to start afresh"
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
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    arrays = {path: leaf for path, leaf in _trees.by_path(value).items() if _trees.is_array(leaf)}
    if not arrays:
        return repr(value)
    numbers = [_checksum(jax.random.key_data(leaf) if _is_key(leaf) else leaf) for leaf in arrays.values()]
    shapes = ", ".join(f"{path} {leaf.dtype}{list(leaf.shape)}".strip() for path, leaf in list(arrays.items())[:2])
    return f"{len(arrays)} arrays of sum {sum(map(int, numbers)) % 2**32:08x} ({shapes}{', …' * (len(arrays) > 2)})"


@jax.jit
def _checksum(array: Array) -> Array:
    """The sum of the bits of all entries, each times another odd number, modulo 2³²: the same on any devices."""
    array = jnp.stack([array.real, array.imag]) if jnp.iscomplexobj(array) else jnp.asarray(array)
    if jnp.issubdtype(array.dtype, jnp.bool_):
        bits = array.astype(jnp.uint32)
    else:
        words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(array, words).astype(jnp.uint32)
    odd = jnp.zeros(bits.shape, jnp.uint32) + jnp.uint32(1)
    for axis in range(bits.ndim):
        odd = odd * jnp.uint32(2654435761) + 2 * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return (bits * odd).sum(dtype=jnp.uint32)
