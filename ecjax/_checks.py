"""What bad input gets: a ValueError that says what was given and what is allowed, before any work.

Values can only be looked at when they are there: under ``jit`` or ``vmap`` the checks of values are skipped and those
of shapes remain.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import PyTree

from ecjax import _trees
from ecjax._types import Inputs, Kernels, Params

Kind = TypeVar("Kind")


def are_known(tree: PyTree) -> bool:
    """Whether the values of all leaves are there to be looked at: none is traced or only a shape."""
    return not any(isinstance(leaf, Tracer | jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def _is_known_false(condition) -> bool:
    """Whether a condition is there to be looked at, and false."""
    return are_known(condition) and not condition


def _all_finite(array: Array | np.ndarray) -> Array | np.bool_:
    if isinstance(array, np.ndarray):
        return np.isfinite(array).all()  # nothing to compile for batches of many sizes
    return _all_finite_on_device(array)


@jax.jit
def _all_finite_on_device(array: Array) -> Array:
    return jnp.isfinite((array * 0).sum())  # 0 times NaN or infinity is NaN; no array of booleans is made


def require_array(inputs: Any) -> None:
    """Raises a ValueError unless ``inputs`` is one array with an axis of samples, or the shape of one."""
    if len(getattr(inputs, "shape", ())) < 1:
        advice = ""
        if isinstance(inputs, Iterator):
            advice = "; moments.of_batches takes batches one after another, for scores; a repair, one batch at a time"
        elif len(jax.tree.leaves(inputs)) > 1:
            advice = "; put several arrays into one, and take them apart in the network"
        raise ValueError(f"inputs must be one array of shape (samples, features), got one {_describe(inputs)}{advice}")


def require_inputs(inputs: Inputs) -> None:
    """Raises a ValueError unless ``inputs`` is an array with samples in it, all of them finite."""
    require_array(inputs)
    if inputs.shape[0] == 0:
        raise ValueError(f"inputs of shape {inputs.shape} hold no samples; at least one is needed")
    if _is_known_false(_all_finite(inputs)):
        first = int(jnp.argmin(jnp.isfinite(inputs).reshape(inputs.shape[0], -1).all(1)))
        raise ValueError(
            f"inputs of shape {inputs.shape} hold NaN or infinity, at first in sample {first}; clean or drop such "
            "samples"
        )


def require_targets(inputs: Inputs, targets: Array | np.ndarray) -> None:
    """Raises a ValueError unless there is one target for each sample of the inputs."""
    if getattr(targets, "shape", ())[:1] != inputs.shape[:1]:
        raise ValueError(f"targets {_describe(targets)} do not match the {inputs.shape[0]} samples of the inputs")


def require_weights(weights: Array | np.ndarray, outputs: tuple[int, ...]) -> None:
    """Raises a ValueError unless there is a weight of at least 0 for each sample, or each position, of such outputs."""
    shape = getattr(weights, "shape", ())
    numbers = shape and (jnp.issubdtype(weights.dtype, jnp.number) or weights.dtype == bool)
    if not numbers or shape not in (outputs[:1], outputs[:-1]):
        or_positions = f", or {outputs[:-1]}" if len(outputs) > 2 else ""
        raise ValueError(f"weights {_describe(weights)} must be numbers of shape {outputs[:1]}{or_positions}")
    if _is_known_false((weights >= 0).all() & (weights < np.inf).all() & (weights > 0).any()):
        raise ValueError("weights must be at least 0 and finite, and not all of them 0")


def require_known(targets: Array | np.ndarray) -> None:
    """Raises a ValueError if targets hold NaN or +infinity; the logits of what is never expected are -infinity."""
    if jnp.issubdtype(targets.dtype, jnp.inexact) and _is_known_false(
        ~(jnp.isnan(targets) | (targets == jnp.inf)).any()
    ):
        raise ValueError(
            f"targets of shape {targets.shape}: NaN or infinity, from the params or because numbers on the way leave "
            f"the range of {targets.dtype}, if they are outputs of a network; drop those samples, scale the inputs, or "
            "use float64"
        )


def is_number(value: Any) -> bool:
    """Whether a value is one real number, of Python's, NumPy's or JAX's; a traced one is."""
    if not _is_numeric(value) or np.ndim(value) != 0:
        return False
    return not jnp.issubdtype(jnp.result_type(value), jnp.complexfloating)


def _is_numeric(value: Any) -> bool:
    """Whether a value is a number or an array."""
    return isinstance(value, float | int | np.number | np.ndarray | Array) and not isinstance(value, bool)


def require_sparsity(sparsity: Any, name: str = "sparsity", counted: str = "weights") -> None:
    """Raises a ValueError unless the sparsity is a number in [0, 1]."""
    what = f"in [0, 1], the fraction of {counted} to remove"
    if not _is_numeric(sparsity):
        raise ValueError(f"{name} is {sparsity!r}, of type {type(sparsity).__name__}; it must be a number {what}")
    if np.ndim(sparsity) != 0:
        raise ValueError(f"{name} must be one number in [0, 1], got an array of shape {np.shape(sparsity)}")
    if _is_known_false((sparsity >= 0) & (sparsity <= 1)):  # NaN fails too
        raise ValueError(f"{name} is {sparsity}; it must be {what}")


