"""Neurons that pruning has cut off, folded away: smaller arrays, the same function."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int, Num

from ecjax import checks, networks
from ecjax.networks import Params

Activation = Callable[[Array], Array]


class _Layer(NamedTuple):
    kernel: Num[np.ndarray, "in out"]
    bias: Num[np.ndarray, " out"] | None


def compact(params: Params, activation: Activation) -> Params:
    """The params of a smaller MLP with the same function.

    A hidden neuron that no surviving weight reaches is the constant ``activation(bias)``: what it adds to the next
    layer goes into that layer's biases, and it is dropped. A hidden neuron that no surviving weight reads is dropped
    too. Both are repeated until nothing changes; a network that no input reaches keeps its output biases, and hidden
    layers of width 0. Inputs and outputs stay, see ``drop_inputs``.

    Args:
        params: an MLP's, with exact zeros where weights were removed. Without biases, a neuron is folded only if its
            constant is 0.
        activation: elementwise, after every layer but the last.

    Returns:
        Params for ``networks.MLP(widths(params))``, in the dtypes given. The function is the same up to rounding.

    Raises:
        ValueError: params that are not an MLP's, or constants that overflow.

    Example:
        >>> halved = prune.neurons(params, score.neuron_norm(params), fraction=0.5).params
        >>> small = compact.compact(halved, nn.relu)
        >>> small["Dense_0"]["kernel"].shape, small["Dense_1"]["kernel"].shape
        ((4, 4), (4, 2))
        >>> smaller = networks.pure(networks.MLP(compact.widths(small)))
        >>> bool(jnp.allclose(smaller(small, inputs), network(halved, inputs), atol=1e-5))
        True
    """
    paths = networks.layers(params)
    leaves = networks.by_path(params)
    layers = [_Layer(np.asarray(leaves[p]), _maybe(leaves.get(networks.bias_path(p)))) for p in paths]
    while True:
        smaller = list(layers)
        for index in range(len(layers) - 1):
            smaller[index], smaller[index + 1] = _fold(smaller[index], smaller[index + 1], activation)
        if [layer.kernel.shape for layer in smaller] == [layer.kernel.shape for layer in layers]:
            break
        layers = smaller
    changed = {}
    for path, layer in zip(paths, layers, strict=True):
        changed[path] = jnp.asarray(layer.kernel, leaves[path].dtype)
        if layer.bias is not None:
            bias = networks.bias_path(path)
            changed[bias] = jnp.asarray(layer.bias, leaves[bias].dtype)
            checks.require_finite({bias: changed[bias]}, "folded biases")
    return networks.replace(params, changed)


def _maybe(bias: Array | np.ndarray | None) -> np.ndarray | None:
    return None if bias is None else np.asarray(bias)


def _fold(layer: _Layer, following: _Layer, activation: Activation) -> tuple[_Layer, _Layer]:
    """Drops the neurons of a layer that are constant or unread; what the constants add goes into the next biases."""
    reached = (layer.kernel != 0).any(0)
    read = (following.kernel != 0).any(1)
    bias = np.zeros(layer.kernel.shape[1], layer.kernel.dtype) if layer.bias is None else layer.bias
    constants = np.asarray(activation(jnp.asarray(bias)))
    if following.bias is None:
        reached = reached | (constants != 0)
    keep = reached & read
    shifted = following.bias
    if shifted is not None:
        wide = np.result_type(following.kernel.dtype, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # refused in the end, by name
            folded = np.where(~reached & read, constants, 0).astype(wide) @ following.kernel.astype(wide)
        shifted = (shifted.astype(wide) + folded).astype(shifted.dtype)
    kept_bias = None if layer.bias is None else layer.bias[keep]
    return _Layer(layer.kernel[:, keep], kept_bias), _Layer(following.kernel[keep], shifted)


def widths(params: Params) -> tuple[int, ...]:
    """The widths of an MLP's layers, as ``networks.MLP`` takes them.

    Raises:
        ValueError: params that are not an MLP's.

    Example:
        >>> compact.widths(params)
        (8, 2)
    """
    leaves = networks.by_path(params)
    return tuple(leaves[path].shape[1] for path in networks.layers(params))


def inputs_read(params: Params) -> Bool[np.ndarray, " features"]:
    """Which input features a surviving weight of the first layer reads.

    Raises:
        ValueError: params that are not an MLP's.

    Example:
        >>> compact.inputs_read({"kernel": jnp.array([[0.0, 0.0], [1.0, 0.0]])}).tolist()
        [False, True]
    """
    first = networks.by_path(params)[networks.layers(params)[0]]
    return (np.asarray(first) != 0).any(1)


def drop_inputs(params: Params) -> tuple[Params, Int[np.ndarray, " read"]]:
    """The params without the weights of unread inputs, and what to give them: ``network(params, inputs[:, index])``.

    Raises:
        ValueError: params that are not an MLP's.

    Example:
        >>> smaller, index = compact.drop_inputs({"kernel": jnp.array([[0.0, 0.0], [1.0, 0.0]])})
        >>> smaller["kernel"].tolist(), index.tolist()
        ([[1.0, 0.0]], [1])
    """
    path = networks.layers(params)[0]
    index = np.flatnonzero(inputs_read(params))
    return networks.replace(params, {path: networks.by_path(params)[path][index]}), index
