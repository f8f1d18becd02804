"""A multilayer perceptron as it was read: matrices and biases in order of execution, and what each layer saw."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Num

from ecjax import _checks, _door, _precision, _trees, graph
from ecjax._types import Inputs, Network, Params
from ecjax.compact import answers
from ecjax.graph import Layer, Layout
from ecjax.graph.taps import tapped


class Chain(NamedTuple):
    """A multilayer perceptron.

    Attributes:
        layers: in order of execution.
        kernels: of these, as matrices.
        biases: of these; None for a layer without one.
        samples: a few of the inputs.
        inputs: what each layer reads for these.
        outputs: of the network for these.
    """

    layers: tuple[Layer, ...]
    kernels: list[Num[np.ndarray, "in out"]]
    biases: list[Num[np.ndarray, " out"] | None]
    samples: Num[Array, "few *features"]
    inputs: list[Float[np.ndarray, "few in"]]
    outputs: Num[np.ndarray, "few outputs"]

    @property
    def widths(self) -> tuple[int, ...]:
        """How many neurons each layer has."""
        return tuple(kernel.shape[1] for kernel in self.kernels)


def read(network: Network, params: Params, inputs: Inputs) -> Chain:
    """Reads a multilayer perceptron, and evaluates it for a few samples.

    Raises:
        ValueError: another network, with the kernel that makes it one; params or inputs without values, or with
            NaN or infinity in the inputs.
    """
    _checks.require_inputs(inputs)
    network, params, _ = _trees.split(network, params)
    if not _checks.are_known((params, inputs)):
        raise ValueError("the shapes of what is compacted depend on values: call this outside of jit, vmap and grad")
    layers = _door.layers(network, params, inputs, need="any")
    graph.chain(layers)
    leaves = _trees.by_path(params)
    samples = answers.few(inputs)
    outputs, seen = _evaluated(params, samples, network=network)
    return Chain(
        layers=tuple(layers),
        kernels=[entries(leaves[layer.kernel], layer.layout) for layer in layers],
        biases=[None if layer.bias is None else entries(leaves[layer.bias], layer.bias_layout)[0] for layer in layers],
        samples=samples,
        inputs=[np.asarray(seen[layer.kernel]) for layer in layers],
        outputs=np.asarray(outputs),
    )


@_precision.in_full
def _evaluated(params: Params, inputs: Inputs, *, network: Network) -> tuple[Array, dict[str, Array]]:
    return _tapped(params, inputs, network=network)


@functools.partial(jax.jit, static_argnames="network")
def _tapped(params, inputs, *, network):
    return tapped(graph.read(network, params, inputs), params, inputs, {})


def layer_inputs(network: Network, params: Params, inputs: Inputs, layer: Layer) -> Num[np.ndarray, "samples in"]:
    """What one layer of a network reads for these inputs."""
    network, params, _ = _trees.split(network, params)
    return np.asarray(_evaluated(params, inputs, network=network)[1][layer.kernel])


def places(layout: Layout) -> Int[np.ndarray, "in out"]:
    """Where each entry of the matrix lies in the flattened leaf."""
    # As in graph.as_matrices, but nothing is compiled for shapes that come once.
    order = (*layout.stacked, *layout.inputs, *layout.outputs)
    flat = np.arange(math.prod(layout.shape)).reshape(layout.split)
    return flat.transpose(order).reshape(layout.sizes)[0]


def entries(leaf: Array | np.ndarray, layout: Layout) -> Num[np.ndarray, "in out"]:
    """A leaf as a matrix, in its own dtype; the row of a bias."""
    return np.asarray(leaf).reshape(-1)[places(layout)]


def with_entries(leaf: Array | np.ndarray, layout: Layout, matrix: Num[np.ndarray, "in out"]) -> Num[np.ndarray, "..."]:
    """A leaf in its own dtype and layout, with the entries of a matrix."""
    changed = np.array(leaf).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused by name
        changed[places(layout)] = matrix.astype(changed.dtype)
    return changed.reshape(layout.shape)


def axis(layout: Layout, role: str) -> int | None:
    """The axis of a leaf along which its inputs ("in") or its neurons ("out") lie, in order and alone; None without."""
    part, size = (layout.inputs, layout.sizes[1]) if role == "in" else (layout.outputs, layout.sizes[2])
    named = [place for place, name in enumerate(layout.axes) if name == ("1" if size == 1 else role)]
    return named[0] if len(named) == 1 and len(part) == (size != 1) else None


def like(leaf: Array | np.ndarray, values: Num[np.ndarray, "..."]) -> Array | np.ndarray:
    """An array of the leaf's kind and dtype."""
    return values if isinstance(leaf, np.ndarray) else jnp.asarray(values, leaf.dtype)
