"""Neurons that pruning has cut off, folded away: smaller arrays, the same function."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float

from ecjax import _checks, _trees, networks
from ecjax._types import Inputs, Network, Params
from ecjax.compact import answers, chains
from ecjax.compact.chains import Chain
from ecjax.graph import Layout


def compact(network: Network, params: Params, inputs: Inputs) -> tuple[Network, Params]:
    """A smaller multilayer perceptron with the same function, and its params: those of ``fold``.

    Arguments and errors are those of ``fold``, and a module that can't be built here is an error with the widths that
    it needs.

    The smaller network is the network itself where it takes the smaller params, as plain functions, Equinox and NNX do.
    Where ``networks.from_linen`` made it of a ``networks.MLP``, it is that of the MLP with the smaller widths. Both are
    called on a few of the inputs, and must answer alike up to rounding.

    Example:
        >>> halved = networks.replace(params, {"Dense_0/kernel": params["Dense_0"]["kernel"].at[:, ::2].set(0)})
        >>> smaller, small = compact.compact(network, halved, inputs)
        >>> small["Dense_0"]["kernel"].shape, small["Dense_1"]["kernel"].shape
        ((4, 4), (4, 2))
        >>> bool(jnp.allclose(smaller(small, inputs), network(halved, inputs), atol=1e-5))
        True
    """
    chain = chains.read(network, params, inputs)
    small, widths = _folded(network, params, chain)
    smaller = _network_of(network, small, chain, widths)
    found, reference = answers.of(smaller, small, chain.samples), (network, params, chain.samples)
    answers.require_same("the smaller network is not the one that was given", found, chain.outputs, reference)
    return smaller, small


def fold(network: Network, params: Params, inputs: Inputs) -> Params:
    """The params of a smaller multilayer perceptron with the same function.

    A hidden neuron that no surviving weight joins to the inputs is a constant: what it adds to the next layer goes into
    that layer's biases, and it is dropped. Its value is taken from the network itself. A hidden neuron that no
    surviving weight reads is dropped too. A network that no input reaches keeps its output biases, and hidden layers of
    width 0. Inputs and outputs stay, see ``drop_inputs``. Neurons that do not lie along one axis of each leaf stay,
    too; and where the next layer has no biases, so do constants other than 0.

    Args:
        network: a multilayer perceptron: each layer reads the neurons of the one before, through any function of one
            neuron at a time; kernels and biases may lie in any layout.
        params: its parameters, with exact zeros where weights were removed.
        inputs: a few are enough, any that the network takes.

    Returns:
        The params in the containers and dtypes given; the function is the same up to rounding.

    Raises:
        ValueError: another network, by the kernel that makes it one; constants that overflow.

    Example:
        >>> halved = networks.replace(params, {"Dense_0/kernel": params["Dense_0"]["kernel"].at[:, ::2].set(0)})
        >>> jax.tree.map(jnp.shape, compact.fold(network, halved, inputs)["Dense_1"])
        {'bias': (2,), 'kernel': (4, 2)}
    """
    return _folded(network, params, chains.read(network, params, inputs))[0]


def _folded(network: Network, params: Params, chain: Chain) -> tuple[Params, tuple[int, ...]]:
    """The smaller params, and the widths of their layers."""
    constant = _constants(chain)
    kept = _kept(chain, constant)
    leaves, full, small = _trees.by_path(params), {}, {}
    shifts = [0.0, *map(_shift, chain.inputs[1:], chain.kernels[1:], constant, kept[1:])]
    for index, layer in enumerate(chain.layers):
        kernel, rows, columns = leaves[layer.kernel], kept[index], kept[index + 1]
        unread = chains.with_entries(kernel, layer.layout, np.where(rows[:, None], chain.kernels[index], 0))
        full[layer.kernel] = chains.like(kernel, unread)
        sliced = _sliced(_sliced(unread, layer.layout, "in", rows), layer.layout, "out", columns)
        small[layer.kernel] = chains.like(kernel, sliced)
        if layer.bias is not None:
            bias, row = leaves[layer.bias], chain.biases[index].astype(np.float64) + shifts[index]
            shifted = chains.with_entries(bias, layer.bias_layout, row[None])
            full[layer.bias] = chains.like(bias, shifted)
            small[layer.bias] = chains.like(bias, _sliced(shifted, layer.bias_layout, "out", columns))
            _checks.require_finite({layer.bias: small[layer.bias]}, "folded biases")
    # At full size any network can be called, so the folding is compared before anything is cut out.
    found = answers.of(network, _trees.replace(params, full), chain.samples)
    reference = (network, params, chain.samples)
    answers.require_same("the network can't be folded as it was read", found, chain.outputs, reference)
    return _trees.replace(params, small), tuple(int(columns.sum()) for columns in kept[1:])


def _constants(chain: Chain) -> list[Bool[np.ndarray, " _"]]:
    """Of each hidden layer, which neurons no surviving weight joins to the inputs."""
    varies, found = np.ones(chain.kernels[0].shape[0], bool), []
    for kernel in chain.kernels[:-1]:
        varies = (kernel[varies] != 0).any(0)
        found.append(~varies)
    return found


def _kept(chain: Chain, constant: Sequence[Bool[np.ndarray, " _"]]) -> list[Bool[np.ndarray, " _"]]:
    """Of the inputs, of each hidden layer and of the outputs, which stay."""
    kept = [np.ones(chain.kernels[-1].shape[1], bool)]
    for index in reversed(range(len(chain.layers) - 1)):
        read = (chain.kernels[index + 1][:, kept[0]] != 0).any(1)
        folds = chain.biases[index + 1] is not None
        values = chain.inputs[index + 1][0]
        stays = read & ~(constant[index] & (folds | (values == 0)))
        kept.insert(0, stays if _along_one_axis(chain, index) else np.ones_like(stays))
    return [np.ones(chain.kernels[0].shape[0], bool), *kept]


def _along_one_axis(chain: Chain, index: int) -> bool:
    """Whether the neurons of a layer lie along an axis of its kernel, its bias, and of the kernel that reads them."""
    layer, reader = chain.layers[index : index + 2]
    found = [chains.axis(layer.layout, "out"), chains.axis(reader.layout, "in")]
    found += [chains.axis(layer.bias_layout, "out")] if layer.bias else []
    return None not in found


def _shift(
    inputs: Float[np.ndarray, "few neurons"],
    kernel: Float[np.ndarray, "neurons out"],
    constant: Bool[np.ndarray, " neurons"],
    kept: Bool[np.ndarray, " neurons"],
) -> Float[np.ndarray, " out"]:
    """What the neurons of a layer that are folded away add to the neurons of the next."""
    folded = constant & ~kept & (kernel != 0).any(1)
    with np.errstate(over="ignore", invalid="ignore"):  # refused by name, where it reaches a bias
        return np.where(folded, inputs[0], 0).astype(np.float64) @ kernel.astype(np.float64)


def _sliced(leaf: np.ndarray, layout: Layout, role: str, kept: Bool[np.ndarray, " _"]) -> np.ndarray:
    """The leaf with only some of its inputs or neurons."""
    return leaf if kept.all() else leaf.compress(kept, chains.axis(layout, role))


def _network_of(network: Network, small: Params, chain: Chain, widths: tuple[int, ...]) -> Network:
    """A network that takes the smaller params: the one given, or its module's with other widths."""
    if _gives(network, small, chain):
        return network
    module = getattr(network, "module", None)
    if isinstance(module, networks.MLP):
        other = networks.from_linen(module.clone(features=widths))
        if _gives(other, small, chain):
            return other
    raise ValueError(
        f"the network does not take the smaller params: its shapes are fixed. Build its module with layers of widths "
        f"{widths} instead of {chain.widths}; compact.fold gives the params of that"
    )


def _gives(network: Network, params: Params, chain: Chain) -> bool:
    """Whether a network takes these params and gives outputs of the same shape."""
    network, params, _ = _trees.split(network, params)
    try:
        return jax.eval_shape(network, params, chain.samples).shape == chain.outputs.shape
    except Exception:
        return False
