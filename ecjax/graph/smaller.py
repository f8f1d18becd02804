"""The same network with fewer units: its jaxpr evaluated with fewer entries along some axes, and smaller params."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Bool, Int, PyTree

from ecjax import _trees
from ecjax._types import Inputs
from ecjax.graph.cut import Cut, Kept, evaluate, like, taken, units_of
from ecjax.graph.groups import Groups, couple

Removed = Mapping[int, Sequence[int] | Int[np.ndarray, " _"]]


def kept_of(params: PyTree, groups: Groups, removed: Removed) -> Kept:
    """Which entries along each axis of each leaf stay.

    Args:
        params: of the network that the groups are of.
        groups: of that network.
        removed: by the index of a group, which of its units go.

    Raises:
        ValueError: units of a group that can't go, or that it does not have.
    """
    kept = {path: tuple(np.ones(n, bool) for n in np.shape(leaf)) for path, leaf in _trees.by_path(params).items()}
    for index, units in removed.items():
        group, gone = groups[index], np.asarray(units, int).reshape(-1)
        if group.reasons and gone.size:
            raise ValueError(f"units made by {', '.join(group.produced)} can't go: {'; '.join(group.reasons)}")
        if gone.size and not (0 <= gone.min() <= gone.max() < group.length):
            raise ValueError(f"units {gone.tolist()} are to go, of a group of {group.length}")
        for place in group.places:
            kept[place.path][place.axis][np.isin(place.units, gone)] = False
    return kept


def without_units(network: Callable, params: PyTree, groups: Groups, removed: Removed) -> tuple[Callable, PyTree]:
    """The network without some of its units, and its params.

    The outputs are those of the network whose params are zero wherever these units lie (``zeroed``). It is traced anew
    at its old widths for every shape of inputs.

    Args:
        params: of the network.
        groups: of the network (``networks.groups``).
        removed: by the index of a group, which of its units go.

    Raises:
        ValueError: units of a group that can't go, or that it does not have.

    Example:
        >>> groups = networks.groups(network, params, inputs)
        >>> smaller, small = graph.without_units(network, params, groups, {0: [1, 5]})
        >>> small["Dense_0"]["kernel"].shape, small["Dense_1"]["kernel"].shape, smaller(small, inputs).shape
        ((4, 6), (6, 2), (200, 2))
    """
    inner, arrays, _ = _trees.split(network, params)
    kept = kept_of(arrays, groups, removed)
    shapes = {path: np.shape(leaf) for path, leaf in _trees.by_path(arrays).items()}
    evaluate = jax.jit(functools.partial(_smaller, inner, shapes, kept))

    def smaller(params: PyTree, inputs: Inputs) -> Array:
        arrays = _numbers_aside(_trees.arrays(params), shapes)
        if not isinstance(inputs.shape[0], int):  # any number of samples, for jax.export: axes are matched by numbers
            return jax.vmap(lambda sample: evaluate(arrays, sample[None])[0])(inputs)
        return evaluate(arrays, inputs)

    return smaller, cut(params, kept)


def _numbers_aside(params: PyTree, shapes: dict[str, tuple[int, ...]]) -> PyTree:
    """The params without numbers that were no arrays, such as the rate of a dropout, and are where ``jit`` has them."""
    by_jit = {path for path, leaf in _trees.by_path(params).items() if path not in shapes and leaf.shape == ()}
    if not by_jit:
        return params
    return jax.tree_util.tree_map_with_path(lambda at, leaf: None if _trees.path_name(at) in by_jit else leaf, params)


def cut(params: PyTree, kept: Kept) -> PyTree:
    """The params with only the entries that stay; leaves that lose nothing are the same arrays."""
    leaves = {path: leaf for path, leaf in _trees.by_path(params).items() if _trees.is_array(leaf)}
    return _trees.replace(params, {path: taken(leaf, kept[path]) for path, leaf in leaves.items()})


def zeroed(params: PyTree, groups: Groups, removed: Removed) -> PyTree:
    """The params with zeros wherever units lie that are to go; arguments and errors are those of ``without_units``.

    Example:
        >>> groups = networks.groups(network, params, inputs)
        >>> graph.zeroed(params, groups, {0: [1, 5]})["Dense_0"]["bias"][jnp.array([1, 5])].tolist()
        [0.0, 0.0]
    """
    kept = kept_of(_trees.arrays(params), groups, removed)
    leaves = {path: leaf for path, leaf in _trees.by_path(params).items() if _trees.is_array(leaf)}
    return _trees.replace(params, {path: _with_zeros(leaf, kept[path]) for path, leaf in leaves.items()})


def _with_zeros(array: Any, kept: Sequence[Bool[np.ndarray, " _"]]) -> Any:
    if all(here.all() for here in kept):
        return array
    mask = functools.reduce(np.multiply.outer, kept, np.True_)
    if isinstance(array, Tracer):
        return jnp.where(mask, array, jnp.zeros((), array.dtype))
    return like(array, np.where(mask, np.asarray(array), np.zeros((), array.dtype)))


def _smaller(network: Callable, shapes: dict[str, tuple[int, ...]], kept: Kept, params: PyTree, inputs: Array) -> Array:
    given = _trees.by_path(params)
    for path, leaf in given.items():
        expected = tuple(int(here.sum()) for here in kept[path]) if path in kept else None
        if leaf.shape != expected:
            raise ValueError(
                f"the params do not fit the smaller network at '{path}': {leaf.shape} given, not {expected}"
            )
    old = {path: jax.ShapeDtypeStruct(shapes[path], leaf.dtype) for path, leaf in given.items()}
    coupled = couple(network, _trees.replace(params, old), jax.ShapeDtypeStruct(inputs.shape, inputs.dtype))
    units = units_of(coupled, kept, inputs.shape)
    (outputs,) = evaluate(coupled.walked, [*given.values(), inputs], Cut(coupled.atoms, units))
    return outputs
