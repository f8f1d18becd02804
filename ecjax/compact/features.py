"""Input features that no surviving weight reads."""

import numpy as np
from jax import Array
from jaxtyping import Bool, Int, Num

from ecjax import _trees
from ecjax._types import Inputs, Network, Params
from ecjax.compact import answers, chains
from ecjax.compact.chains import Chain

_MIXTURES = 64


def inputs_read(network: Network, params: Params, inputs: Inputs) -> Bool[np.ndarray, " features"]:
    """Which input features a surviving weight of the first layer reads; arguments are those of ``fold``.

    Raises:
        ValueError: no multilayer perceptron, or one whose first layer does not read the features one by one, or that
            reads them elsewhere, too.

    Example:
        >>> small = {"kernel": jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])}
        >>> compact.inputs_read(lambda params, x: x @ params["kernel"], small, inputs).tolist()
        [False, True, False, True]
    """
    return _read(network, params, chains.read(network, params, inputs))


def drop_inputs(network: Network, params: Params, inputs: Inputs) -> tuple[Params, Int[np.ndarray, " read"]]:
    """The params without the weights of unread features, and what to give them: ``network(params, inputs[:, index])``.

    Arguments and errors are those of ``inputs_read``, and a network that takes no fewer features is an error.

    Example:
        >>> small = {"kernel": jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])}
        >>> smaller, index = compact.drop_inputs(lambda params, x: x @ params["kernel"], small, inputs)
        >>> smaller["kernel"].tolist(), index.tolist()
        ([[1.0, 0.0], [0.0, 2.0]], [1, 3])
    """
    chain = chains.read(network, params, inputs)
    read = _read(network, params, chain)
    index, first = np.flatnonzero(read), chain.layers[0]
    if read.all():
        return params, index
    axis = chains.axis(first.layout, "in")
    if axis is None:
        raise ValueError(f"the inputs of '{first.kernel}', of shape {first.shape}, do not lie along one of its axes")
    kernel = _trees.by_path(params)[first.kernel]
    small = _trees.replace(params, {first.kernel: chains.like(kernel, np.asarray(kernel).compress(read, axis))})
    found, reference = answers.of(network, small, chain.samples[:, index]), (network, params, chain.samples)
    answers.require_same("the network does something else with fewer features", found, chain.outputs, reference)
    return small, index


def _read(network: Network, params: Params, chain: Chain) -> Bool[np.ndarray, " features"]:
    read = (chain.kernels[0] != 0).any(1)
    low, high = _two_samples(chain.samples)
    if chain.samples.ndim != 2 or not _one_by_one(network, params, chain, low, high):
        raise ValueError(
            f"the first layer '{chain.layers[0].kernel}' does not read the features of inputs of shape "
            f"(samples, *{chain.samples.shape[1:]}) one by one and in order, so its weights do not tell which are read"
        )
    found = answers.of(network, params, np.where(read, np.asarray(chain.samples), low))
    reference = (network, params, chain.samples)
    answers.require_same("the network reads features that its first layer does not", found, chain.outputs, reference)
    return read


def _two_samples(samples: Array) -> tuple[Num[np.ndarray, "*features"], Num[np.ndarray, "*features"]]:
    """Two samples that differ in every feature, well apart."""
    generator, shape = np.random.default_rng(0), samples.shape[1:]
    if np.issubdtype(samples.dtype, np.integer):
        low = generator.integers(0, 50, shape)
        high = low + 50
    else:
        low, high = generator.uniform(0.25, 0.45, shape), generator.uniform(0.55, 0.75, shape)
    return low.astype(samples.dtype), high.astype(samples.dtype)


def _one_by_one(network: Network, params: Params, chain: Chain, low: np.ndarray, high: np.ndarray) -> bool:
    """Whether each input of the first layer depends on the feature in its place, and on no other.

    Of two samples many mixtures are made, each with every feature of one or the other. A feature that a place depends
    on besides its own would show in half of them.
    """
    if chain.kernels[0].shape[0] != low.size:
        return False
    from_high = np.random.default_rng(1).integers(0, 2, (_MIXTURES, low.size)).astype(bool)
    probes = np.concatenate([low[None], high[None], np.where(from_high, high, low)])
    seen = chains.layer_inputs(network, params, probes, chain.layers[0])
    first, second, *mixed = seen.astype(np.float64)
    expected = np.where(from_high, second, first)
    return bool((np.abs(mixed - expected) <= 1e-2 * np.abs(first - second)).all())
