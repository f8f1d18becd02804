"""Structured elimination-compensation of the units of any network: sums over samples and rows of the metric.

For each sample and each row of the metric's factor, with a gate m on a unit wherever it is read and taps on the biases
of those that read it: ``A = ∂(R y)/∂m``, and ``B``, a vector, the derivatives with respect to the constants in its
place. They are pooled in ``Σ A²``, ``Σ A B`` and ``Σ B Bᵀ``. What a product of matrices reads is counted from its mean,
so that nothing cancels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, PRNGKeyArray

from ecjax import _batches, _precision, _trees, graph
from ecjax._types import Inputs, Network, Params
from ecjax.graph import Group, Layers
from ecjax.graph.gates import Tap, gated, means, zero_shift
from ecjax.graph.groups import atoms_by_name, couple
from ecjax.graph.ignored import ignored_in
from ecjax.graph.readers import Reader, of_channels, readers
from ecjax.graph.reading import shape_of_two
from ecjax.graph.reads import Reads, reads
from ecjax.graph.taps import tap_dtype
from ecjax.metrics import Metric, row_of, scale_of

_LOOKED_AT = 256  # samples, for the means that inputs are counted from
_ROWS = 2  # of the metric, at least, for each value that a constant can take the place of
_MARGIN = 100  # roundings, within which a constant makes no difference


class Sums(NamedTuple):
    """What is pooled over samples and rows of the metric, of the units of one group.

    Attributes:
        square: ``Σ A²``.
        cross: ``Σ A B``.
        gram: ``Σ B Bᵀ``.
    """

    square: Float[Array, " units"]
    cross: Float[Array, "units values"]
    gram: Float[Array, "units values values"]


class Asked(NamedTuple):
    """What is computed; static.

    Attributes:
        network: of params that are arrays alone.
        groups: that are scored, by name.
        exclude: patterns of paths that are left alone.
        probes: how many random combinations of the rows of the metric; None for all.
        batch_size: samples at a time, on each device.
        blocks: how the samples lie on devices.
    """

    network: Network
    groups: tuple[tuple[str, Group], ...]
    exclude: tuple[str, ...]
    probes: int | None = None
    batch_size: int = 1024
    blocks: int = 1


class Seen(NamedTuple):
    """A network as it was traced, and how its units are read.

    Attributes:
        reading: its layers.
        reads: the sums over its units.
        atoms: of the groups, by name.
        readers: by name, the layers that can make up for a unit.
    """

    reading: graph.Reading
    reads: Reads
    atoms: dict[str, int]
    readers: dict[str, list[Reader]]

    @property
    def layers(self) -> dict[str, graph.Layer]:
        """All layers that can make up for a unit, by the path of their kernel."""
        return {reader.layer.kernel: reader.layer for found in self.readers.values() for reader in found}


def see(asked: Asked, params: Params, inputs: Inputs | jax.ShapeDtypeStruct) -> Seen:
    """Traces a network.

    Args:
        asked: which groups are scored.
        params: of arrays alone, or of their shapes.
        inputs: at least two samples, or their shape.
    """
    reading = graph.read(asked.network, params, inputs, exclude=asked.exclude)
    coupled = couple(asked.network, params, inputs)
    named = atoms_by_name(coupled)
    atoms = {name: named[name] for name, _ in asked.groups}
    of_groups = {name: readers(reading.layers, group) for name, group in asked.groups}
    return Seen(reading, reads(coupled, atoms.values()), atoms, of_groups)


def require_seen(asked: Asked, params: Params, inputs: Inputs, outputs: jax.ShapeDtypeStruct) -> None:
    """Raises a ValueError where units are read out of sight, or where there are too few rows of the metric.

    Args:
        asked: which groups are scored.
        params: of arrays alone.
        inputs: calibration inputs.
        outputs: of the network for these.
    """
    seen = see(asked, _trees.shapes(params), shape_of_two(inputs))
    rows = outputs.shape[0] * (math.prod(outputs.shape[1:]) if asked.probes is None else asked.probes)
    require_in_sight(asked, seen)
    for name in seen.atoms:
        values = sum(reader.values.shape[1] for reader in seen.readers[name])
        if rows < _ROWS * values:
            given = f"{outputs.shape[0]} inputs" + (f" with {asked.probes} probes" if asked.probes else "")
            raise ValueError(
                f"a unit made by '{name}' has {values} values that constants can take the place of, and {given} give "
                f"only {rows} rows of the metric to tell them by; at least {_ROWS * values} are needed: give more "
                "inputs or probes, or take the criterion score.neuron_norm"
            )


def require_in_sight(asked: Asked, seen: Seen) -> None:
    """Raises a ValueError where it can't be seen how units are read, by their name."""
    for name, atom in seen.atoms.items():
        if atom in seen.reads.hidden:
            places = ", ".join(dict.fromkeys(place.path for place in dict(asked.groups)[name].places))
            raise ValueError(
                f"the units made by '{name}' can't be scored: they are summed over inside {seen.reads.hidden[atom]}. "
                f"Leave them out with exclude= and one of their leaves: {places}"
            )


