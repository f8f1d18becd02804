"""The moments of one batch, inside a compiled function."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, PRNGKeyArray

from ecjax import _trees, graph
from ecjax._types import Inputs, Network, Params
from ecjax.graph import Layers
from ecjax.metrics import scale_of
from ecjax.moments.additive import InputMoments, LayerMoments, Moments, divide
from ecjax.moments.gradients import in_blocks

# Backward passes per loop iteration: enough to fuse their sums, few enough to compile fast when K is 1,000.
_UNROLLED_ROWS = 10


def of_batch(
    seen: Moments,
    network: Network,
    params: Params,
    inputs: Inputs,
    counted: Bool[Array, " samples"],
    key: PRNGKeyArray,
    *,
    weights: Float[Array, "samples ..."] | None = None,
    ignored: dict[str, Bool[Array, "stack out"]],
    blocks: int = 1,
) -> Moments:
    """The moments of one batch, taken as ``seen`` says.

    Args:
        seen: earlier moments, or those of no samples.
        params: its parameters, of arrays alone.
        inputs: one batch of samples.
        counted: which samples of the batch count; the others weigh nothing.
        key: for the probes.
        weights: how much each sample, or each of its positions, counts; 1 if None.
        ignored: by the kernel's path, which neurons' biases the outputs ignore.
        blocks: how the samples lie on devices.
    """
    several = tuple(layer for layer in seen.read if not layer.outer)
    samples, layers = counted.sum(dtype=jnp.zeros(()).dtype), {}
    if several:
        each = jnp.ones(len(counted), samples.dtype) if weights is None else weights.astype(samples.dtype)
        each = jnp.where(counted.reshape(-1, *(1,) * (each.ndim - 1)), each, 0)
        options = {"ignored": ignored, "metric": seen.metric, "probes": seen.probes, "key": key}
        layers = in_blocks(blocks, network, several, params, inputs, each, **options)
    if len(several) < len(seen.read):
        layers |= _of_outer(seen, network, params, inputs, counted, key, weights)
    return dataclasses.replace(seen, samples=samples, layers=layers)


def _of_outer(seen, network, params, inputs, counted, key, weights) -> dict[str, LayerMoments | InputMoments]:
    """The moments of the layers that see one row of each sample, from one batched backward pass for each row."""
    inputs = graph.at_least_two(inputs)
    more = len(inputs) - len(counted)
    counted = jnp.pad(counted, (0, more))
    weights = None if weights is None else jnp.pad(weights, ((0, more), *((0, 0),) * (weights.ndim - 1)))
    reading = graph.read(network, params, inputs, exclude=seen.exclude)
    outputs, backward, layer_inputs = jax.vjp(
        lambda taps: graph.tapped(reading, params, inputs, taps),
        graph.zero_taps(reading.layers, params, inputs.shape[0]),
        has_aux=True,
    )
    kernels = None if seen.of_weights else _reading_neurons(reading.layers, params)
    taken = {"metric": seen.metric, "probes": seen.probes, "key": key}
    sensitivities = _sensitivities(outputs, backward, kernels, weights, **taken)
    of_layer = _layer_moments if seen.of_weights else _input_moments
    return {path: of_layer(layer_inputs[path], s, counted) for path, s in sensitivities.items()}


def _reading_neurons(layers: Layers, params: Params) -> dict[str, Float[Array, "in out"]]:
    """The kernels of a multilayer perceptron that read hidden neurons, as matrices: all but the first."""
    leaves = _trees.by_path(params)
    return {layer.kernel: graph.as_matrices(leaves[layer.kernel], layer.layout)[0] for layer in graph.chain(layers)[1:]}


def _sensitivities(outputs, backward, kernels, weights, *, metric, probes, key) -> dict[str, Float[Array, "samples _"]]:
    """``S_ni = Σ_k g_nki²`` of every layer, one backward pass a row of the metric, or a probe.

    With kernels, ``T_nj = Σ_k (Σ_i g_nki W_ji)²`` instead: the sensitivity to the layer's inputs.
    """
    count = math.prod(outputs.shape[1:])

    def row(index):
        of_one = jax.nn.one_hot(index, count, dtype=outputs.dtype).reshape(outputs.shape[1:])
        return jnp.broadcast_to(of_one, outputs.shape)

    def probe(index):
        return jax.random.rademacher(jax.random.fold_in(key, index), outputs.shape, outputs.dtype)

    def slopes(cotangents):
        (gradients,) = backward(cotangents)
        if kernels is None:
            return gradients
        return {path: gradients[path] @ kernel.T for path, kernel in kernels.items()}

    def add_squares(total, index):
        coefficients = row(index) if probes is None else probe(index)
        if weights is not None:
            coefficients *= scale_of(weights, outputs)
        gradients = slopes(metric.factor(outputs, coefficients).astype(outputs.dtype))
        return jax.tree.map(lambda s, g: s + g**2, total, gradients), None

    passes = count if probes is None else probes
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(slopes, outputs))
    total, _ = lax.scan(add_squares, zeros, jnp.arange(passes), unroll=min(passes, _UNROLLED_ROWS) or 1)
    return total if probes is None else jax.tree.map(lambda s: s / probes, total)


def _layer_moments(layer_inputs: Array, sensitivities: Array, counted: Array) -> LayerMoments:
    """The moments of one layer on one batch.

    A weighted variance does not change when ``a`` is shifted, and the difference of raw moments cancels least around
    the mean, so the batch is centred on its plain mean first. That the mean may be a little off does not matter.
    """
    weights = jnp.where(counted[:, None], sensitivities, 0)
    raw = layer_inputs.astype(weights.dtype)
    centre = raw.mean(0)
    centred = raw - centre
    total = weights.sum(0)
    first, second = centred.T @ weights, (centred**2).T @ weights
    offset = divide(first, total)
    return LayerMoments(
        sensitivity=total,
        mean=jnp.where(total > 0, centre[:, None] + offset, 0),
        scatter=jnp.maximum(second - offset * first, 0),
    )


def _input_moments(layer_inputs: Array, sensitivities: Array, counted: Array) -> InputMoments:
    """The same of one layer's inputs alone: each with its own sensitivity, entry by entry."""
    weights = jnp.where(counted[:, None], sensitivities, 0)
    raw = layer_inputs.astype(weights.dtype)
    total = weights.sum(0)
    centre = raw.mean(0)
    mean = centre + divide(((raw - centre) * weights).sum(0), total)
    return InputMoments(
        sensitivity=total, mean=jnp.where(total > 0, mean, 0), scatter=((raw - mean) ** 2 * weights).sum(0)
    )
