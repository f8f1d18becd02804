"""Dense kernels, and the second moments of what they are multiplied with."""

import math
from collections.abc import Iterator

import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core
from jaxtyping import Float

from ecjax import _precision, _trees, graph
from ecjax._types import Inputs, Network, Params
from ecjax.graph import Layer, Layers, Reading
from ecjax.graph.evaluate import evaluate, run
from ecjax.graph.reading import shape_of_two
from ecjax.graph.roles import CALLS
from ecjax.graph.samples import shape_of
from ecjax.graph.taps import tap_dtype


def require_dense(network: Network, layers: Layers, params: Params, inputs: Inputs) -> None:
    """Raises a ValueError for a kernel whose rows of inputs are not those of one dense product."""
    reading = graph.read(network, params, shape_of_two(inputs))
    for layer in layers:
        what = _not_dense(layer, reading)
        if what:
            raise ValueError(
                f"this takes dense kernels that are used once; '{layer.kernel}' {what}. Leave it out with "
                f"exclude=('{layer.kernel}',)"
            )


def _not_dense(layer: Layer, reading: Reading) -> str:
    """Why a kernel is no dense one, in words; "" if it is."""
    uses = reading.products[layer.kernel]
    if len(uses) > 1:
        return f"is used {len(uses)} times"
    if layer.kernel in reading.looked_up:
        return "is also looked up in"
    equations = list(_equations(reading.jaxpr, uses[0].site))
    if any(equation.primitive.name == "scan" for equation in equations):
        return "is used inside a scan"
    if equations[-1].primitive.name != "dot_general":
        return "is convolved"
    _, batched = equations[-1].params["dimension_numbers"]
    shape = shape_of(equations[-1].invars[uses[0].side])
    if layer.layout.sizes[0] not in (1, math.prod(shape[axis] for axis in batched[uses[0].side])):
        return "is a stack that is repeated along an axis of its product"
    return ""


def _equations(jaxpr: core.ClosedJaxpr, site: tuple[int, ...]) -> Iterator[core.JaxprEqn]:
    """The equation at a place, after the calls that it is in."""
    for index in site:
        equation = getattr(jaxpr, "jaxpr", jaxpr).eqns[index]
        yield equation
        jaxpr = equation.params.get(CALLS.get(equation.primitive.name, "jaxpr"))


@_precision.compiled("network", "layer", "batch_size")
def hessian(network, layer, batch_size, params, inputs) -> Float[Array, "stack in in"]:
    """``2 XᵀX`` of a kernel's inputs, summed over positions, the mean over samples."""
    samples = inputs.shape[0]
    size = min(batch_size, samples)
    whole = samples // size * size
    members, ins, _ = layer.layout.sizes
    zero = jnp.zeros((members, ins, ins), tap_dtype(_trees.by_path(params)[layer.kernel]))

    def add(total, batch):
        return total + _of_batch(network, layer, params, batch, total.dtype), None

    total, _ = lax.scan(add, zero, inputs[:whole].reshape(-1, size, *inputs.shape[1:]))
    return 2 / samples * (add(total, inputs[whole:])[0] if whole < samples else total)


def _of_batch(network, layer: Layer, params, inputs, dtype) -> Float[Array, "stack in in"]:
    twice = 1 if inputs.shape[0] > 1 else 2
    inputs = graph.at_least_two(inputs)
    reading = graph.read(network, params, inputs)
    (product,) = reading.products[layer.kernel]
    members, ins, _ = layer.layout.sizes

    def with_squares(equation, operands, *_):
        other = operands[1 - product.side]
        contracted, batched = (axes[1 - product.side] for axes in equation.params["dimension_numbers"])
        free = [axis for axis in range(other.ndim) if axis not in (*contracted, *batched)]
        rows = other.transpose(*batched, *free, *contracted).reshape(members, -1, ins).astype(dtype)
        return run(equation, operands), {"sum": rows.mT @ rows}

    arguments = [*_trees.by_path(params).values(), inputs]
    return evaluate(reading.jaxpr, arguments, frozenset({product.site}), with_squares, {})[1]["sum"] / twice
