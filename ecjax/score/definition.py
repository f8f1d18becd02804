"""Elimination-compensation by its literal definition: the reference, and for any differentiable network."""

import jax
import jax.numpy as jnp

from ecjax import _door, _precision, _trees, graph, metrics
from ecjax._types import Inputs, Metric, Network, Params, Patterns, Weights
from ecjax.graph.ignored import ignored_in
from ecjax.graph.taps import tap_dtype
from ecjax.score.scores import Scores, checked, least, of_each_weight


def elimination_compensation_by_definition(
    network: Network,
    params: Params,
    inputs: Inputs,
    *,
    metric: Metric = "euclidean",
    weights: Weights | None = None,
    weights_at_once: int = 64,
    exclude: Patterns = (),
) -> Scores:
    """Elimination-compensation from the discrepancy itself, one weight at a time under ``vmap``.

    The discrepancy ``δy(Δb) = ∂y/∂W · W − ∂y/∂b · Δb`` is one ``jax.jvp`` of the network along (the weight, minus the
    shift of its bias); ``E[δyᵀ M δy]`` is a parabola in Δb, so one Newton step with ``jax.grad`` finds

        Δb* = argmin_Δb E[δyᵀ M δy]        I = E[δy(Δb*)ᵀ M δy(Δb*)]

    Source: Ballini et al., arXiv:2602.20467. Kernels may be applied at many positions, convolved with or scanned over,
    as long as they enter one product. It costs a forward pass for every weight: for dense layers
    ``elimination_compensation`` gives the same numbers from two gradient passes.

    Args:
        params: of the network; nothing moves for a kernel without a bias.
        inputs: calibration inputs, all held in memory at once.
        weights_at_once: how many weights one ``vmap`` takes; it bounds the memory.

    Returns:
        Scores, as ``elimination_compensation``.

    Raises:
        ValueError: bad inputs, an unknown metric, a network that mixes samples, a kernel that enters several products,
            or importances that overflow.

    Example:
        >>> found = score.elimination_compensation_by_definition(network, params, inputs, metric="fisher").importance
        >>> bool(jnp.allclose(found["Dense_0"]["kernel"], scores.importance["Dense_0"]["kernel"], rtol=1e-3, atol=1e-6))
        True
    """
    options = {"exclude": exclude, "metric": metric, "weights": weights, "need": "weights"}
    at = _door.enter(network, params, inputs, **options, weights_at_once=weights_at_once)
    given = at.params, at.inputs, at.weights, at.metric
    return checked(_all_weights(at.network, at.layers, int(weights_at_once), *given))


@_precision.compiled("network", "layers", "weights_at_once")
def _all_weights(network, layers, weights_at_once, params, inputs, weights, metric) -> Scores:
    outputs, ignored = network(params, inputs), ignored_in(network, layers, params, inputs, metric.factor)

    def one_weight(layer, index):
        options = {"metric": metric, "weights": weights, "ignored": ignored.get(layer.kernel)}
        return _importance_and_shift(network, params, inputs, outputs, layer, index, **options)

    return of_each_weight(params, layers, one_weight, weights_at_once=weights_at_once)


def _importance_and_shift(network, params, inputs, outputs, layer, index, *, metric, weights, ignored):
    """``I`` and ``Δb*`` of the weight at a flat index of a kernel as matrices."""
    leaves = _trees.by_path(params)
    kernel = leaves[layer.kernel]
    member, source, neuron = jnp.unravel_index(index, layer.layout.sizes)
    weight = graph.as_matrices(kernel, layer.layout)[member, source, neuron]
    removed = jnp.zeros(layer.layout.sizes, kernel.dtype).at[member, source, neuron].set(weight)
    removed = graph.as_leaf(removed, layer.layout)
    zero = jnp.zeros((), tap_dtype(kernel))

    def change(moved, by):
        paths = list(moved)

        def with_leaves(*moving):
            return network(_trees.replace(params, dict(zip(paths, moving, strict=True))), inputs)

        _, discrepancy = jax.jvp(with_leaves, tuple(leaves[path] for path in paths), tuple(by))
        return metrics.squared_norm(metric, outputs, discrepancy, weights).mean()

    if layer.bias is None:
        return change([layer.kernel], [removed]).astype(zero.dtype), zero
    bias = leaves[layer.bias]

    def remainder(shift):
        if ignored is not None:
            shift = jnp.where(ignored[member, neuron], 0, shift)
        moved = jnp.zeros(layer.bias_layout.sizes, bias.dtype).at[member, 0, neuron].set(-shift.astype(bias.dtype))
        moved = graph.as_leaf(moved, layer.bias_layout)
        return change([layer.kernel, layer.bias], [removed, moved])

    return least(remainder, zero)