def require_kernels(params: Params, given: Kernels, name: str) -> None:
    """Raises a ValueError unless every leaf of ``given`` has the path and the shape of a leaf of the params.

    Args:
        given: Kernels: masks, importances or shifts.
        name: what the message calls them.
    """
    _trees.require_params(params)
    leaves = {path: np.shape(leaf) for path, leaf in _trees.by_path(params).items() if _trees.is_array(leaf)}
    found = {path: getattr(leaf, "shape", ()) for path, leaf in _trees.by_path(given).items()}
    if not found:
        raise ValueError(f"{name} do not fit the params: no kernel given")
    for path, shape in found.items():
        if leaves.get(path) != shape:
            raise ValueError(
                f"{name} do not fit the params at '{path}': {shape} given, "
                f"{leaves.get(path, 'no such leaf')} in the params; they are of another network"
            )


def require_masks(params: Params, masks: Kernels) -> None:
    """Raises a ValueError unless the masks are boolean and shaped like the kernels of ``params``."""
    _trees.require_params(masks, "masks")
    require_kernels(params, masks, "masks")
    require_boolean(masks)


def require_boolean(masks: Kernels) -> None:
    """Raises a ValueError unless all masks are boolean."""
    _trees.require_params(masks, "masks")
    for path, mask in _trees.by_path(masks).items():
        if mask.dtype != bool:
            raise ValueError(f"mask '{path}' is {mask.dtype}; masks are boolean, True where the weight stays")


def require_no_nan(tree: Kernels, name: str) -> None:
    """Raises a ValueError if a leaf holds NaN."""
    for path, leaf in _trees.by_path(tree).items():
        if _is_known_false(~jnp.isnan(leaf).any()):
            raise ValueError(f"{name} '{path}' hold NaN; they can't be ranked")


def require_finite(tree: PyTree, name: str) -> None:
    """Raises a ValueError if a leaf holds NaN or infinity: a result that its dtype is too small for.

    Args:
        tree: a pytree of results.
        name: of these, in the plural.
    """
    for path, leaf in _trees.by_path(tree).items():
        if _is_known_false(_all_finite(leaf)):
            where = f"{name} {path!r}" if path else name
            raise ValueError(
                f"{where}: NaN or infinity, from the params or because numbers on the way leave the range of "
                f"{leaf.dtype}; scale the inputs or the params, or use float64"
            )


def require_labels(labels: Array | np.ndarray, outputs: tuple[int, ...]) -> None:
    """Raises a ValueError unless there is one class, a whole number, for each row of outputs of that shape."""
    *rows, classes = outputs
    if np.shape(labels) != tuple(rows) or not jnp.issubdtype(labels.dtype, jnp.integer):
        number = " × ".join(map(str, rows))
        raise ValueError(f"labels must be {number} whole numbers, got {labels.dtype} {_describe(labels)}")
    if _is_known_false(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(f"labels must be in [0, {classes}), got some outside")


def are_probabilities(outputs: Array) -> Array:
    """Whether all rows are at least 0 and sum to one, up to the rounding of their dtype."""
    rounding = min(64 * float(jnp.finfo(outputs.dtype).eps), 1e-2)
    sums = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32)).sum(-1)
    return (outputs >= 0).all() & (jnp.abs(sums - 1) < rounding).all()


def require_above_zero(value: float | int | Array, name: str) -> None:
    """Raises a ValueError unless ``value`` is above 0, and finite."""
    if not is_number(value) or _is_known_false((value > 0) & (value < np.inf)):
        raise ValueError(f"{name} is {value}; it must be above 0, and finite")


def of_kind(scores: Any, kinds: tuple[type[Kind], ...], what: str) -> Kind:
    """The scores, if they are of one of these kinds; a ValueError says what came instead."""
    if not isinstance(scores, kinds):
        names = " or ".join(f"score.{expected.__name__}" for expected in kinds)
        raise ValueError(f"{what} {type(scores).__name__}; {names} is needed here")
    return scores


def require_key(key: Any) -> None:
    """Raises a ValueError unless this is one random key."""
    kind = getattr(key, "dtype", np.dtype(object))
    shape = () if jnp.issubdtype(kind, jax.dtypes.prng_key) else (2,) if kind == np.uint32 else None
    if shape is None or key.shape != shape:
        raise ValueError(f"key is {key!r}; it must be a random key, such as jax.random.key(0)")


def require_positive(value: int, name: str) -> None:
    """Raises a ValueError unless ``value`` is a whole number of at least 1."""
    if not isinstance(value, int | float | np.number) or isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")


def _describe(array) -> str:
    return f"of shape {array.shape}" if hasattr(array, "shape") else f"of type {type(array).__name__}"