@_precision.compiled("asked")
def importance_and_constants(
    asked: Asked,
    metric: Metric,
    params: Params,
    inputs: Inputs,
    weights: Float[Array, "samples ..."] | None,
    key: PRNGKeyArray | None,
) -> tuple[dict[str, Float[Array, " units"]], dict[str, Float[Array, "units values"]]]:
    """What is left of removing each unit, and the constants that take the place of its values, by the group's name.

    Args:
        asked: of which groups.
        metric: of the outputs.
        params: of arrays alone.
        inputs: calibration inputs.
        weights: of samples or positions; None where all count the same.
        key: for the probes.
    """
    key = jax.random.key(0) if key is None else key  # without probes nothing is drawn
    few = graph.at_least_two(_batches.spread(inputs, _LOOKED_AT))
    seen = see(asked, params, few)
    ignored = ignored_in(asked.network, Layers(seen.layers.values()), params, inputs, metric.factor)
    references = _references(seen, params, few, ignored)

    def of_batch(index):
        (batch, weight), counted = _batches.take((inputs, weights), index, asked.batch_size, asked.blocks)
        given = references, ignored, jax.random.fold_in(key, index)
        return _of_batch(asked, metric, params, batch, weight, counted, *given)

    def add(total, index):
        return jax.tree.map(jnp.add, total, of_batch(index)), None

    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_batch, jnp.int32(0)))
    count = _batches.count(inputs.shape[0], asked.batch_size, asked.blocks)
    sums, _ = lax.scan(add, nothing, jnp.arange(count))
    importance, constants = {}, {}
    for name, found in sums.items():
        left, constant = least(found)
        importance[name] = left / (inputs.shape[0] * (asked.probes or 1))
        constants[name] = constant + of_readers(seen.readers[name], references, constant)
    return importance, constants


def _references(seen: Seen, params: Params, few: Array, ignored: dict[str, Array]) -> dict[str, Array]:
    """By the path of a kernel, the means of what it reads, where a constant is the same as a shift of its bias.

    These are products of matrices that sum over no other units than those that they can make up for.
    """
    paths = []
    for read in seen.reads.found:
        names = [name for name, atom in seen.atoms.items() if atom in read.units]
        for path in seen.layers:
            product = seen.reading.products[path][0]
            rows, _ = product.rows
            here = product.site == read.site and read.side == 1 - product.side and rows.features
            if here and all(path in [reader.layer.kernel for reader in seen.readers[name]] for name in names):
                paths.append(path)
    found = means(seen.reading, paths, params, few) if paths else {}
    for path in ignored.keys() & found.keys():
        silent = ignored[path].all(-1).reshape(found[path].shape[:-1])
        found[path] = jnp.where(silent[..., None], 0, found[path])
    return found


def of_readers(found: Sequence[Reader], references: dict[str, Array], like: Array) -> Float[Array, "units values"]:
    """The references of each unit's values, in the order of its readers; 0 where there are none."""
    parts = [
        references[reader.layer.kernel].reshape(-1)[reader.values].astype(like.dtype)
        if reader.layer.kernel in references
        else jnp.zeros(reader.values.shape, like.dtype)
        for reader in found
    ]
    return jnp.concatenate(parts, 1) if parts else jnp.zeros_like(like)


def _of_batch(asked, metric, params, inputs, weights, counted, references, ignored, key) -> dict[str, Sums]:
    """The sums of one batch: of all samples together, or one by one where they can't be told apart."""
    dtype = jnp.result_type(jnp.float32, *_floating((params, inputs)))
    weights = jnp.ones(counted.shape, dtype) if weights is None else weights.astype(dtype)
    weights = jnp.where(counted.reshape(-1, *(1,) * (weights.ndim - 1)), weights, 0)
    more = len(graph.at_least_two(inputs)) - len(inputs)
    weights = jnp.pad(weights, ((0, more), *((0, 0),) * (weights.ndim - 1)))
    inputs = graph.at_least_two(inputs)
    seen = see(asked, params, inputs)
    taken = asked, metric, params, references, ignored, dtype
    if seen.reads.by_sample:
        return _together(*taken, seen, inputs, weights, key)
    two = see(asked, params, inputs[:2])

    def add(total, sample):
        x, weight, number = sample
        twice, once = jnp.stack([x, x]), jnp.stack([weight, jnp.zeros_like(weight)])
        found = _together(*taken, two, twice, once, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, total, found), None

    shapes = jax.eval_shape(lambda: _together(*taken, two, inputs[:2], weights[:2], key))
    nothing = jax.tree.map(jnp.zeros_like, shapes)
    return lax.scan(add, nothing, (inputs, weights, jnp.arange(len(inputs))))[0]


