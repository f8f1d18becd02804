"""What each layer saw: the moments of its inputs, weighted by how sensitive the outputs are to its neurons.

With ``g_ki = ∂y_k/∂z_i`` at pre-activation ``z_i`` and the sensitivity ``S_i = Σ_k g_ki²`` of each sample (``gᵀ M g``
for another output metric M), a layer with inputs ``a`` is described by ``Σ S_i``, by the S-weighted mean of each
``a_j`` and by its S-weighted sum of squared deviations. Elimination-compensation and optimal brain damage are read off
these.

Moments are additive: ``start``, ``update`` with one batch after another, on one machine or on several, and ``merge``;
``score.elimination_compensation_from_moments`` reads the scores off them. They are plain pytrees, to be saved and gone
on with. ``of_batches`` does so for an iterator, ``of_inputs`` for one array.

They cost one forward pass and K backward passes to the pre-activations, then two matrix products a layer; no gradient
with respect to a weight is formed for any sample.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Num, PRNGKeyArray

from ecjax import batches, capture, checks, devices, metrics, networks, precision
from ecjax.networks import Inputs, Network, Params

# Backward passes per loop iteration: enough to fuse their sums, few enough to compile fast when K is 1,000.
_UNROLLED_ROWS = 10


class LayerMoments(NamedTuple):
    """Sensitivity-weighted moments of one dense layer's inputs ``a``, for each input j and neuron i.

    Attributes:
        sensitivity: ``Σ_n S_ni``, summed over samples.
        mean: ``Σ_n S_ni a_nj / Σ_n S_ni``; 0 where the sensitivity is 0.
        scatter: ``Σ_n S_ni (a_nj − mean_ij)²``.

    Example:
        >>> layer = moments.of_inputs(network, params, inputs, metric="fisher").layers["Dense_0/kernel"]
        >>> layer.sensitivity.shape, layer.mean.shape, layer.scatter.shape
        ((8,), (4, 8), (4, 8))
    """

    sensitivity: Float[Array, " out"]
    mean: Float[Array, "in out"]
    scatter: Float[Array, "in out"]


class InputMoments(NamedTuple):
    """Moments of one dense layer's inputs ``a``, weighted by ``T_j = Σ_k (∂y_k/∂a_j)²`` through this layer.

    Attributes:
        sensitivity: ``Σ_n T_nj``, summed over samples.
        mean: ``Σ_n T_nj a_nj / Σ_n T_nj``; 0 where the sensitivity is 0.
        scatter: ``Σ_n T_nj (a_nj − mean_j)²``.

    Example:
        >>> seen = moments.of_inputs(network, params, inputs, metric="fisher", of_weights=False)
        >>> layer = seen.layers["Dense_1/kernel"]
        >>> layer.sensitivity.shape, layer.mean.shape, layer.scatter.shape
        ((8,), (8,), (8,))
    """

    sensitivity: Float[Array, " in"]
    mean: Float[Array, " in"]
    scatter: Float[Array, " in"]


class Moments(NamedTuple):
    """The moments of every dense layer, by its kernel's path, and how many samples they are of.

    Example:
        >>> seen = moments.of_inputs(network, params, inputs, metric="fisher")
        >>> float(seen.samples), sorted(seen.layers)
        (200.0, ['Dense_0/kernel', 'Dense_1/kernel'])
    """

    samples: Float[Array, ""]
    layers: dict[str, LayerMoments] | dict[str, InputMoments]


def start(params: Params, *, of_weights: bool = True) -> Moments:
    """The moments of no samples: what ``update`` and ``merge`` start from. At least float32, whatever the params are.

    Args:
        params: of the network; the moments lie on devices as the kernels do.
        of_weights: for each weight (``LayerMoments``), or for each input of a layer (``InputMoments``); the latter of
            an MLP, without the first layer, whose inputs are no neurons.

    Example:
        >>> nothing = moments.start(params)
        >>> float(nothing.samples), nothing.layers["Dense_0/kernel"].mean.shape
        (0.0, (4, 8))
    """

    def zeros(kernel):
        dtype = capture.tap_dtype(kernel)
        if not of_weights:
            return InputMoments(*(jnp.zeros(kernel.shape[:1], dtype) for _ in InputMoments._fields))
        return LayerMoments(
            sensitivity=jnp.zeros(kernel.shape[-1:], dtype),
            mean=jnp.zeros_like(kernel, dtype),
            scatter=jnp.zeros_like(kernel, dtype),
        )

    kernels = networks.by_path(networks.kernels(params)) if of_weights else _reading_neurons(params)
    return Moments(jnp.zeros(()), {path: zeros(kernel) for path, kernel in kernels.items()})


def _reading_neurons(params: Params) -> dict[str, Array]:
    """The kernels of an MLP that read hidden neurons: all but the first."""
    leaves = networks.by_path(params)
    return {path: leaves[path] for path in networks.layers(params)[1:]}


def merge(first: Moments, second: Moments) -> Moments:
    """The moments of two disjoint sets of samples together, by the parallel formula of Chan, Golub and LeVeque (1983).

    With weights ``w`` and means ``m``: ``m = m₁ + (m₂ − m₁) w₂/w`` and the scatters add up with
    ``(m₂ − m₁)² w₁ w₂/w``. No difference of large numbers is taken.

    Args:
        first: moments of some samples.
        second: moments of others, of the same network and metric.

    Example:
        >>> seen = moments.of_inputs(network, params, inputs, metric="fisher")
        >>> twice = jax.jit(moments.merge)(seen, seen)
        >>> once, both = seen.layers["Dense_0/kernel"], twice.layers["Dense_0/kernel"]
        >>> float(twice.samples), bool(jnp.allclose(both.scatter, 2 * once.scatter))
        (400.0, True)
    """
    layers = {path: _merge_layer(layer, second.layers[path]) for path, layer in first.layers.items()}
    return Moments(first.samples + second.samples, layers)


def _merge_layer(first: LayerMoments | InputMoments, second) -> LayerMoments | InputMoments:
    total = first.sensitivity + second.sensitivity
    share = _divide(second.sensitivity, total)
    gap = second.mean - first.mean
    return type(first)(
        sensitivity=total,
        mean=first.mean + gap * share,
        scatter=first.scatter + second.scatter + gap**2 * (first.sensitivity * share),
    )


def of_batch(
    network: Network,
    params: Params,
    inputs: Inputs,
    counted: Bool[Array, " samples"],
    *,
    metric: str,
    probes: int | None,
    key: PRNGKeyArray | None,
    biased: bool,
    of_weights: bool = True,
) -> Moments:
    """The moments of one batch.

    Args:
        network: pure function ``(params, inputs) -> outputs``.
        params: its parameters.
        inputs: one batch of samples.
        counted: which samples of the batch count; the others weigh nothing.
        metric: "euclidean" or "fisher".
        probes: number of random combinations of the metric's rows, or None for all K rows.
        key: for the probes.
        biased: whether every kernel must have an adjacent bias.
        of_weights: for each weight, or for each input of a layer.

    Example:
        >>> options = {"metric": "fisher", "probes": None, "key": None, "biased": True}
        >>> of_batch = jax.jit(lambda counted: moments.of_batch(network, params, inputs, counted, **options))
        >>> float(of_batch(jnp.arange(200) < 150).samples)
        150.0
    """
    outputs, backward, layer_inputs = jax.vjp(
        lambda taps: capture.tapped(network, params, inputs, taps, biased=biased),
        capture.zero_taps(params, inputs.shape[0]),
        has_aux=True,
    )
    kernels = None if of_weights else _reading_neurons(params)
    sensitivities = _sensitivities(outputs, backward, kernels, metric=metric, probes=probes, key=key)
    of_layer = _layer_moments if of_weights else _input_moments
    layers = {path: of_layer(layer_inputs[path], s, counted) for path, s in sensitivities.items()}
    return Moments(counted.sum(dtype=jnp.zeros(()).dtype), layers)


def _sensitivities(outputs, backward, kernels, *, metric, probes, key) -> dict[str, Float[Array, "samples _"]]:
    """``S_ni = Σ_k g_nki²`` of every layer, one backward pass a row of the metric, or a probe.

    With kernels, ``T_nj = Σ_k (Σ_i g_nki W_ji)²`` instead: the sensitivity to the layer's inputs.
    """
    count = outputs.shape[-1]
    combine = metrics.transposed_factor(metric, outputs)

    def row(index):
        return jnp.broadcast_to(jax.nn.one_hot(index, count, dtype=outputs.dtype), outputs.shape)

    def probe(index):
        return jax.random.rademacher(jax.random.fold_in(key, index), outputs.shape, outputs.dtype)

    def slopes(cotangents):
        (gradients,) = backward(cotangents)
        if kernels is None:
            return gradients
        return {path: gradients[path] @ kernel.T for path, kernel in kernels.items()}

    def add_squares(total, index):
        coefficients = row(index) if probes is None else probe(index)
        gradients = slopes(combine(coefficients))
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
    offset = _divide(first, total)
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
    mean = centre + _divide(((raw - centre) * weights).sum(0), total)
    return InputMoments(
        sensitivity=total, mean=jnp.where(total > 0, mean, 0), scatter=((raw - mean) ** 2 * weights).sum(0)
    )


def _divide(numerator: Array, denominator: Array) -> Array:
    """The quotient, and 0 where the denominator is 0."""
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0)


def of_inputs(
    network: Network,
    params: Params,
    inputs: Inputs,
    *,
    metric: str = "euclidean",
    probes: int | None = None,
    key: PRNGKeyArray | None = None,
    batch_size: int = 1024,
    biased: bool = True,
    of_weights: bool = True,
) -> Moments:
    """The moments of all samples, batch after batch inside one compiled call.

    Args:
        network: pure function ``(params, inputs) -> outputs``; compiled once for each.
        params: its parameters.
        inputs: calibration inputs, samples along the first axis; on one device, or spread evenly over several
            (``devices``): each then works on its own samples.
        metric: "euclidean" for ``Σ_k g_k²`` on raw outputs, "fisher" for the softmax Fisher of logits.
        probes: None for all K rows of the metric, or how many random ±1 combinations of them to draw for each sample
            (Hutchinson's estimator: the sensitivities stay unbiased).
        key: random key, needed with ``probes``.
        batch_size: samples at a time, on each device; it bounds the memory.
        biased: whether every kernel must have an adjacent bias.
        of_weights: for each weight (``LayerMoments``), or for each input of a layer (``InputMoments``).

    Raises:
        ValueError: no inputs, inputs that hold NaN or infinity, an unknown metric, probes without a key, or a network
            whose dense layers can't be found (see ``capture.tapped``).

    Example:
        >>> seen = moments.of_inputs(network, params, inputs, metric="fisher")
        >>> importance = params["Dense_0"]["kernel"] ** 2 * seen.layers["Dense_0/kernel"].scatter / seen.samples
        >>> bool(jnp.allclose(importance, scores.importance["Dense_0"]["kernel"]))
        True
    """
    _require(inputs, metric, probes, key, batch_size)
    options = {"metric": metric, "probes": probes, "biased": biased, "batch_size": int(batch_size)}
    inputs, nothing = devices.automatic(inputs), start(params, of_weights=of_weights)
    return _scan(nothing, network, params, inputs, None, key, blocks=batches.blocks(inputs), **options)


def update(
    seen: Moments,
    network: Network,
    params: Params,
    inputs: Inputs,
    *,
    metric: str = "euclidean",
    probes: int | None = None,
    key: PRNGKeyArray | None = None,
    batch_size: int = 1024,
    biased: bool = True,
) -> Moments:
    """The moments of the samples seen so far and of these together.

    Samples on one device are filled up to a usual number, so that parts of many sizes share a few compiled functions.

    Args:
        seen: of ``start``, or of earlier samples with the same params and metric.
        network: pure function ``(params, inputs) -> outputs``.
        params: its parameters.
        inputs: more calibration inputs, as many as there are.
        metric: "euclidean" or "fisher".
        probes: None, or how many random combinations of the K rows of the metric.
        key: random key, needed with ``probes``; may be the same each time, as the number of samples seen enters what is
            drawn. Machines whose moments are to be merged need one each.
        batch_size: samples at a time, on each device.
        biased: whether every kernel must have an adjacent bias.

    Raises:
        ValueError: as ``of_inputs``, or moments of a network with other layers.

    Example:
        >>> seen = moments.update(moments.start(params), network, params, inputs[:150])
        >>> seen = moments.update(seen, network, params, inputs[150:])
        >>> float(seen.samples)
        200.0
    """
    _require(inputs, metric, probes, key, batch_size)
    require_layers(params, seen, of_weights=_of_weights(seen))
    options = {"metric": metric, "probes": probes, "biased": biased, "batch_size": int(batch_size)}
    inputs = devices.automatic(inputs)
    blocks, samples = batches.blocks(inputs), None
    if blocks == 1:
        samples, inputs = jnp.int32(inputs.shape[0]), batches.filled_up(inputs, int(batch_size))
    return _scan(seen, network, params, inputs, samples, key, blocks=blocks, **options)


def of_batches(
    network: Network,
    params: Params,
    batches: Iterable[Num[Array | np.ndarray, "..."]],
    *,
    of_weights: bool = True,
    **options: Any,
) -> Moments:
    """The moments of all samples of an iterator, a generator or a list of batches; of one batch in memory at a time.

    Args:
        network: pure function ``(params, inputs) -> outputs``.
        params: its parameters.
        batches: NumPy or JAX arrays of any numbers of samples, such as
            ``(batch["image"] for batch in loader)``.
        of_weights: for each weight, or for each input of a layer.
        **options: of ``update``.

    Raises:
        ValueError: as ``update``, or not a single batch.

    Example:
        >>> seen = moments.of_batches(network, params, np.split(inputs, 4), metric="fisher")
        >>> streamed = score.elimination_compensation_from_moments(params, seen)
        >>> bool(jnp.allclose(streamed.importance["Dense_0"]["kernel"], scores.importance["Dense_0"]["kernel"]))
        True
    """
    seen = start(params, of_weights=of_weights)
    for batch in batches:
        seen = update(seen, network, params, batch, **options)
    require_samples(seen)
    return seen


def require_layers(params: Params, seen: Moments, *, of_weights: bool) -> None:
    """Raises a ValueError unless the moments are of these layers, for each weight or for each input.

    Args:
        params: of the network.
        seen: the moments.
        of_weights: whether they must be of weights, or of layers' inputs.

    Example:
        >>> moments.require_layers(params, moments.start(params), of_weights=True)
    """
    fields = LayerMoments._fields if of_weights else InputMoments._fields
    expected = jax.eval_shape(functools.partial(start, of_weights=of_weights), params).layers
    wanted, found = (
        {path: tuple(leaf.shape for leaf in layer) for path, layer in layers.items()}
        for layers in (expected, seen.layers)
    )
    if found != wanted:
        raise ValueError(
            f"moments of other layers: {', '.join(fields)} of shapes {found or 'none'} given, "
            f"{wanted} in a network of these params"
        )


def require_samples(seen: Moments) -> None:
    """Raises a ValueError if the moments are known to be of no samples.

    Example:
        >>> moments.require_samples(moments.start(params))
        Traceback (most recent call last):
            ...
        ValueError: these moments are of no samples; update them with a batch of inputs first
    """
    if not isinstance(seen.samples, jax.core.Tracer) and seen.samples == 0:
        raise ValueError("these moments are of no samples; update them with a batch of inputs first")


def _require(inputs, metric: str, probes: int | None, key: PRNGKeyArray | None, batch_size: int) -> None:
    checks.require_inputs(inputs)
    metrics.require(metric)
    checks.require_positive(batch_size, "batch_size")
    if probes is not None:
        checks.require_positive(probes, "probes")
        if key is None:
            raise ValueError(f"probes={probes} draws random signs: give it a key, such as jax.random.key(0)")


def _of_weights(seen: Moments) -> bool:
    return all(isinstance(layer, LayerMoments) for layer in seen.layers.values())


@functools.partial(jax.jit, static_argnames=("network", "metric", "probes", "batch_size", "blocks", "biased"))
@precision.in_full
def _scan(seen, network, params, inputs, samples, key, *, batch_size, blocks, **options) -> Moments:
    """Adds batch after batch; where ``samples`` are given, only so many of the inputs count."""
    key = jax.random.key(0) if key is None else key  # without probes nothing is drawn

    def add(total, index):
        batch, counted = batches.take(inputs, index, batch_size, blocks)
        if samples is not None:
            counted &= index * counted.size + jnp.arange(counted.size) < samples
        drawn = jax.random.fold_in(key, total.samples.astype(jnp.uint32))
        of_these = of_batch(network, params, batch, counted, key=drawn, of_weights=_of_weights(seen), **options)
        return merge(total, of_these), None

    total, _ = lax.scan(add, seen, jnp.arange(batches.count(inputs.shape[0], batch_size, blocks)))
    return total
