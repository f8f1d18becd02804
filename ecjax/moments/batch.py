"""The moments of one batch, inside a compiled function."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, PRNGKeyArray

from ecjax import _trees, graph
from ecjax._batches import Placement
from ecjax._types import Inputs, Network, Params
from ecjax.graph import Layer, Layers
from ecjax.graph.values import Product
from ecjax.metrics import row_of, scale_of
from ecjax.moments.additive import InputMoments, LayerMoments, Moments, divide, merge_layer, nothing_of
from ecjax.moments.gradients import of_samples
from ecjax.moments.products import of_one_row, with_moments

# Backward passes per loop iteration: enough to fuse their sums, few enough to compile fast when K is 1,000.
_UNROLLED_ROWS = 10


def of_batch(
    seen: Moments,
    network: Network,
    params: Params,
    inputs: Inputs,
    counted: Bool[Array, " samples"],
    key: PRNGKeyArray,
    weights: Float[Array, "samples ..."] | None,
    ignored: dict[str, Bool[Array, "stack out"]],
    placement: Placement = Placement(),  # noqa: B008 a NamedTuple
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
        placement: how the samples lie on devices.
    """
    samples = counted.sum(dtype=jnp.zeros(()).dtype)
    inputs = graph.at_least_two(inputs)
    more = len(inputs) - len(counted)
    counted = jnp.pad(counted, (0, more))
    weights = None if weights is None else jnp.pad(weights, ((0, more), *((0, 0),) * (weights.ndim - 1)))
    several = tuple(layer for layer in seen.read if not (layer.outer or layer.once))
    layers = {}
    if len(several) < len(seen.read):
        layers = _in_one_pass(seen, network, params, inputs, counted, key, weights, ignored, placement)
    if several:
        each = jnp.ones(len(counted), samples.dtype) if weights is None else weights.astype(samples.dtype)
        each = jnp.where(counted.reshape(-1, *(1,) * (each.ndim - 1)), each, 0)
        taken = {"ignored": ignored, "metric": seen.metric, "probes": seen.probes, "key": key}
        layers |= of_samples(network, several, params, inputs, each, **taken)
    return dataclasses.replace(seen, samples=samples, layers=layers)


def _in_one_pass(
    seen, network, params, inputs, counted, key, weights, ignored, placement
) -> dict[str, LayerMoments | InputMoments]:
    """The moments of all layers that are used once, from one batched backward pass for each row of the metric."""
    reading = graph.read(network, params, inputs, exclude=seen.exclude)
    leaves = _trees.by_path(params)
    once = [layer for layer in reading.layers if layer.once and not layer.outer and seen.of_weights]
    like = {layer.kernel: seen.layers.get(layer.kernel) or nothing_of(layer, leaves[layer.kernel]) for layer in once}
    # What the moments of the batch are the cotangents of; zeros would take as much memory again.
    held = {layer.kernel: _by_turns(layer, reading.products[layer.kernel][0], like[layer.kernel]) for layer in once}
    moves = {layer.kernel: _moves(layer, ignored).reshape(held[layer.kernel].sensitivity.shape) for layer in once}

    def outputs_of(taps, held):
        taken = functools.partial(with_moments, placement=placement)
        products = {path: (taken, (of_layer, moves[path])) for path, of_layer in held.items()}
        return graph.tapped(reading, params, inputs, taps, products)

    taps = graph.zero_taps(reading.layers, params, inputs.shape[0])
    outputs, backward, layer_inputs = jax.vjp(outputs_of, taps, held, has_aux=True)
    kernels = None if seen.of_weights else _reading_neurons(reading.layers, params)
    taken = {"metric": seen.metric, "probes": seen.probes, "key": key}
    scale = None if weights is None else scale_of(weights, outputs)
    if held:  # a sample that does not count gives no slopes; where there are only taps, it is left out afterwards
        each = counted.reshape(-1, *(1,) * (outputs.ndim - 1)).astype(outputs.dtype)
        scale = each if scale is None else scale * each
    sensitivities, found = _over_rows(outputs, backward, kernels, scale, **taken)
    of_layer = _outer_moments if seen.of_weights else _input_moments
    layers = {path: of_layer(layer_inputs[path], s, counted) for path, s in sensitivities.items()}
    return layers | {
        path: jax.tree.map(lambda leaf, shaped: leaf.reshape(shaped.shape), found[path], like[path]) for path in found
    }


