"""Elimination-compensation by its literal definition: the reference, and for any differentiable network."""

import functools

import jax
import jax.numpy as jnp

from ecjax import capture, checks, devices, metrics, networks, precision
from ecjax.networks import Inputs, Network, Params
from ecjax.score.scores import Scores, checked, least, of_each_weight


def elimination_compensation_by_definition(
    network: Network, params: Params, inputs: Inputs, *, metric: str = "euclidean", weights_at_once: int = 64
) -> Scores:
    """Elimination-compensation from the discrepancy itself, one weight at a time under ``vmap``.

    The discrepancy ``δy(Δb) = ∂y/∂W · W − ∂y/∂b · Δb`` is one ``jax.jvp`` of the network along (the weight, minus the
    shift of its bias); ``E[δyᵀ M δy]`` is a parabola in Δb, so one Newton step with ``jax.grad`` finds

        Δb* = argmin_Δb E[δyᵀ M δy]        I = E[δy(Δb*)ᵀ M δy(Δb*)]

    Source: Ballini et al., arXiv:2602.20467. Kernels may be of any rank, shared, scanned over or convolved with,
    as long as the last axis is the neuron and a sibling bias of shape ``(out,)`` is its own. It costs a forward pass
    for every weight: for dense layers ``elimination_compensation`` gives the same numbers from two gradient passes.

    Args:
        network: differentiable pure function ``(params, inputs) -> outputs`` of shape (samples, K).
        params: its parameters; every kernel has a sibling bias.
        inputs: calibration inputs, samples along the first axis.
        metric: "euclidean" or "fisher".
        weights_at_once: how many weights one ``vmap`` takes; it bounds the memory.

    Returns:
        Scores, as ``elimination_compensation``.

    Raises:
        ValueError: bad inputs, an unknown metric, a kernel without a sibling bias, or importances that overflow.

    Example:
        >>> found = score.elimination_compensation_by_definition(network, params, inputs, metric="fisher").importance
        >>> bool(jnp.allclose(found["Dense_0"]["kernel"], scores.importance["Dense_0"]["kernel"], rtol=1e-3, atol=1e-6))
        True
    """
    checks.require_inputs(inputs)
    metrics.require(metric)
    checks.require_positive(weights_at_once, "weights_at_once")
    checks.require_biases(params)
    inputs = devices.automatic(inputs)
    return checked(_all_weights(network, params, inputs, metric=metric, weights_at_once=int(weights_at_once)))


@functools.partial(jax.jit, static_argnames=("network", "metric", "weights_at_once"))
@precision.in_full
def _all_weights(network, params, inputs, *, metric, weights_at_once) -> Scores:
    outputs = network(params, inputs)
    checks.require_outputs(jax.eval_shape(lambda: outputs), inputs.shape[0])

    def one_weight(path, index):
        return _importance_and_shift(network, params, inputs, outputs, path, index, metric=metric)

    return of_each_weight(params, one_weight, weights_at_once=weights_at_once)


def _importance_and_shift(network, params, inputs, outputs, path, index, *, metric):
    """``I`` and ``Δb*`` of the weight at a flat index of the kernel at ``path``."""
    leaves = networks.by_path(params)
    kernel, bias = leaves[path], leaves[networks.bias_path(path)]
    here = jnp.unravel_index(index, kernel.shape)
    removed = jnp.zeros_like(kernel).at[here].set(kernel[here])
    neuron = here[-1]

    def layer(kernel, bias):
        return network(networks.replace(params, {path: kernel, networks.bias_path(path): bias}), inputs)

    def remainder(shift):
        moved = jnp.zeros_like(bias).at[neuron].set(-shift.astype(bias.dtype))
        _, discrepancy = jax.jvp(layer, (kernel, bias), (removed, moved))
        return metrics.squared_norm(metric, outputs, discrepancy).mean()

    return least(remainder, jnp.zeros((), capture.tap_dtype(kernel)))
