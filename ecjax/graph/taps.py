"""Taps on the products of a network: the place to differentiate at, and what each kernel is multiplied with."""

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, PyTree

from ecjax import _trees
from ecjax.graph.evaluate import evaluate, run
from ecjax.graph.layers import Layers
from ecjax.graph.reading import Reading


def tapped(
    reading: Reading,
    params: PyTree,
    inputs: Array,
    taps: Mapping[str, Float[Array, "samples out"]],
    others: Mapping[str, tuple[Callable, PyTree]] | None = None,
) -> tuple[Float[Array, "samples *positions outputs"], dict[str, Float[Array, "samples in"]]]:
    """Evaluates a network with ``taps`` added to the products of its layers.

    The layer of a kernel gives ``a @ W + taps[path] + bias``, with W the kernel as a matrix (``Layer.layout``). The
    derivative with respect to a tap is the derivative with respect to the layer's pre-activation.

    Args:
        reading: of the network, for params and inputs of these shapes.
        taps: by the kernel's path; a layer without one is left as it is.
        others: by the path of a kernel that is used once, what gives its product from ``(equation, product, operands,
            given)``, and what it is given, with an axis before the others for each scan that the product is in.

    Returns:
        The outputs, and by each kernel's path the inputs ``a`` of its layer, of all layers that see one row a sample.

    Example:
        >>> reading = graph.read(network, params, inputs)
        >>> outputs, layer_inputs = graph.tapped(reading, params, inputs, graph.zero_taps(reading.layers, params, 200))
        >>> {path: a.shape for path, a in layer_inputs.items()}
        {'Dense_0/kernel': (200, 4), 'Dense_1/kernel': (200, 8)}
    """
    others = others or {}
    at = {
        reading.products[layer.kernel][0].site: reading.products[layer.kernel][0]
        for layer in reading.layers
        if layer.outer or layer.kernel in others
    }
    given = {site: others[product.path][1] for site, product in at.items() if product.path in others}

    def with_tap(equation, operands, site, of_site):
        found = at[site]
        if found.path in others:
            return [others[found.path][0](equation, found, operands, of_site)], {}
        (product,), (reads, gives) = run(equation, operands), found.rows
        seen = {found.path: _rows(operands[1 - found.side], (reads.samples.axis, *reads.features))}
        if found.path not in taps:
            return [product], seen
        order = _order(product.ndim, (gives.samples.axis, *gives.features))
        shape = [product.shape[axis] for axis in order]
        tap = jnp.reshape(taps[found.path], shape).transpose(np.argsort(order))
        return [product + tap.astype(product.dtype)], seen

    arguments = [*_trees.by_path(params).values(), inputs]
    (outputs,), seen = evaluate(reading.jaxpr, arguments, frozenset(at), with_tap, given)
    return outputs, seen


def _rows(array: Array, axes: Sequence[int]) -> Array:
    """The array as a matrix: the first of these axes, by all others of them in order; the rest have length 1."""
    return array.transpose(_order(array.ndim, axes)).reshape(array.shape[axes[0]], -1)


def _order(rank: int, axes: Sequence[int]) -> list[int]:
    return [*axes, *(axis for axis in range(rank) if axis not in axes)]


def tap_dtype(kernel: Array | np.ndarray) -> jnp.dtype:
    """What a kernel's taps and moments are held in: at least float32, whatever the layer computes in."""
    return jnp.promote_types(kernel.dtype, jnp.float32)


def zero_taps(layers: Layers, params: PyTree, samples: int) -> dict[str, Float[Array, "samples out"]]:
    """Zero taps for every layer that sees one row of each sample: the place to differentiate at.

    Args:
        layers: of the network.
        samples: how many rows the taps have.

    Example:
        >>> taps = graph.zero_taps(networks.layers(network, params, inputs), params, samples=200)
        >>> {path: tap.shape for path, tap in taps.items()}
        {'Dense_0/kernel': (200, 8), 'Dense_1/kernel': (200, 2)}
    """
    leaves = _trees.by_path(params)
    return {
        layer.kernel: jnp.zeros((samples, layer.layout.sizes[2]), tap_dtype(leaves[layer.kernel]))
        for layer in layers
        if layer.outer
    }
