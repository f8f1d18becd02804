"""The moments of many samples, batch after batch: of one array, or of batches that come one after another."""

import math
from collections.abc import Callable, Iterable, Sized
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Num, PRNGKeyArray

from ecjax import _batches, _checks, _door, _memory, _precision, _progress
from ecjax._types import Inputs, Metric, Network, Params, Patterns, Weights
from ecjax.graph.ignored import ignored_in
from ecjax.graph.layers import as_patterns
from ecjax.moments.additive import Moments, described, merge, nothing, of_same_params, start
from ecjax.moments.blocks import of_blocks

_MOST_ROWS = 256  # of the metric, each of which is a backward pass


def of_inputs(
    network: Network,
    params: Params,
    inputs: Inputs,
    *,
    metric: Metric = "euclidean",
    weights: Weights | None = None,
    probes: int | None = None,
    key: PRNGKeyArray | None = None,
    batch_size: int = 1024,
    exclude: Patterns = (),
    of_weights: bool = True,
) -> Moments:
    """The moments of all samples, batch after batch inside one compiled call.

    Args:
        inputs: calibration inputs; on one device, or spread evenly over several (``devices``): each then works on its
            own samples.
        metric: as for ``start``, like probes and of_weights.
        probes: None, or how many random combinations of the K rows of the metric.
        key: random key, needed with ``probes``.
        batch_size: samples at a time, on each device; it bounds the memory.
        of_weights: for each weight, or for each input of a layer.

    Raises:
        ValueError: no inputs, inputs that hold NaN or infinity, an unknown metric, probes without a key, or a network
            that mixes samples or has a kernel that can't be scored, by name.

    Example:
        >>> seen = moments.of_inputs(network, params, inputs, metric="fisher")
        >>> importance = params["Dense_0"]["kernel"] ** 2 * seen.layers["Dense_0/kernel"].scatter / seen.samples
        >>> bool(jnp.allclose(importance, scores.importance["Dense_0"]["kernel"]))
        True
    """
    require_key(probes, key)
    counts = {"batch_size": batch_size, "probes": probes}
    at = _door.enter(network, params, inputs, exclude=exclude, metric=metric, weights=weights, **counts)
    require_probes(at.outputs, probes)
    seen = nothing(at.params, at.layers, at.metric, as_patterns(exclude), probes, of_weights=of_weights)
    seen, given = of_same_params(seen, at.params), (at.params, at.inputs, at.weights, None, key)
    return _scanned(at.network, int(batch_size), _batches.placement(at.inputs), seen, *given)


def update(
    seen: Moments,
    network: Network,
    params: Params,
    inputs: Inputs,
    *,
    weights: Weights | None = None,
    key: PRNGKeyArray | None = None,
    batch_size: int = 1024,
) -> Moments:
    """The moments of the samples seen so far and of these together, taken in the same way.

    Samples on one device are filled up to a usual number, so that parts of many sizes share a few compiled functions.

    Args:
        seen: of ``start``, or of earlier samples with the same params.
        inputs: more calibration inputs, as many as there are.
        key: random key, needed with probes; may be the same each time, as the number of samples seen enters what is
            drawn. Machines whose moments are to be merged need one each.
        batch_size: samples at a time, on each device.

    Raises:
        ValueError: as ``of_inputs``, or moments of a network with other layers or other params.

    Example:
        >>> seen = moments.update(moments.start(network, params, inputs), network, params, inputs[:150])
        >>> seen = moments.update(seen, network, params, inputs[150:])
        >>> float(seen.samples)
        200.0
    """
    require_key(seen.probes, key)
    samples = None
    if _batches.blocks(inputs) == 1 and len(inputs):  # without samples it is refused
        filled = _batches.filled_up(inputs, int(batch_size))
        if len(filled) != len(inputs):
            _checks.require_inputs(inputs)  # whose shape and samples the error is to name
        samples, inputs = jnp.int32(len(inputs)), filled
        weights = None if weights is None else _batches.filled_up(weights, int(batch_size))
    options = {"exclude": seen.exclude, "metric": seen.metric, "weights": weights, "batch_size": batch_size}
    at = _door.enter(network, params, inputs, **options)
    require_probes(at.outputs, seen.probes)
    if at.layers != seen.read:
        raise ValueError(
            f"moments of other layers: {described(seen)} given, "
            f"{', '.join(f'{layer.kernel} {layer.shape}' for layer in at.layers)} in this network"
        )
    seen = of_same_params(seen, at.params)
    placement = _batches.placement(at.inputs)
    return _scanned(at.network, int(batch_size), placement, seen, at.params, at.inputs, at.weights, samples, key)


class Batch(NamedTuple):
    """What a progress callback is told after each batch.

    Attributes:
        number: of the batch, from 1.
        samples: seen so far.

    Example:
        >>> tell = lambda batch: print(f"{batch.number}: {batch.samples} samples")
        >>> seen = moments.of_batches(network, params, np.split(inputs, 2), progress=tell)
        1: 100 samples
        2: 200 samples
    """

    number: int
    samples: int


