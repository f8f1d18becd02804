"""Sparse kernels: JAX's BCSR for jitted functions, SciPy's CSR for deployment with NumPy alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax import Array
from jax.experimental import sparse
from jaxtyping import Num

from ecjax._types import Inputs, Network, Params
from ecjax.compact import answers, chains
from ecjax.compact.chains import Chain

KINDS = ("bcsr", "csr")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Sparse:
    """A multilayer perceptron with sparse kernels.

    Attributes:
        layers: the kernel and the bias of each layer, in order of execution; a kernel is ``(out, in)``, a row for each
            neuron, and the bias None for a layer without one.

    Example:
        >>> [(kernel.shape, bias.shape) for kernel, bias in compact.to_sparse(network, pruned.params, inputs).layers]
        [((8, 4), (8,)), ((2, 8), (2,))]
    """

    layers: tuple[tuple[Any, Any], ...]


def to_sparse(network: Network, params: Params, inputs: Inputs, kind: str = "bcsr") -> Sparse:
    """The kernels of a multilayer perceptron as sparse arrays, and its biases; ``forward`` calls them.

    Args:
        network: a multilayer perceptron whose first layer reads the inputs as they are, and whose last one gives the
            outputs.
        params: its parameters, with exact zeros where weights were removed.
        inputs: a few are enough, any that the network takes.
        kind: "bcsr" for ``jax.experimental.sparse.BCSR``, which jitted functions take; "csr" for
            ``scipy.sparse.csr_array``, with biases as NumPy arrays, in float32 or wider.

    Raises:
        ValueError: an unknown kind, or another network, with what is different.

    Example:
        >>> kernel, bias = compact.to_sparse(network, pruned.params, inputs, "csr").layers[0]
        >>> kernel.shape, kernel.nnz == int(jnp.count_nonzero(pruned.params["Dense_0"]["kernel"]))
        ((8, 4), True)
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(map(repr, KINDS))}")
    chain = chains.read(network, params, inputs)
    require_plain(network, params, chain)
    return of_chain(chain, kind)


def of_chain(chain: Chain, kind: str) -> Sparse:
    """The sparse arrays of what was read."""
    layers = []
    for kernel, bias in zip(chain.kernels, chain.biases, strict=True):
        if kind == "csr":
            layers.append((scipy.sparse.csr_array(as_numpy(kernel).T), None if bias is None else as_numpy(bias)))
        else:
            layers.append((sparse.BCSR.fromdense(jnp.asarray(kernel).T), None if bias is None else jnp.asarray(bias)))
    return Sparse(tuple(layers))


def require_plain(network: Network, params: Params, chain: Chain) -> None:
    """Raises a ValueError if a network does more than its layers, before the first one or after the last."""
    what, reference = "the kernels and biases alone are not the network", (network, params, chain.samples)
    name = f"{what}, whose first layer reads something else than the inputs"
    same = (lambda _, samples: samples, {}, chain.samples)
    answers.require_same(name, chain.inputs[0], np.asarray(chain.samples), same)
    last = chain.inputs[-1].astype(np.float64) @ chain.kernels[-1].astype(np.float64)
    last = last if chain.biases[-1] is None else last + chain.biases[-1].astype(np.float64)
    answers.require_same(f"{what}, whose outputs are not those of its last layer", last, chain.outputs, reference)


def as_numpy(leaf: Array | np.ndarray) -> np.ndarray:
    """A leaf for NumPy and SciPy, in float32 or wider: SciPy knows no smaller numbers, and NumPy is slow with them."""
    return np.asarray(leaf, np.result_type(leaf.dtype, np.float32))


def forward(
    sparse: Sparse, inputs: Num[Array | np.ndarray, "samples in"], activation: Callable
) -> Num[Array | np.ndarray, "samples out"]:
    """The outputs of a multilayer perceptron with sparse kernels; jit it for "bcsr", call it as it is for "csr".

    Args:
        sparse: of ``to_sparse``.
        inputs: samples along the first axis; NumPy for "csr".
        activation: elementwise, after every layer but the last; a NumPy function for "csr". Nothing can check it here:
            ``compact.report`` compares it with the network's own.

    Example:
        >>> sparse = compact.to_sparse(network, pruned.params, inputs, "csr")
        >>> outputs = compact.forward(sparse, np.asarray(inputs), lambda z: np.maximum(z, 0))  # needs no JAX
        >>> np.allclose(outputs, network(pruned.params, inputs), atol=1e-5)
        True
    """
    hidden = inputs.T
    for index, (kernel, bias) in enumerate(sparse.layers):
        hidden = kernel @ (activation(hidden) if index else hidden)
        hidden = hidden if bias is None else hidden + bias[:, None]
    return hidden.T
