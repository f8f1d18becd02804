"""The moments of many samples, batch after batch: of one array, or of batches that come one after another."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Num, PRNGKeyArray

from ecjax import _door, _trees, batches, checks, devices, metrics, precision
from ecjax.moments.additive import Moments, merge, start
from ecjax.moments.batch import of_batch
from ecjax.networks import Inputs, Network, Params, Patterns


def of_inputs(
    network: Network,
    params: Params,
    inputs: Inputs,
    *,
    metric: str = "euclidean",
    probes: int | None = None,
    key: PRNGKeyArray | None = None,
    batch_size: int = 1024,
    exclude: Patterns = (),
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
        exclude: patterns of paths that are left alone.
        of_weights: for each weight (``LayerMoments``), or for each input of a layer (``InputMoments``).

    Raises:
        ValueError: no inputs, inputs that hold NaN or infinity, an unknown metric, probes without a key, or a network
            that mixes samples or has a kernel that can't be scored, by name.

    Example:
        >>> seen = moments.of_inputs(network, params, inputs, metric="fisher")
        >>> importance = params["Dense_0"]["kernel"] ** 2 * seen.layers["Dense_0/kernel"].scatter / seen.samples
        >>> bool(jnp.allclose(importance, scores.importance["Dense_0"]["kernel"]))
        True
    """
    _require(inputs, metric, probes, key, batch_size)
    network, params, _ = _trees.split(network, params)
    seen, inputs = start(network, params, inputs, exclude=exclude, of_weights=of_weights), devices.automatic(inputs)
    options = {"metric": metric, "probes": probes, "batch_size": int(batch_size), "blocks": batches.blocks(inputs)}
    return _scan(seen, network, params, inputs, None, key, **options)


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

    Raises:
        ValueError: as ``of_inputs``, or moments of a network with other layers.

    Example:
        >>> seen = moments.update(moments.start(network, params, inputs), network, params, inputs[:150])
        >>> seen = moments.update(seen, network, params, inputs[150:])
        >>> float(seen.samples)
        200.0
    """
    _require(inputs, metric, probes, key, batch_size)
    network, params, _ = _trees.split(network, params)
    inputs = devices.automatic(inputs)
    blocks, samples = batches.blocks(inputs), None
    if blocks == 1:
        samples, inputs = jnp.int32(inputs.shape[0]), batches.filled_up(inputs, int(batch_size))
    here = _door.layers(network, params, inputs, exclude=seen.exclude)
    if here != seen.read:
        raise ValueError(
            f"moments of other layers: {', '.join(f'{layer.kernel} {layer.shape}' for layer in seen.read)} given, "
            f"{', '.join(f'{layer.kernel} {layer.shape}' for layer in here)} in this network"
        )
    options = {"metric": metric, "probes": probes, "batch_size": int(batch_size)}
    return _scan(seen, network, params, inputs, samples, key, blocks=blocks, **options)


def of_batches(
    network: Network,
    params: Params,
    batches: Iterable[Num[Array | np.ndarray, "..."]],
    *,
    exclude: Patterns = (),
    of_weights: bool = True,
    **options: Any,
) -> Moments:
    """The moments of all samples of an iterator, a generator or a list of batches; of one batch in memory at a time.

    Args:
        network: pure function ``(params, inputs) -> outputs``.
        params: its parameters.
        batches: NumPy or JAX arrays of any numbers of samples, such as
            ``(batch["image"] for batch in loader)``.
        exclude: patterns of paths that are left alone.
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
    seen = None
    for batch in batches:
        if seen is None:
            checks.require_inputs(batch)
            seen = start(network, params, batch, exclude=exclude, of_weights=of_weights)
        seen = update(seen, network, params, batch, **options)
    if seen is None:
        raise ValueError("there is not a single batch; moments of no samples say nothing")
    return seen


def _require(inputs, metric: str, probes: int | None, key: PRNGKeyArray | None, batch_size: int) -> None:
    checks.require_inputs(inputs)
    metrics.require(metric)
    checks.require_positive(batch_size, "batch_size")
    if probes is not None:
        checks.require_positive(probes, "probes")
        if key is None:
            raise ValueError(f"probes={probes} draws random signs: give it a key, such as jax.random.key(0)")


@functools.partial(jax.jit, static_argnames=("network", "metric", "probes", "batch_size", "blocks"))
@precision.in_full
def _scan(seen, network, params, inputs, samples, key, *, batch_size, blocks, **options) -> Moments:
    """Adds batch after batch; where ``samples`` are given, only so many of the inputs count."""
    key = jax.random.key(0) if key is None else key  # without probes nothing is drawn

    def add(total, index):
        batch, counted = batches.take(inputs, index, batch_size, blocks)
        if samples is not None:
            counted &= index * counted.size + jnp.arange(counted.size) < samples
        drawn = jax.random.fold_in(key, total.samples.astype(jnp.uint32))
        kind = {"exclude": seen.exclude, "of_weights": seen.of_weights}
        of_these = of_batch(network, params, batch, counted, key=drawn, **kind, **options)
        return merge(total, dataclasses.replace(of_these, read=seen.read)), None

    total, _ = lax.scan(add, seen, jnp.arange(batches.count(inputs.shape[0], batch_size, blocks)))
    return total
