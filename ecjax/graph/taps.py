"""Taps on the products of a network: the place to differentiate at, and what each kernel is multiplied with.

The jaxpr is evaluated equation by equation, and only the calls that a tapped product is in are gone into: jitted,
rematerialised and custom-derivative functions keep their own rules everywhere else.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core
from jaxtyping import Float, PyTree

from ecjax import _trees
from ecjax.graph.layers import Layers
from ecjax.graph.reading import Reading
from ecjax.graph.roles import CALLS
from ecjax.graph.values import Product


def tapped(
    reading: Reading, params: PyTree, inputs: Array, taps: Mapping[str, Float[Array, "samples out"]]
) -> tuple[Float[Array, "samples outputs"], dict[str, Float[Array, "samples in"]]]:
    """Evaluates a network with ``taps`` added to the products of its layers.

    The layer of a kernel gives ``a @ W + taps[path] + bias``, with W the kernel as a matrix (``Layer.layout``). The
    derivative with respect to a tap is the derivative with respect to the layer's pre-activation.

    Args:
        reading: of the network, for params and inputs of these shapes.
        taps: by the kernel's path; a layer without one is left as it is.

    Returns:
        The outputs, and by each kernel's path the inputs ``a`` of its layer, of all layers that can be scored.

    Example:
        >>> reading = graph.read(network, params, inputs)
        >>> outputs, layer_inputs = graph.tapped(reading, params, inputs, graph.zero_taps(reading.layers, params, 200))
        >>> {path: a.shape for path, a in layer_inputs.items()}
        {'Dense_0/kernel': (200, 4), 'Dense_1/kernel': (200, 8)}
    """
    sites = {reading.products[layer.kernel].site: reading.products[layer.kernel] for layer in reading.layers}
    sites = {site: product for site, product in sites.items() if product.reads}
    seen: dict[str, Array] = {}
    arguments = [*_trees.by_path(params).values(), inputs]
    (outputs,) = _evaluate_all(reading.jaxpr, arguments, (), sites, taps, seen)
    return outputs, seen


def _evaluate_all(closed, arguments: Sequence, site, sites: Mapping, taps: Mapping, seen: dict[str, Array]) -> list:
    jaxpr = getattr(closed, "jaxpr", closed)
    values = dict(zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(var):
        return var.val if isinstance(var, core.Literal) else values[var]

    for index, equation in enumerate(jaxpr.eqns):
        here, operands = (*site, index), [read(var) for var in equation.invars]
        name = equation.primitive.name
        if here in sites:
            results = [_product(equation, operands, sites[here], taps, seen)]
        elif name in CALLS and any(other[: len(here)] == here for other in sites):
            results = _evaluate_all(equation.params[CALLS[name]], operands, here, sites, taps, seen)
        else:
            results = _evaluate(equation, operands)
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _product(equation, operands: list, found: Product, taps: Mapping, seen: dict[str, Array]) -> Array:
    """Evaluates a kernel's product, with its tap, and notes what the kernel is multiplied with."""
    (product,) = _evaluate(equation, operands)
    layer_inputs = operands[1 - found.side]
    seen[found.path] = _rows(layer_inputs, found.reads)
    if found.path not in taps:
        return product
    order = _order(product.ndim, found.gives)
    shape = [product.shape[axis] for axis in order]
    tap = jnp.reshape(taps[found.path], shape).transpose(np.argsort(order))
    return product + tap.astype(product.dtype)


def _rows(array: Array, axes: Sequence[int]) -> Array:
    """The array as a matrix: the first of these axes, by all others of them in order; the rest have length 1."""
    return array.transpose(_order(array.ndim, axes)).reshape(array.shape[axes[0]], -1)


def _order(rank: int, axes: Sequence[int]) -> list[int]:
    return [*axes, *(axis for axis in range(rank) if axis not in axes)]


def _evaluate(equation, operands: list) -> list:
    """Runs one equation by itself; ``core.jaxpr_as_fun`` is the public way to bind a primitive again."""
    variables = [var for var in equation.invars if not isinstance(var, core.Literal)]
    source = core.DebugInfo("ecjax.graph", equation.primitive.name, None, None)
    jaxpr = core.Jaxpr((), variables, equation.outvars, [equation], equation.effects, source)
    arguments = [
        operand for operand, var in zip(operands, equation.invars, strict=True) if not isinstance(var, core.Literal)
    ]
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*arguments)


def tap_dtype(kernel: Array | np.ndarray) -> jnp.dtype:
    """What a kernel's taps and moments are held in: at least float32, whatever the layer computes in."""
    return jnp.promote_types(kernel.dtype, jnp.float32)


def zero_taps(layers: Layers, params: PyTree, samples: int) -> dict[str, Float[Array, "samples out"]]:
    """Zero taps for every layer: the place to differentiate at.

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
        layer.kernel: jnp.zeros((samples, layer.layout.sizes[2]), tap_dtype(leaves[layer.kernel])) for layer in layers
    }