def _floating(tree) -> list:
    return [leaf.dtype for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _together(asked, metric, params, references, ignored, dtype, seen: Seen, inputs, weights, key) -> dict[str, Sums]:
    """The sums of some samples, one backward pass for each row of the metric."""
    samples, leaves = len(inputs), _trees.by_path(params)
    names = {name: group.length for name, group in asked.groups}
    gates = {seen.atoms[name]: jnp.ones((samples, length), dtype) for name, length in names.items()}
    shifts = {
        path: zero_shift(seen.reading.products[path][0], layer.layout.sizes, samples, dtype)
        for path, layer in seen.layers.items()
    }

    def outputs_of(gates, shifts):
        taps = {path: Tap(shift, references.get(path)) for path, shift in shifts.items()}
        return gated(seen.reading, seen.reads.found, params, inputs, gates, taps)

    outputs, pull = jax.vjp(outputs_of, gates, shifts)
    scale, count = scale_of(weights, outputs), math.prod(outputs.shape[1:])

    def add(total, index):
        chosen = row_of(outputs, index, asked.probes, key)
        of_gates, of_shifts = pull(metric.factor(outputs, chosen * scale).astype(outputs.dtype))
        moves = {path: _of_inputs(of_shifts[path], layer, leaves, ignored) for path, layer in seen.layers.items()}
        return jax.tree.map(jnp.add, total, {name: row(name, of_gates, moves) for name in names}), None

    def row(name, of_gates, moves) -> Sums:
        a = of_gates[seen.atoms[name]]
        parts = [moves[reader.layer.kernel][:, reader.values] for reader in seen.readers[name]]
        b = jnp.concatenate(parts, 2) if parts else jnp.zeros((*a.shape, 0), a.dtype)
        gram = jnp.einsum("nuv,nuw->uvw", b, b)
        return Sums(jnp.square(a).sum(0), jnp.einsum("nu,nuv->uv", a, b), gram)

    rows = jnp.arange(count if asked.probes is None else asked.probes)
    shapes = jax.eval_shape(lambda: {name: row(name, gates, _zero_moves(seen, samples, dtype)) for name in names})
    nothing = jax.tree.map(jnp.zeros_like, shapes)
    return lax.scan(add, nothing, rows)[0]


def _zero_moves(seen: Seen, samples: int, dtype) -> dict[str, Array]:
    sizes = {path: (layer.layout.sizes, layer.window) for path, layer in seen.layers.items()}
    return {path: jnp.zeros((samples, s[0] * s[1] // max(window, 1)), dtype) for path, (s, window) in sizes.items()}


def _of_inputs(shift: Array, layer: graph.Layer, leaves: dict, ignored: dict) -> Float[Array, "samples inputs"]:
    """From the derivatives with respect to a layer's bias those with respect to constants in place of its inputs."""
    weights = of_channels(jnp.asarray(leaves[layer.kernel], tap_dtype(leaves[layer.kernel])), layer)
    of_samples = jnp.moveaxis(shift, shift.ndim - 3, 0)
    of_bias = of_samples.reshape(of_samples.shape[0], weights.shape[0], weights.shape[2])
    if layer.kernel in ignored:
        of_bias = jnp.where(ignored[layer.kernel], 0, of_bias)
    found = jnp.einsum("nso,sjo->nsj", of_bias, weights.astype(of_bias.dtype))
    return found.reshape(found.shape[0], -1)


def least(sums: Sums) -> tuple[Float[Array, " units"], Float[Array, "units values"]]:
    """The least ``Σ (A − c·B)²`` over all c, and the smallest c that gives it.

    Values whose B is of the size of rounding errors, next to the others, and combinations that cancel, stay 0.
    """
    square, cross, gram = sums
    values = gram.shape[-1]
    if values == 0:
        return square, cross
    eps = jnp.finfo(gram.dtype).eps
    sizes = jnp.diagonal(gram, axis1=1, axis2=2)
    counts = sizes > (_MARGIN * eps) ** 2 * sizes.max(1, keepdims=True)
    scale = jnp.where(counts, 1 / jnp.sqrt(jnp.where(counts, sizes, 1)), 0)
    if values == 1:
        found, explained = cross * scale**2, (cross * scale)[:, 0] ** 2
        return jnp.maximum(square - explained, 0), found
    lengths, directions = jnp.linalg.eigh(gram * scale[:, :, None] * scale[:, None, :])
    kept = lengths > _MARGIN * values * eps * lengths[:, -1:]
    inverse = jnp.where(kept, 1 / jnp.where(kept, lengths, 1), 0)
    along = jnp.einsum("uvk,uv->uk", directions, cross * scale)
    found = jnp.einsum("uvk,uk->uv", directions, along * inverse) * scale
    return jnp.maximum(square - (along**2 * inverse).sum(-1), 0), found


def as_constants(values: Float[Array, "units values"]) -> Float[Array, "units *values"]:
    """Constants as scores hold them: one number for each unit where it has one value."""
    return values[:, 0] if values.shape[1] == 1 else values
