"""A network with a gate on every unit wherever it is read, and taps on the products that read units.

With all gates at 1 and all taps at 0 it is the network itself. With a unit's gate at 0 it is the network without this
unit; a tap is a shift of the bias that is added to its product. Both are places to differentiate at.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, PyTree

from ecjax import _trees
from ecjax.graph.convolutions import channels_last
from ecjax.graph.evaluate import evaluate, promoted, run
from ecjax.graph.reading import Reading
from ecjax.graph.reads import Along, Read
from ecjax.graph.values import Product, Rows


class Tap(NamedTuple):
    """What is added to a product that reads units, and what its inputs are compared with.

    Attributes:
        shift: of the neurons, for each sample; all its positions get the same. In scans with an axis for the turns of
            each before the others.
        reference: what the gates let through instead of an input where they are 0; likewise. None for 0.
    """

    shift: Float[Array, "*turns samples stack out"]
    reference: Float[Array, "*turns stack in"] | None = None


def gated(
    reading: Reading,
    reads: Sequence[Read],
    params: PyTree,
    inputs: Array,
    gates: Mapping[int, Float[Array, "samples units"]],
    taps: Mapping[str, Tap],
) -> Float[Array, "samples *positions outputs"]:
    """The outputs of a network with gates and taps.

    Args:
        reading: of the network, for params and inputs of these shapes.
        reads: where units are read.
        gates: by atom, one for each unit and sample. Where a read does not tell samples apart, those of the first
            sample hold for all.
        taps: by the path of a kernel that is used once.
    """
    by_site = {read.site: read for read in reads}
    products = {reading.products[path][0].site: reading.products[path][0] for path in taps}

    def hook(equation, operands, site, tap):
        operands, product = list(operands), products.get(site)
        if site in by_site:
            read = by_site[site]
            value, reference = operands[read.side], None
            if product is not None and tap.reference is not None:
                reference = _in_place(tap.reference, product.rows[0], value.shape)
            operands[read.side] = _through(value, read, gates, reference)
        results = channels_last(equation, operands)
        if product is not None:
            (result,), (_, gives) = results, product.rows
            results = [result + spread(tap.shift, gives, result.shape).astype(result.dtype)]
        return results, {}

    given = {product.site: taps[path] for path, product in zip(taps, products.values(), strict=True)}
    arguments = [*_trees.by_path(params).values(), inputs]
    (outputs,), _ = evaluate(reading.jaxpr, arguments, frozenset((*by_site, *products)), hook, given)
    return outputs


def zero_shift(product: Product, sizes: tuple[int, int, int], samples: int, dtype) -> Array:
    """No shift, for each sample: the place to differentiate at.

    Args:
        product: that reads units.
        sizes: of its kernel's layout: members, inputs, neurons.
        samples: how many.
        dtype: of the shift.
    """
    stack, _, neurons = sizes
    return jnp.zeros((*product.turns, samples, stack // math.prod(product.turns), neurons), dtype)


def means(
    reading: Reading, paths: Sequence[str], params: PyTree, inputs: Array
) -> dict[str, Float[Array, "*turns stack channels"]]:
    """By the path of a kernel that is used once, the mean of what each of its inputs, or channels, reads."""
    products = {reading.products[path][0].site: reading.products[path][0] for path in paths}

    def hook(equation, operands, site, _):
        product = products[site]
        value, (reads, _) = promoted(operands[1 - product.side]), product.rows
        order = (*reads.stacked, *(reads.features or (_channels(equation),)))
        others = tuple(axis for axis in range(value.ndim) if axis not in order)
        mean = value.mean(others).transpose(np.argsort(np.argsort(order)))
        if not reads.features:  # the groups of a convolution have the same channels
            mean = mean.reshape(equation.params["feature_group_count"], -1).mean(0)
        stack = math.prod(value.shape[axis] for axis in reads.stacked)
        return run(equation, operands), {product.path: mean.reshape(stack, -1)}

    arguments = [*_trees.by_path(params).values(), inputs]
    return evaluate(reading.jaxpr, arguments, frozenset(products), hook, {})[1]


def _channels(equation) -> int:
    return equation.params["dimension_numbers"].lhs_spec[1]


def variances(
    reading: Reading, reads: Sequence[Read], params: PyTree, inputs: Array
) -> dict[int, list[Float[Array, "*turns along"]]]:
    """By atom, along each axis on which its units are read, the variance of their values over samples and positions.

    Where other axes are summed over as well, it is the mean over these.
    """
    by_site = {read.site: read for read in reads}
    names = {
        f"{read.site} {atom} {number}": atom for read in reads for atom in read.units for number in _numbers(read, atom)
    }

    def hook(equation, operands, site, _):
        read, found = by_site[site], {}
        value = promoted(operands[read.side])
        if jnp.issubdtype(value.dtype, jnp.complexfloating):
            value = jnp.abs(value)
        others = tuple(axis for axis in range(value.ndim) if axis not in read.others)
        spread_out = value.var(others, keepdims=True)
        for atom, places in read.units.items():
            for number, along in enumerate(places):
                rest = tuple(axis for axis in range(value.ndim) if axis != along.axis)
                found[f"{site} {atom} {number}"] = spread_out.mean(rest)
        return run(equation, operands), found

    arguments = [*_trees.by_path(params).values(), inputs]
    _, aside = evaluate(reading.jaxpr, arguments, frozenset(by_site), hook, {})
    found: dict[int, list] = {}
    for name, atom in names.items():
        found.setdefault(atom, []).append(aside[name])
    return found


def _numbers(read: Read, atom: int) -> range:
    return range(len(read.units[atom]))


def _through(value: Array, read: Read, gates: Mapping[int, Array], reference: Array | None) -> Array:
    """A value with the gates of its units on it, in at least single precision."""
    wide = promoted(value)
    moved = wide if reference is None else wide - reference
    for atom, places in read.units.items():
        for along in places:
            moved = moved * _along(gates[atom], along, read.samples, value.ndim).astype(moved.dtype)
    found = moved if reference is None else reference + moved
    return found.astype(value.dtype)


def _along(gate: Float[Array, "samples units"], units: Along, samples: Along | None, rank: int) -> Array:
    """The gates of units, in place along the axes of a value; 1 where there is no unit."""
    if samples is not None and samples.axis == units.axis:
        here = gate[samples.entries, np.maximum(units.entries, 0)]
        here = here if (units.entries >= 0).all() else jnp.where(units.entries >= 0, here, 1)
        return here.reshape([-1 if axis == units.axis else 1 for axis in range(rank)])
    rows = gate[:1] if samples is None else _taken(gate, samples.entries, 0)
    here = _taken(rows, np.maximum(units.entries, 0), 1)
    if (units.entries < 0).any():
        here = jnp.where(units.entries >= 0, here, 1)
    axes = (units.axis,) if samples is None else (samples.axis, units.axis)
    here = here[0] if samples is None else here
    if len(axes) == 2 and axes[0] > axes[1]:
        here = here.T
    lengths = iter(here.shape)
    return here.reshape([next(lengths) if axis in axes else 1 for axis in range(rank)])


def _taken(array: Array, entries: np.ndarray, axis: int) -> Array:
    """These entries along an axis; the array itself where they are all in order."""
    same = len(entries) == array.shape[axis] and (entries == np.arange(len(entries))).all()
    return array if same else jnp.take(array, entries, axis)


def _in_place(reference: Float[Array, "stack in"], rows: Rows, shape: tuple[int, ...]) -> Array:
    """What is the same for all samples and positions, in place along the axes of a value."""
    order = (*rows.stacked, *rows.features)
    found = reference.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
    lengths = iter(found.shape)
    return found.reshape([next(lengths) if axis in order else 1 for axis in range(len(shape))])


def spread(shift: Float[Array, "samples stack out"], rows: Rows, shape: tuple[int, ...]) -> Array:
    """What each neuron gets in each sample, at all positions of a product of this shape."""
    order = (rows.samples.axis, *rows.stacked, *rows.features)
    sizes = [shift.shape[0], *(shape[axis] for axis in order[1:])]
    found = shift.reshape(sizes).transpose(np.argsort(order))
    lengths = iter(found.shape)
    found = found.reshape([next(lengths) if axis in order else 1 for axis in range(len(shape))])
    before, after = rows.samples.before, rows.samples.after
    entries = np.tile(np.repeat(np.arange(shift.shape[0]), after), before)
    return _taken(found, entries, rows.samples.axis)
