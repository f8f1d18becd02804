"""What structured elimination-compensation is measured against: norms, variance and chance."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from ecjax import _checks, _door, _precision, _trees, graph
from ecjax._types import Inputs, Network, Params, Patterns
from ecjax.graph import Group, Layers, Place
from ecjax.graph.gates import means, variances
from ecjax.graph.layers import as_patterns
from ecjax.graph.readers import made_in
from ecjax.graph.reading import shape_of_two
from ecjax.score.scores import NeuronScores, checked
from ecjax.score.units import Asked, Seen, as_constants, of_readers, require_in_sight, see


def neuron_norm(network: Network, params: Params, inputs: Inputs, *, exclude: Patterns = ()) -> NeuronScores:
    """``I = ‖W‖₂``, the Euclidean norm of the weights that make each unit: magnitude for neurons.

    These are its entries in the leaves that ``networks.groups`` shows as made by: the column of a hidden neuron, the
    kernels of all layers that write to a channel of a residual stream.

    Args:
        inputs: calibration inputs; only their shape counts.

    Raises:
        ValueError: params that hold NaN or infinity.

    Example:
        >>> score.neuron_norm(network, params, inputs).importance["Dense_0/kernel"].shape
        (8,)
    """
    groups, layers, leaves = _read(network, params, inputs, exclude)
    places = tuple((name, group.length, tuple(made_in(layers, group))) for name, group in groups.items())
    return checked(NeuronScores(_norms(leaves, places)))


def neuron_group_norm(network: Network, params: Params, inputs: Inputs, *, exclude: Patterns = ()) -> NeuronScores:
    """``I = ‖W‖₂² / mean ‖W‖₂²``, of all weights that a unit has in any leaf but biases, next to those of its group.

    Args:
        inputs: calibration inputs; only their shape counts.

    Raises:
        ValueError: params that hold NaN or infinity, or squares that overflow.

    Source: Fang et al., "DepGraph: towards any structural pruning", arXiv:2301.12900; the default of Torch-Pruning's
    ``GroupMagnitudeImportance``.

    Example:
        >>> importance = score.neuron_group_norm(network, params, inputs).importance["Dense_0/kernel"]
        >>> round(float(importance.mean()), 5)
        1.0
    """
    groups, layers, leaves = _read(network, params, inputs, exclude)
    biases = {layer.bias for layer in layers}
    places = tuple(
        (name, group.length, tuple(place for place in group.places if place.path not in biases))
        for name, group in groups.items()
    )
    squares = {name: norms**2 for name, norms in _norms(leaves, places).items()}
    means = {name: square.mean() for name, square in squares.items()}
    relative = {name: square / jnp.where(means[name] > 0, means[name], 1) for name, square in squares.items()}
    return checked(NeuronScores(relative))


def _read(network, params, inputs, exclude) -> tuple[dict[str, Group], Layers, dict[str, Array]]:
    network, params, _ = _trees.split(network, params)
    layers = _door.layers(network, params, inputs, exclude=exclude, need="any", each_alone=False)
    return _door.units(network, params, inputs, exclude=exclude), layers, _trees.by_path(params)


@functools.partial(jax.jit, static_argnames="groups")
def _norms(leaves: dict[str, Array], groups: tuple) -> dict[str, Float[Array, " units"]]:
    """The norms of the units' entries in some places, by the group's name."""
    return {name: _norm_of_each(leaves, units, places) for name, units, places in groups}


def _norm_of_each(leaves: dict[str, Array], units: int, places: Sequence[Place]) -> Float[Array, " units"]:
    """The norm of each unit's entries, scaled by a power of two while they are squared: nothing over- or underflows."""
    rows = [(np.asarray(place.units), _entries(leaves[place.path], place.axis)) for place in places]
    found = [(np.where(of < 0, units, of), jnp.abs(entries)) for of, entries in rows if entries.size]
    dtype = jnp.result_type(jnp.float32, *(entries.dtype for _, entries in found))
    largest = jnp.zeros(units + 1, dtype)
    for of, entries in found:
        largest = largest.at[of].max(entries.max(1).astype(dtype))
    _, exponent = jnp.frexp(largest)
    total = jnp.zeros(units + 1, dtype)
    for of, entries in found:
        total = total.at[of].add((jnp.ldexp(entries.astype(dtype), -exponent[of][:, None]) ** 2).sum(1))
    return jnp.ldexp(jnp.sqrt(total), exponent)[:units]