def _by_turns(layer: Layer, product: Product, found: LayerMoments) -> LayerMoments:
    """Moments with an axis for each scan that a product is in, and then those of its own matrices."""
    stack, inputs, neurons = layer.layout.sizes
    shape = (*product.turns, stack // math.prod(product.turns))
    return LayerMoments(
        sensitivity=found.sensitivity.reshape(*shape, neurons),
        mean=found.mean.reshape(*shape, inputs, neurons),
        scatter=found.scatter.reshape(*shape, inputs, neurons),
    )


def _moves(layer: Layer, ignored: dict[str, Array]) -> Bool[Array, "stack out"]:
    """Which neurons have a bias that makes a difference."""
    stack, _, neurons = layer.layout.sizes
    if layer.bias is None:
        return jnp.zeros((stack, neurons), bool)
    return ~ignored[layer.kernel] if layer.kernel in ignored else jnp.ones((stack, neurons), bool)


def _reading_neurons(layers: Layers, params: Params) -> dict[str, Float[Array, "in out"]]:
    """The kernels of a multilayer perceptron that read hidden neurons, as matrices: all but the first."""
    leaves = _trees.by_path(params)
    return {layer.kernel: graph.as_matrices(leaves[layer.kernel], layer.layout)[0] for layer in graph.chain(layers)[1:]}


def _over_rows(
    outputs, backward, kernels, scale, *, metric, probes, key
) -> tuple[dict[str, Float[Array, "samples _"]], dict[str, LayerMoments]]:
    """``S_ni = Σ_k g_nki²`` of every tap, and the moments that products give, one backward pass a row or a probe.

    With kernels, ``T_nj = Σ_k (Σ_i g_nki W_ji)²`` instead: the sensitivity to the layer's inputs.
    """

    def slopes(cotangents):
        gradients, found = backward(cotangents)
        if kernels is None:
            return gradients, found
        return {path: gradients[path] @ kernel.T for path, kernel in kernels.items()}, found

    def coefficients(index):
        chosen = row_of(outputs, index, probes, key)
        return chosen if scale is None else chosen * scale

    def add(total, index):
        gradients, found = slopes(metric.factor(outputs, coefficients(index)).astype(outputs.dtype))
        squares = jax.tree.map(lambda s, g: s + g**2, total[0], gradients)
        return (squares, {path: merge_layer(total[1][path], moments) for path, moments in found.items()}), None

    passes = math.prod(outputs.shape[1:]) if probes is None else probes
    shapes = jax.eval_shape(slopes, outputs)
    if passes == 1 and shapes[1]:  # nothing to add up
        gradients, found = slopes(metric.factor(outputs, coefficients(0)).astype(outputs.dtype))
        return jax.tree.map(jnp.square, gradients), found
    start, at_once = jax.tree.map(jnp.zeros_like, shapes), 1 if shapes[1] else _UNROLLED_ROWS
    (sensitivities, found), _ = lax.scan(add, start, jnp.arange(passes), unroll=min(passes, at_once) or 1)
    if probes is None:
        return sensitivities, found
    sums = {path: LayerMoments(m.sensitivity / probes, m.mean, m.scatter / probes) for path, m in found.items()}
    return jax.tree.map(lambda s: s / probes, sensitivities), sums


def _outer_moments(layer_inputs: Array, sensitivities: Array, counted: Array) -> LayerMoments:
    return of_one_row(layer_inputs, jnp.where(counted[:, None], sensitivities, 0))


def _input_moments(layer_inputs: Array, sensitivities: Array, counted: Array) -> InputMoments:
    """The same of one layer's inputs alone: each with its own sensitivity, entry by entry."""
    weights = jnp.where(counted[:, None], sensitivities, 0)
    raw = layer_inputs.astype(weights.dtype)
    total = weights.sum(0)
    centre = divide((raw * weights).sum(0), total)
    mean = centre + divide(((raw - centre) * weights).sum(0), total)
    return InputMoments(
        sensitivity=total, mean=jnp.where(total > 0, mean, 0), scatter=((raw - mean) ** 2 * weights).sum(0)
    )
