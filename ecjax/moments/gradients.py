"""The moments of kernels that see several rows of a sample, from the gradients of one sample at a time.

With A and B the gradients of one row of the metric's factor with respect to a kernel and its bias, summed over the
positions of a sample, every row of every sample is one more term of ``Σ B²``, ``Σ A B / Σ B²`` and ``Σ (A − mean B)²``,
which are kept up to date as in West, "Updating mean and variance estimates" (1979): no large numbers are subtracted.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, PRNGKeyArray

from ecjax import _trees, graph
from ecjax._types import Inputs, Network, Params
from ecjax.graph import Layer
from ecjax.metrics import Metric, row_of, scale_of
from ecjax.moments.additive import LayerMoments, nothing_of
from ecjax.moments.products import updated


def of_samples(
    network: Network,
    layers: tuple[Layer, ...],
    params: Params,
    inputs: Inputs,
    weights: Float[Array, "samples ..."],
    ignored: dict[str, Bool[Array, "stack out"]],
    metric: Metric,
    probes: int | None,
    key: PRNGKeyArray,
) -> dict[str, LayerMoments]:
    """The moments of some layers, of one batch.

    Args:
        layers: whose moments are taken.
        params: of arrays alone.
        weights: how much each sample, or each of its positions, counts.
        ignored: by the kernel's path, which neurons' biases the outputs ignore.
        metric: of the outputs.
        probes: how many random combinations of its rows; None for all rows.
        key: for the probes.
    """
    leaves = _trees.by_path(params)
    paths = {path for layer in layers for path in (layer.kernel, layer.bias) if path is not None}
    moving = {path: leaves[path] for path in leaves if path in paths}

    def of_sample(total, sample):
        x, weight, number = sample
        outputs, pull = jax.vjp(lambda moving: network(_trees.replace(params, moving), x[None]), moving)
        drawn = jax.random.fold_in(key, number)
        scale = scale_of(weight[None], outputs)
        rows = outputs.size if probes is None else probes

        def of_row(total, index):
            coefficients = row_of(outputs, index, probes, drawn) / jnp.sqrt(jnp.asarray(probes or 1, outputs.dtype))
            cotangents = metric.factor(outputs, coefficients * scale)
            (gradients,) = pull(cotangents.astype(outputs.dtype))
            return {layer.kernel: _with(total[layer.kernel], layer, gradients, ignored) for layer in layers}, None

        return lax.scan(of_row, total, jnp.arange(rows))[0], None

    zero = {layer.kernel: nothing_of(layer, leaves[layer.kernel]) for layer in layers}
    # Two samples a turn: what adds their gradients up goes over the moments once.
    return lax.scan(of_sample, zero, (inputs, weights, jnp.arange(inputs.shape[0])), unroll=2)[0]


def _with(seen: LayerMoments, layer: Layer, gradients: dict[str, Array], ignored: dict[str, Array]) -> LayerMoments:
    """The moments with one more row of one more sample."""
    slope = graph.as_matrices(gradients[layer.kernel].astype(seen.mean.dtype), layer.layout)
    slope = slope.reshape(seen.mean.shape)
    if layer.bias is None:
        return seen._replace(scatter=seen.scatter + slope**2)
    of_bias = graph.as_matrices(gradients[layer.bias].astype(seen.mean.dtype), layer.bias_layout)[:, 0]
    if layer.kernel in ignored:
        of_bias = jnp.where(ignored[layer.kernel], 0, of_bias)
    of_bias = of_bias.reshape(seen.sensitivity.shape)
    return updated(seen, slope, of_bias)
