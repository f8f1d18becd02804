"""Which units go: those of least importance, so many that a fraction of them, or of what they cost, is gone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int, Real

from ecjax import _checks

_CLOSE = 1e-6  # how far a cost may be above what is left of it, relative to the whole: rounding

# From how many units each group has left, in the order of the groups, to what the network costs.
Cost = Callable[[Sequence[Any]], Any]


class _Blocks(NamedTuple):
    """How units of a group can go: in blocks, of which the first are the least important.

    Attributes:
        sizes: of the blocks.
        values: how important a unit of each is, on the mean; never falling.
        order: the units, the least important first.
    """

    sizes: Int[np.ndarray, " blocks"]
    values: Real[Array | np.ndarray, " blocks"]
    order: Int[Array | np.ndarray, " units"]


def sizes_of(units: int, multiple_of: int) -> Int[np.ndarray, " blocks"]:
    """How many units of a group go at once, so that a multiple stays, and at least one; none where that can't be."""
    left = [count for count in range(units - 1, 0, -1) if count % multiple_of == 0]
    return -np.diff([units, *left])


def kept(
    importance: Mapping[str, Real[Array, " units"]],
    fraction: Any,
    *,
    multiple_of: int = 1,
    cost: Cost | None = None,
) -> dict[str, Bool[Array, " units"]]:
    """True for the units that stay, by the name of their group.

    Blocks of units go, those of least importance first, and among equals the ones that come first: of one unit each, or
    of so many that a multiple is left. As soon as the fraction is reached, no more do. Units of importance minus
    infinity are gone already.

    Args:
        importance: by the name of a group; all of these compete.
        fraction: of all units, or of what the network costs.
        multiple_of: what the number of units that are left in a group is a multiple of, where some go.
        cost: of the network; units then go by their importance for each unit of cost.
    """
    backend = np if _checks.are_known((importance, fraction)) else jnp  # nothing is compiled for numbers that come once
    units = np.array([len(values) for values in importance.values()])
    blocks = [_blocks(backend.asarray(values), multiple_of, backend) for values in importance.values()]
    if cost is not None:
        blocks = [_by_cost(own, number, units, cost) for number, own in enumerate(blocks)]
    values = backend.concatenate([np.zeros(0, np.float32), *(own.values for own in blocks)])
    sizes = np.concatenate([np.zeros(0, int), *(own.sizes for own in blocks)])
    of_each = np.zeros((len(sizes) + 1, len(blocks)), np.int32)
    group = np.repeat(np.arange(len(blocks)), [len(own.sizes) for own in blocks])
    of_each[np.arange(len(sizes)) + 1, group] = sizes
    order = backend.append(0, backend.argsort(values, stable=True) + 1)
    removed = backend.cumsum(backend.asarray(of_each)[order], 0)  # of each group, after no block, one, two, ...
    if cost is None:
        known = _checks.are_known(fraction)
        target = round(float(fraction) * sum(units)) if known else jnp.round(fraction * float(sum(units)))
        blocks_gone = (removed.sum(1) < target).sum()
    else:
        whole, costs = cost([*units.astype(float)]), cost([*(units.astype(float) - removed).T])
        blocks_gone = (costs > whole * (1 - fraction + _CLOSE)).sum()
    if cost is not None or multiple_of > 1:  # blocks before may have gone further than they were asked to
        blocks_gone = backend.maximum(blocks_gone, (values == -np.inf).sum())
    counts = removed[backend.minimum(blocks_gone, len(sizes))]
    return {
        name: jnp.asarray(backend.argsort(own.order) >= count)
        for name, own, count in zip(importance, blocks, counts, strict=True)
    }


def _blocks(importance: Real[Array | np.ndarray, " units"], multiple_of: int, backend: Any) -> _Blocks:
    order = backend.argsort(importance, stable=True)
    ordered, sizes = importance[order], sizes_of(len(importance), multiple_of)
    if multiple_of == 1:
        return _Blocks(sizes, ordered[: len(sizes)], order)
    ends = np.cumsum(sizes)
    means = [ordered[end - size : end].mean() for size, end in zip(sizes, ends, strict=True)]
    means = backend.stack(means) if means else ordered[:0]
    return _Blocks(sizes, backend.maximum.accumulate(means), order)


def _by_cost(blocks: _Blocks, number: int, units: Int[np.ndarray, " groups"], cost: Cost) -> _Blocks:
    """The same with what a unit is worth for what it costs: what the network saves if one unit of the group goes."""
    fewer = units.astype(float) - (np.arange(len(units)) == number)
    saved = float(cost([*units.astype(float)]) - cost([*fewer]))
    return blocks._replace(values=blocks.values / saved) if saved > 0 else blocks


def least_cost(units: Sequence[int], multiple_of: int, cost: Cost) -> float:
    """What the network costs if as many units go as can, as a fraction of what it costs with all of them."""
    left = [float(count - sizes_of(count, multiple_of).sum()) for count in units]
    return float(cost(left) / cost([float(count) for count in units]))
