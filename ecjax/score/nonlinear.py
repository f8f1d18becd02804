"""Elimination-compensation on the true change in the outputs, without the linearisation."""

import jax
import jax.numpy as jnp
from jax import lax

from ecjax import _door, _precision, _trees, graph, metrics, moments
from ecjax._types import Inputs, Metric, Network, Params, Patterns, Weights
from ecjax.graph.ignored import ignored_in
from ecjax.score.scores import Scores, checked, of_each_weight


def nonlinear_elimination_compensation(
    network: Network,
    params: Params,
    inputs: Inputs,
    *,
    metric: Metric = "euclidean",
    weights: Weights | None = None,
    steps: int = 3,
    weights_at_once: int = 64,
    exclude: Patterns = (),
) -> Scores:
    """Elimination-compensation with the true change in the outputs in place of its first-order estimate.

    ``I_ij = min_Δb E[δyᵀ M δy]`` with ``δy = y(W_ij = 0, b_i + Δb) − y``: only neuron i's pre-activations change.
    Newton steps in Δb start from the linear optimum ``W_ij · mean_S(a_j)`` and the best Δb met is kept, so the
    importance is never above that of the linear shift. Source: the exact counterpart of Ballini et al.,
    arXiv:2602.20467.

    It costs about ``4 · steps`` forward passes for every weight: for small networks, or as a yardstick.

    Args:
        params: of the network; nothing moves for a kernel without a bias.
        inputs: calibration inputs, all held in memory at once.
        steps: Newton steps for each weight.
        weights_at_once: how many weights one ``vmap`` takes; it bounds the memory.

    Returns:
        Scores: importance in squared units of the outputs, bias shifts in units of the pre-activations.

    Raises:
        ValueError: as ``elimination_compensation``.

    Example:
        >>> exact = score.nonlinear_elimination_compensation(network, params, inputs, metric="fisher")
        >>> exact.importance["Dense_0"]["kernel"].shape
        (4, 8)
    """
    options = {"exclude": exclude, "metric": metric, "weights": weights}
    at = _door.enter(network, params, inputs, **options, steps=steps, weights_at_once=weights_at_once)
    seen = moments.of_inputs(network, params, inputs, **options)
    given = at.params, at.inputs, at.weights, seen
    return checked(_all_weights(at.network, int(steps), int(weights_at_once), *given))


@_precision.compiled("network", "steps", "weights_at_once")
def _all_weights(network, steps, weights_at_once, params, inputs, weights, seen) -> Scores:
    ignored = ignored_in(network, seen.read, params, inputs, seen.metric.factor)
    inputs, weights = jax.tree.map(graph.at_least_two, (inputs, weights))
    reading = graph.read(network, params, inputs, exclude=seen.exclude)
    outputs, layer_inputs = graph.tapped(reading, params, inputs, {})
    leaves = _trees.by_path(params)

    def one_weight(layer, index):
        kernel, found = graph.as_matrices(leaves[layer.kernel], layer.layout), seen.layers[layer.kernel]
        member, source, neuron = jnp.unravel_index(index, kernel.shape)
        weight = kernel[member, source, neuron].astype(found.mean.dtype)

        def without(shift):
            """The network without the weight and with its bias shifted."""
            if layer.outer:
                removed = weight * layer_inputs[layer.kernel][:, source].astype(weight.dtype)
                tap = jnp.zeros((inputs.shape[0], kernel.shape[2]), weight.dtype).at[:, neuron].set(shift - removed)
                return graph.tapped(reading, params, inputs, {layer.kernel: tap})[0]
            changed = {layer.kernel: graph.as_leaf(kernel.at[member, source, neuron].set(0), layer.layout)}
            if layer.bias is not None:
                bias = graph.as_matrices(leaves[layer.bias].astype(weight.dtype), layer.bias_layout)
                moved = graph.as_leaf(bias.at[member, 0, neuron].add(shift), layer.bias_layout)
                changed[layer.bias] = moved.astype(leaves[layer.bias].dtype)
            return network(_trees.replace(params, changed), inputs)

        def true_change(shift):
            if layer.kernel in ignored:
                shift = jnp.where(ignored[layer.kernel][member, neuron], 0, shift)
            change = metrics.squared_norm(seen.metric, outputs, without(shift) - outputs, weights)
            return change.mean().astype(weight.dtype)

        if layer.bias is None:
            zero = jnp.zeros((), weight.dtype)
            return true_change(zero), zero
        sensitivity, mean = found.sensitivity.reshape(kernel.shape[::2]), found.mean.reshape(kernel.shape)
        linear_curvature = 2 * sensitivity[member, neuron] / seen.samples
        return _minimise(true_change, weight * mean[member, source, neuron], linear_curvature, steps=steps)

    return of_each_weight(params, seen.read, one_weight, weights_at_once=weights_at_once)


def _minimise(function, start, usual_curvature, *, steps):
    """The least value that Newton steps in one variable meet, and where; never above the value at the start.

    Where the function is concave the step is downhill all the same, by the size of the curvature; where it is flat, a
    hundredth of the usual curvature bounds it. A step that does not lower the function is halved.
    """
    least_curvature = (0.01 * usual_curvature).astype(start.dtype)

    def value_and_slope(at):
        return jax.jvp(function, (at,), (jnp.ones_like(at),))

    def step(state, _):
        best, least, move = state
        tried = best - move
        (value, slope), (_, curvature) = jax.jvp(value_and_slope, (tried,), (jnp.ones_like(tried),))
        curvature = jnp.maximum(jnp.abs(curvature), least_curvature)
        newton = jnp.where(curvature > 0, slope / jnp.where(curvature > 0, curvature, 1), 0)
        lower = value < least
        return (jnp.where(lower, tried, best), jnp.minimum(value, least), jnp.where(lower, newton, move / 2)), None

    (best, least, move), _ = lax.scan(step, (start, jnp.full_like(start, jnp.inf), jnp.zeros_like(start)), length=steps)
    tried = best - move
    value = function(tried)
    return jnp.maximum(jnp.minimum(value, least), 0), jnp.where(value < least, tried, best)
