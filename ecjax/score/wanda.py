"""Wanda: weights times the norms of what they multiply."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from ecjax import _door, _precision, _trees, graph
from ecjax._types import Inputs, Network, Params, Patterns
from ecjax.graph.evaluate import evaluate, in_full
from ecjax.graph.layers import kernels
from ecjax.graph.taps import tap_dtype
from ecjax.score.scores import Scores, checked, scores_of


def wanda(
    network: Network, params: Params, inputs: Inputs, *, batch_size: int = 1024, exclude: Patterns = ()
) -> Scores:
    """``I_ij = |W_ij| · ‖a_j‖``, with the norm of the kernel's input j over all samples and positions.

    Source: Sun, Liu, Bair, Kolter, "A simple and effective pruning approach for large language models",
    arXiv:2306.11695, equation 1; its authors let the inputs of one neuron compete: ``scope="neuron"``.

    Raises:
        ValueError: bad inputs, a kernel that can't be scored, or importances that overflow.

    Example:
        >>> scores = score.wanda(lambda kernel, x: x @ kernel, jnp.array([[-2.0], [1.0]]), jnp.array([[3.0, 1.0]]))
        >>> scores.importance.tolist()
        [[6.0], [1.0]]
    """
    at = _door.enter(network, params, inputs, exclude=exclude, batch_size=batch_size)
    squares = _squares(at.network, at.layers, int(batch_size), at.params, at.inputs)
    weights = kernels(at.layers, at.params)
    norms = {path: jnp.sqrt(squares[path]) for path in weights}
    importance = {path: jnp.abs(kernel).astype(norms[path].dtype) * norms[path] for path, kernel in weights.items()}
    return checked(scores_of(at.params, at.layers, importance))


@_precision.compiled("network", "layers", "batch_size")
def _squares(network, layers, batch_size, params, inputs) -> dict[str, Array]:
    """By its path, for each entry of a kernel the sum of the squares that it multiplies."""
    size = min(batch_size, inputs.shape[0])
    whole = inputs.shape[0] // size * size

    def add(total, batch):
        return jax.tree.map(jnp.add, total, _of_batch(network, layers, params, batch)), None

    zero = {path: jnp.zeros(kernel.shape, tap_dtype(kernel)) for path, kernel in kernels(layers, params).items()}
    total, _ = lax.scan(add, zero, inputs[:whole].reshape(-1, size, *inputs.shape[1:]))
    return add(total, inputs[whole:])[0] if whole < inputs.shape[0] else total


def _of_batch(network, layers, params, inputs) -> dict[str, Array]:
    """A product is linear in its kernel: with the other side squared, its gradient there is what is asked for."""
    twice = 1 if inputs.shape[0] > 1 else 2
    inputs = graph.at_least_two(inputs)
    reading = graph.read(network, params, inputs)
    sites = {use.site: use for layer in layers for use in reading.products[layer.kernel]}
    leaves = _trees.by_path(params)

    def summed(moving):
        def with_squares(equation, operands, site, _):
            kernel, other = operands[sites[site].side], lax.stop_gradient(operands[1 - sites[site].side])
            squared = [kernel, kernel]
            squared[1 - sites[site].side] = jnp.square(other.astype(tap_dtype(other)))
            (squares,) = in_full(equation, squared)
            return in_full(equation, operands), {str(site): squares.sum()}

        arguments = [*(leaves | moving).values(), inputs]
        sums = evaluate(reading.jaxpr, arguments, frozenset(sites), with_squares, {}, in_full)[1]
        return sum(of_site.sum() for of_site in sums.values())

    moving = {path: kernel.astype(tap_dtype(kernel)) for path, kernel in kernels(layers, params).items()}
    return jax.tree.map(lambda squares: squares / twice, jax.grad(summed)(moving))