def _entries(leaf: Array, axis: int) -> Array:
    """What lies at each place along an axis, as rows."""
    first = jnp.moveaxis(jnp.asarray(leaf), axis, 0)
    return first.reshape(first.shape[0], -1)


def neuron_variance(network: Network, params: Params, inputs: Inputs, *, exclude: Patterns = ()) -> NeuronScores:
    """``I = var(a)``, the variance of each unit's values over inputs and positions, with their means as constants.

    The values are those that products read; of a unit of several, as a head, the mean of their variances.

    Raises:
        ValueError: bad inputs, units that are read where it can't be seen, or variances that overflow.

    Example:
        >>> scores = score.neuron_variance(network, params, inputs)
        >>> hidden = nn.relu(inputs @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
        >>> bool(jnp.allclose(scores.importance["Dense_0/kernel"], hidden.var(0), rtol=1e-4))
        True
    """
    at = _door.enter(network, params, inputs, exclude=exclude, need="any")
    groups = _door.units(at.network, at.params, at.inputs, exclude=exclude)
    asked = Asked(at.network, tuple(groups.items()), as_patterns(exclude))
    require_in_sight(asked, see(asked, at.params, shape_of_two(at.inputs)))
    return checked(NeuronScores(*_variances(asked, at.params, at.inputs)))


@_precision.compiled("asked")
def _variances(asked: Asked, params, inputs):
    inputs = graph.at_least_two(inputs)
    return _spreads(asked, see(asked, params, inputs), params, inputs)


def _spreads(asked: Asked, seen: Seen, params: Params, inputs: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    """By the group's name, the variance of each unit's values where products read them, and their means.

    Args:
        asked: of which groups.
        seen: the network, traced for these inputs.
        params: of arrays alone.
        inputs: at least two samples.
    """
    of_products = {atom for read in seen.reads.found if read.product for atom in read.units}
    reads = [
        read._replace(units={atom: at for atom, at in read.units.items() if read.product or atom not in of_products})
        for read in seen.reads.found
    ]
    spread = variances(seen.reading, [read for read in reads if read.units], params, inputs)
    entries = {atom: [along.entries for read in reads for along in read.units.get(atom, ())] for atom in spread}
    mean = means(seen.reading, list(seen.layers), params, inputs) if seen.layers else {}
    importance, constants = {}, {}
    for name, group in asked.groups:
        found = zip(entries[seen.atoms[name]], spread[seen.atoms[name]], strict=True)
        importance[name] = _mean_of_each(list(found), group.length)
        values = [np.zeros((group.length, 0)), *(reader.values for reader in seen.readers[name])]
        like = jnp.zeros((group.length, sum(v.shape[1] for v in values)), importance[name].dtype)
        constants[name] = as_constants(of_readers(seen.readers[name], mean, like))
    return importance, constants


def _mean_of_each(found: list, units: int) -> Float[Array, " units"]:
    """The mean of what is known along several axes, for each unit."""
    total, count = jnp.zeros(units + 1), np.zeros(units + 1)
    for entries, values in found:
        values = values.reshape(-1, len(entries)).mean(0)
        place = np.where(entries < 0, units, entries)
        total = total.astype(values.dtype).at[place].add(values)
        np.add.at(count, place, 1)
    return (total / np.maximum(count, 1))[:units]


def neuron_random(
    network: Network, params: Params, inputs: Inputs, *, key: PRNGKeyArray, exclude: Patterns = ()
) -> NeuronScores:
    """``I ~ U(0, 1)``, independent for every unit: what any criterion has to beat.

    Args:
        inputs: calibration inputs; only their shape counts.
        key: what is drawn depends on it alone.

    Raises:
        ValueError: params without kernels.

    Example:
        >>> score.neuron_random(network, params, inputs, key=jax.random.key(0)).importance["Dense_0/kernel"].shape
        (8,)
    """
    groups, _, _ = _read(network, params, inputs, exclude)
    _checks.require_key(key)
    keys = jax.random.split(key, max(len(groups), 1))
    draws = zip(keys, groups.items(), strict=False)
    return NeuronScores({name: jax.random.uniform(own, (group.length,)) for own, (name, group) in draws})
