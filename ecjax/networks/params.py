"""What a network is here: a pure function ``(params, inputs) -> outputs``, and the kernels of its params.

``params`` is a pytree of nested dicts (plain or Flax's ``FrozenDict``), lists and tuples. A leaf named ``kernel`` is
what gets pruned; its sibling leaf ``bias`` is what makes up for the loss. *Kernels* is a pytree shaped like ``params``
with the ``kernel`` leaves alone: importances, bias shifts and masks are Kernels.
"""

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Num, PyTree, Shaped

Params = PyTree
Kernels = PyTree
Inputs = Num[Array | np.ndarray, "samples *features"]
Network = Callable[[Params, Inputs], Array]
# Not checked against the samples of the inputs here: ``checks.require_targets`` says it more clearly.
Targets = Shaped[Array | np.ndarray, "_samples *outputs"]
Loss = Callable[[Array, Array], Array]


def kernels(params: Params) -> Kernels:
    """The ``kernel`` leaves of ``params``, in the same nesting; dicts without any are left out.

    Example:
        >>> networks.kernels({"Dense_0": {"kernel": 1, "bias": 2}, "LayerNorm_0": {"scale": 3}})
        {'Dense_0': {'kernel': 1}}
    """
    if isinstance(params, Mapping):
        inside = {name: _kernels_or_leaf(name, child) for name, child in params.items()}
        return type(params)({name: child for name, child in inside.items() if jax.tree.leaves(child)})
    if isinstance(params, tuple) and hasattr(params, "_fields"):
        return type(params)(*map(kernels, params))
    if isinstance(params, list | tuple):
        return type(params)(map(kernels, params))
    return None


def _kernels_or_leaf(name: str | int, child: PyTree) -> PyTree:
    is_kernel_leaf = name == "kernel" and jax.tree_util.all_leaves([child])
    return child if is_kernel_leaf else kernels(child)


def layers(params: Params) -> list[str]:
    """The paths of an MLP's kernels, from the inputs to the outputs.

    Raises:
        ValueError: params that are no chain of layers: a kernel whose inputs are not the neurons of the one before, or
            a leaf that is neither a kernel nor the bias next to one.

    Example:
        >>> networks.layers(params)
        ['Dense_0/kernel', 'Dense_1/kernel']
    """
    leaves = by_path(kernels(params))
    paths = sorted(leaves, key=by_number)
    others = set(by_path(params)) - {*paths, *map(bias_path, paths)}
    if others:
        raise ValueError(f"these are not the params of an MLP, of kernels and biases alone: they hold {min(others)}")
    for first, second in itertools.pairwise(paths):
        if leaves[first].ndim != 2 or leaves[first].shape[-1] != leaves[second].shape[0]:
            shapes = {path: leaves[path].shape for path in paths}
            raise ValueError(f"these are not the params of an MLP, each layer reading the one before: {shapes}")
    if not paths or leaves[paths[-1]].ndim != 2:
        raise ValueError(f"these are not the params of an MLP: their kernels are {', '.join(paths) or 'none'}")
    return paths


def by_number(path: str) -> list:
    """A key to sort paths by that puts Dense_10 after Dense_9.

    Example:
        >>> sorted(["Dense_10", "Dense_9"], key=networks.by_number)
        ['Dense_9', 'Dense_10']
    """
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a pytree under names like ``"Dense_0/kernel"``, in the order of the flattened tree.

    Example:
        >>> networks.by_path({"Dense_0": {"kernel": 1, "bias": 2}})
        {'Dense_0/bias': 2, 'Dense_0/kernel': 1}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def replace(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """A copy of ``tree`` with other leaves at some paths.

    Args:
        tree: any pytree.
        leaves: the new ones, by their paths (see ``by_path``).

    Example:
        >>> networks.replace({"Dense_0": {"bias": 2, "kernel": 1}}, {"Dense_0/bias": 5})
        {'Dense_0': {'bias': 5, 'kernel': 1}}
    """

    def choose(path, leaf):
        return leaves.get(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(choose, tree)


def bias_path(kernel_path: str) -> str:
    """Where the bias next to a kernel lives: ``"Dense_0/kernel"`` has ``"Dense_0/bias"``.

    Example:
        >>> networks.bias_path("Dense_0/kernel")
        'Dense_0/bias'
    """
    return kernel_path.removesuffix("kernel") + "bias"
