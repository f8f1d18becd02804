"""Pytrees of any kind by the paths of their leaves; leaves that are no arrays are set aside."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


def path_name(path: tuple) -> str:
    """The name of a leaf's place: ``"Dense_0/kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a pytree under names like ``"Dense_0/kernel"``, in the order of the flattened tree.

    Raises:
        ValueError: two leaves of the same name, as in ``{"a": {"b": 1}, "a/b": 2}``.

    Example:
        >>> networks.by_path({"Dense_0": {"kernel": 1, "bias": 2}})
        {'Dense_0/bias': 2, 'Dense_0/kernel': 1}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = {path_name(path): leaf for path, leaf in leaves}
    if len(found) < len(leaves):
        names = [path_name(path) for path, _ in leaves]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two leaves have the path '{twice}'; rename one, so that each can be told by its path")
    return found


def replace(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """A copy of ``tree`` with other leaves at some paths.

    Args:
        tree: any pytree.
        leaves: the new ones, by their paths (see ``by_path``).

    Example:
        >>> networks.replace({"Dense_0": {"bias": 2, "kernel": 1}}, {"Dense_0/bias": 5})
        {'Dense_0': {'bias': 5, 'kernel': 1}}
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(path_name(path), leaf), tree)


def as_kernels(params: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """Kernels: a pytree shaped like ``params``, with None in place of every leaf that is not among ``leaves``."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves.get(path_name(path)), params)


def masked(params: PyTree, masks: PyTree) -> PyTree:
    """The params with exact zeros where a mask is False."""
    leaves = by_path(params)
    return replace(params, {path: jnp.where(mask, leaves[path], 0) for path, mask in by_path(masks).items()})


@dataclasses.dataclass(frozen=True)
class WithStatic:
    """A network whose params have leaves that are no arrays, as a network of the arrays alone.

    Attributes:
        network: of all leaves.
        static: the leaves that are no arrays, by path.
    """

    network: Callable
    static: tuple[tuple[str, Any], ...]

    def __call__(self, params, inputs):
        """The outputs."""
        return self.network(whole(params, self.static), inputs)


def is_array(leaf: Any) -> bool:
    """Whether a leaf holds numbers that a network computes with: an array, or the shape of one."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind not in "OSUMm"  # objects, text and times
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def is_key(leaf: Any) -> bool:
    """Whether an array holds random keys, of which numbers are to be asked for."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def shapes(params: PyTree) -> PyTree:
    """The shape and the dtype in place of each array."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def arrays(params: PyTree) -> PyTree:
    """The params with None in place of every leaf that is no array, such as the activation in an Equinox module."""
    return jax.tree.map(lambda leaf: leaf if is_array(leaf) else None, params)


def static_leaves(params: PyTree) -> tuple[tuple[str, Any], ...]:
    """The leaves that are no arrays, by path."""
    return tuple((path, leaf) for path, leaf in by_path(params).items() if not is_array(leaf))


def whole(params: PyTree, static: tuple[tuple[str, Any], ...]) -> PyTree:
    """The params with the leaves that are no arrays back in their places."""
    if not static:
        return params
    back = dict(static)

    def choose(path, leaf):
        return back.get(path_name(path)) if leaf is None else leaf

    return jax.tree_util.tree_map_with_path(choose, params, is_leaf=lambda leaf: leaf is None)


def require_params(params: PyTree, name: str = "params") -> None:
    """Raises a ValueError for what pruning returned, given where its params, or its masks, are meant."""
    if getattr(params, "_fields", ())[:2] == ("params", "masks"):
        kind, other = type(params).__name__, "masks" if name == "params" else "params"
        raise ValueError(f"the {name} are a prune.{kind}, which holds {other} as well; give its .{name}")


def split(network: Callable, params: PyTree) -> tuple[Callable, PyTree, tuple[tuple[str, Any], ...]]:
    """The network and its params as they can go through ``jit``: of arrays alone; and the other leaves.

    Params of arrays alone, and their network, come back as they are; what pruning returned is a ValueError.
    """
    require_params(params)
    static = static_leaves(params)
    return (WithStatic(network, static), arrays(params), static) if static else (network, params, ())