def of_batches(
    network: Network,
    params: Params,
    batches: Iterable[Num[Array | np.ndarray, "..."]],
    *,
    metric: Metric = "euclidean",
    probes: int | None = None,
    key: PRNGKeyArray | None = None,
    batch_size: int = 1024,
    exclude: Patterns = (),
    of_weights: bool = True,
    progress: bool | Callable[[Batch], None] | None = None,
) -> Moments:
    """The moments of all samples of an iterator, a generator or a list of batches; of one batch in memory at a time.

    Args:
        batches: NumPy or JAX arrays of any numbers of samples, such as ``(batch["image"] for batch in loader)``.
        probes: None, or how many random combinations of the K rows of the metric.
        key: random key, needed with ``probes``.
        of_weights: for each weight, or for each input of a layer.
        progress: True for a bar, as for ``prune.staged``; or a function called after each batch.

    Raises:
        ValueError: as ``update``, with the number of the batch, from 1; one array in place of batches, or not a single
            batch.

    Example:
        >>> seen = moments.of_batches(network, params, np.split(inputs, 4), metric="fisher")
        >>> streamed = score.elimination_compensation_from_moments(params, seen)
        >>> bool(jnp.allclose(streamed.importance["Dense_0"]["kernel"], scores.importance["Dense_0"]["kernel"]))
        True
    """
    _progress.require(progress)
    if isinstance(batches, jax.Array | np.ndarray):
        raise ValueError(
            f"batches is one array, of shape {batches.shape}; give a list or an iterator of arrays, or all samples to "
            "moments.of_inputs"
        )
    seen, samples, total = None, 0, len(batches) if isinstance(batches, Sized) else None
    with _progress.told(progress, "batch", total, ("samples",)) as tell:
        for number, batch in enumerate(batches, start=1):
            if seen is None:
                options = {"metric": metric, "probes": probes, "exclude": exclude, "of_weights": of_weights}
                seen = start(network, params, batch, **options)
            try:
                seen = update(seen, network, params, batch, key=key, batch_size=batch_size)
            except (ValueError, MemoryError) as error:
                raise type(error)(
                    f"batch {number}: {error}. To skip a batch, or to keep the moments of those before it, call "
                    "moments.update in a loop of your own"
                ) from error
            samples += len(batch)
            if progress:
                jax.block_until_ready(seen.samples)
                tell(Batch(number, samples))
    if seen is None:
        raise ValueError("there is not a single batch; moments of no samples say nothing")
    return seen


def require_key(probes: int | None, key: PRNGKeyArray | None) -> None:
    """Raises a ValueError unless there is a key for probes, and none without."""
    if probes is None and key is not None:
        raise ValueError("key is for probes=, which are not asked for; leave it out, or give both")
    if probes is not None and key is None:
        raise ValueError(f"probes={probes} draws random signs: give it a key, such as jax.random.key(0)")
    if key is not None:
        _checks.require_key(key)


def has_many_rows(outputs: jax.ShapeDtypeStruct) -> bool:
    """Whether outputs with positions have more rows a sample than are worth a backward pass each."""
    return len(outputs.shape) > 2 and math.prod(outputs.shape[1:]) > _MOST_ROWS


def require_probes(outputs: jax.ShapeDtypeStruct, probes: int | None) -> None:
    """Raises a ValueError if the rows of the metric are too many to take them all."""
    if probes is None and has_many_rows(outputs):
        raise ValueError(
            f"outputs of shape {outputs.shape[1:]} are {math.prod(outputs.shape[1:]):,} rows of the metric for each "
            "sample, a backward pass each; give probes=1, key=jax.random.key(0), for random combinations of them"
        )


def _scanned(network: Network, batch_size: int, *given: Any) -> Moments:
    with _memory.enough(f"lower batch_size={batch_size}, {_memory.FEWER_ROWS}"):
        return _scan(network, batch_size, *given)


@_precision.compiled("network", "batch_size", "placement")
def _scan(network, batch_size, placement, seen, params, inputs, weights, samples, key) -> Moments:
    """Adds batch after batch; where ``samples`` are given, only so many of the inputs count."""
    key = jax.random.key(0) if key is None else key  # without probes nothing is drawn
    ignored = ignored_in(network, seen.read, params, inputs, seen.metric.factor)

    def add(total, index):
        (batch, weight), counted = _batches.take((inputs, weights), index, batch_size, placement.blocks)
        if samples is not None:
            counted &= index * counted.size + jnp.arange(counted.size) < samples
        drawn = jax.random.fold_in(key, total.samples.astype(jnp.uint32))
        given = total, network, params, batch, counted, drawn, weight, ignored
        return merge(total, of_blocks(placement, *given)), None

    total, _ = lax.scan(add, seen, jnp.arange(_batches.count(inputs.shape[0], batch_size, placement.blocks)))
    return total
