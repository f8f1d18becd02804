"""Kernels whose biases can take over a constant in the place of a unit that they read."""

from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ecjax.graph.groups import Group, Place
from ecjax.graph.layers import Layer, Layers
from ecjax.graph.layout import Layout, as_matrices


class Reader(NamedTuple):
    """A layer that reads the units of a group and has a bias of its own.

    Attributes:
        layer: its kernel is used once.
        bias: the path of its bias.
        values: for each unit, which of the layer's inputs are its own: their numbers in ``(stack, channels)``,
            flattened. One for a neuron, the features of a head, one for each turn of a scan.
    """

    layer: Layer
    bias: str
    values: Int[np.ndarray, "units values"]


def readers(layers: Layers, group: Group) -> list[Reader]:
    """The layers that can make up for a unit of a group: those that read it once and have a bias, in their order.

    Args:
        layers: of the network, without those that are left alone.
        group: of its units.
    """
    found = []
    for layer in layers:
        if layer.bias is None or layer.of_kernel is None or not (layer.once or layer.outer):
            continue
        for place in group.places:
            if place.path == layer.kernel:
                values = _values(layer, place, group.length)
                if values is not None:
                    found.append(Reader(layer, layer.bias, values))
    return found


def made_in(layers: Layers, group: Group) -> list[Place]:
    """The places of a group in the leaves that make its units: in kernels that also read them, those along neurons."""
    by_kernel = {layer.kernel: layer for layer in layers if layer.of_kernel is not None}

    def reads(place: Place) -> bool:
        layer = by_kernel.get(place.path)
        return layer is not None and _values(layer, place, group.length) is not None

    return [place for place in group.places if place.path in group.produced and not reads(place)]


def _values(layer: Layer, place: Place, units: int) -> Int[np.ndarray, "units values"] | None:
    """Which inputs of a layer are those of each unit; None where the units lie along other axes of its kernel."""
    shape = [1] * len(layer.shape)
    shape[place.axis] = layer.shape[place.axis]
    along = np.broadcast_to(np.reshape(place.units, shape), layer.shape)
    matrices = _of(along, layer.layout)
    stack, inputs, neurons = layer.layout.sizes
    if 0 in (stack, inputs, neurons) or (matrices != matrices[:, :, :1]).any():
        return None  # along the neurons
    of_inputs = matrices[:, :, 0].reshape(stack, layer.window, inputs // layer.window)
    if (of_inputs != of_inputs[:, :1]).any():
        return None  # along the places of a window
    flat = of_inputs[:, 0].reshape(-1)
    if units > 1 and (of_inputs[:, 0] == of_inputs[:, 0, :1]).all():
        return None  # along the members of a stack
    counts = np.bincount(flat[flat >= 0], minlength=units)
    if len(counts) == 0 or (counts != counts[0]).any() or counts[0] == 0:
        return None
    order = np.argsort(np.where(flat < 0, units, flat), kind="stable")
    return order[: units * counts[0]].reshape(units, counts[0])


def _of(leaf: np.ndarray, layout: Layout) -> np.ndarray:
    """As ``as_matrices``, of numbers that are known."""
    order = (*layout.stacked, *layout.inputs, *layout.outputs)
    return leaf.reshape(layout.split).transpose(order).reshape(layout.sizes)


def of_channels(kernel: Array, layer: Layer) -> Float[Array, "stack channels out"]:
    """A kernel as matrices, of a convolution summed over its window: what a constant channel adds to each neuron."""
    matrices = as_matrices(kernel, layer.layout)
    stack, inputs, neurons = matrices.shape
    return matrices.reshape(stack, layer.window, inputs // max(layer.window, 1), neurons).sum(1)
