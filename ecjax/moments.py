"""What each layer saw: the moments of its inputs, weighted by how sensitive the outputs are to its neurons.

With ``g_ki = ∂y_k/∂z_i`` at pre-activation ``z_i`` and the sensitivity ``S_i = Σ_k g_ki²`` of each sample (``gᵀ M g``
for another output metric M), a layer with inputs ``a`` is described by ``Σ S_i``, by the S-weighted mean of each
``a_j`` and by its S-weighted sum of squared deviations. Elimination-compensation and optimal brain damage are read off
these.

They cost one forward pass and K backward passes to the pre-activations, then two matrix products a layer; no gradient
with respect to a weight is formed for any sample.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, PRNGKeyArray

from ecjax import capture, checks, metrics, networks
from ecjax.networks import Inputs, Network, Params

# Backward passes per loop iteration: enough to fuse their sums, few enough to compile fast when K is 1,000.
_UNROLLED_ROWS = 10


class LayerMoments(NamedTuple):
    """Sensitivity-weighted moments of one dense layer's inputs ``a``, for each input j and neuron i.

    Attributes:
        sensitivity: ``Σ_n S_ni``, summed over samples.
        mean: ``Σ_n S_ni a_nj / Σ_n S_ni``; 0 where the sensitivity is 0.
        scatter: ``Σ_n S_ni (a_nj − mean_ij)²``.
    """

    sensitivity: Float[Array, " out"]
    mean: Float[Array, "in out"]
    scatter: Float[Array, "in out"]


class Moments(NamedTuple):
    """The moments of every dense layer, by its kernel's path, and how many samples they are of."""

    samples: Float[Array, ""]
    layers: dict[str, LayerMoments]


def empty(params: Params) -> Moments:
    """The moments of no samples: what merging starts from. At least float32, whatever the params are."""

    def zeros(kernel):
        dtype = capture.tap_dtype(kernel)
        return LayerMoments(
            sensitivity=jnp.zeros(kernel.shape[-1:], dtype),
            mean=jnp.zeros(kernel.shape, dtype),
            scatter=jnp.zeros(kernel.shape, dtype),
        )

    layers = {path: zeros(kernel) for path, kernel in networks.by_path(networks.kernels(params)).items()}
    return Moments(jnp.zeros(()), layers)


def merge(first: Moments, second: Moments) -> Moments:
    """The moments of two disjoint sets of samples together, by the parallel formula of Chan, Golub and LeVeque (1983).

    With weights ``w`` and means ``m``: ``m = m₁ + (m₂ − m₁) w₂/w`` and the scatters add up with
    ``(m₂ − m₁)² w₁ w₂/w``. No difference of large numbers is taken.
    """
    layers = {path: _merge_layer(layer, second.layers[path]) for path, layer in first.layers.items()}
    return Moments(first.samples + second.samples, layers)


def _merge_layer(first: LayerMoments, second: LayerMoments) -> LayerMoments:
    total = first.sensitivity + second.sensitivity
    share = _divide(second.sensitivity, total)
    gap = second.mean - first.mean
    return LayerMoments(
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
    """
    outputs, backward, layer_inputs = jax.vjp(
        lambda taps: capture.tapped(network, params, inputs, taps, biased=biased),
        capture.zero_taps(params, inputs.shape[0]),
        has_aux=True,
    )
    sensitivities = _sensitivities(outputs, backward, metric=metric, probes=probes, key=key)
    layers = {path: _layer_moments(layer_inputs[path], s, counted) for path, s in sensitivities.items()}
    return Moments(counted.sum(dtype=jnp.zeros(()).dtype), layers)


def _sensitivities(outputs, backward, *, metric, probes, key) -> dict[str, Float[Array, "samples out"]]:
    """``S_ni = Σ_k g_nki²`` of every layer, one backward pass a row of the metric, or a probe."""
    count = outputs.shape[-1]
    combine = metrics.transposed_factor(metric, outputs)

    def row(index):
        return jnp.broadcast_to(jax.nn.one_hot(index, count, dtype=outputs.dtype), outputs.shape)

    def probe(index):
        return jax.random.rademacher(jax.random.fold_in(key, index), outputs.shape, outputs.dtype)

    def add_squares(total, index):
        coefficients = row(index) if probes is None else probe(index)
        (gradients,) = backward(combine(coefficients))
        return jax.tree.map(lambda s, g: s + g**2, total, gradients), None

    passes = count if probes is None else probes
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(backward, outputs)[0])
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
    first = jnp.matmul(centred.T, weights, precision=lax.Precision.HIGHEST)
    second = jnp.matmul((centred**2).T, weights, precision=lax.Precision.HIGHEST)
    offset = _divide(first, total)
    return LayerMoments(
        sensitivity=total,
        mean=jnp.where(total > 0, centre[:, None] + offset, 0),
        scatter=jnp.maximum(second - offset * first, 0),
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
) -> Moments:
    """The moments of all samples, batch after batch inside one compiled call.

    Args:
        network: pure function ``(params, inputs) -> outputs``; compiled once for each.
        params: its parameters.
        inputs: calibration inputs, samples along the first axis.
        metric: "euclidean" for ``Σ_k g_k²`` on raw outputs, "fisher" for the softmax Fisher of logits.
        probes: None for all K rows of the metric, or how many random ±1 combinations of them to draw for each sample
            (Hutchinson's estimator: the sensitivities stay unbiased).
        key: random key, needed with ``probes``.
        batch_size: samples at a time; it bounds the memory.
        biased: whether every kernel must have an adjacent bias.

    Raises:
        ValueError: no inputs, inputs that hold NaN or infinity, an unknown metric, probes without a key, or a network
            whose dense layers can't be found (see ``capture.tapped``).
    """
    checks.require_inputs(inputs)
    metrics.require(metric)
    checks.require_positive(batch_size, "batch_size")
    if probes is not None:
        checks.require_positive(probes, "probes")
        if key is None:
            raise ValueError(f"probes={probes} draws random signs: give it a key, such as jax.random.key(0)")
    return _scan(network, params, inputs, key, metric=metric, probes=probes, batch_size=int(batch_size), biased=biased)


@functools.partial(jax.jit, static_argnames=("network", "metric", "probes", "batch_size", "biased"))
def _scan(network, params, inputs, key, *, metric, probes, batch_size, biased) -> Moments:
    samples = inputs.shape[0]
    size = min(batch_size, samples)
    key = jax.random.key(0) if key is None else key  # without probes nothing is drawn

    def add(total, index):
        # The last batch reaches back to be as long as the others; what was counted before weighs nothing.
        start = jnp.minimum(index * size, samples - size)
        counted = start + jnp.arange(size) >= index * size
        batch = lax.dynamic_slice_in_dim(inputs, start, size)
        options = {"metric": metric, "probes": probes, "key": jax.random.fold_in(key, index), "biased": biased}
        return merge(total, of_batch(network, params, batch, counted, **options)), None

    total, _ = lax.scan(add, empty(params), jnp.arange(-(-samples // size)))
    return total
