"""Where units are read: the operations that sum over them, and where samples and units lie in what is summed over.

A unit that goes is left out of all of these sums. In a product of two values that both have it, as of queries and keys,
leaving it out on one side is enough.
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from ecjax.graph.atoms import Axes
from ecjax.graph.couple import CUSTOM_JVP, CUSTOM_VJP, Walked
from ecjax.graph.groups import Coupled, units_along
from ecjax.graph.roles import CALLS
from ecjax.graph.samples import whole_numbers

_PRODUCTS = ("dot_general", "conv_general_dilated")
Site = tuple[int, ...]


class Along(NamedTuple):
    """Where samples, or the units of a group, lie.

    Attributes:
        axis: of a value.
        entries: for each entry along it the sample or the unit that it belongs to; -1 where it belongs to none.
    """

    axis: int
    entries: Int[np.ndarray, " _"]


class Read(NamedTuple):
    """An operation that sums over units.

    Attributes:
        site: which equation of the jaxpr: its index, after those of the calls and scans that it is in.
        side: which of its operands is looked at: the one that the samples are in.
        units: by atom, where they lie in that operand, along the axes that are summed over.
        samples: where the samples lie in it; None where they can't be told apart.
        others: the axes that are summed over, all of them.
        product: whether it is a product with a kernel or of two values; a sum otherwise.
    """

    site: Site
    side: int
    units: dict[int, list[Along]]
    samples: Along | None
    others: tuple[int, ...]
    product: bool


class Reads(NamedTuple):
    """All places where units are read.

    Attributes:
        found: in order of execution.
        hidden: by atom, why it can't be seen how its units are read, in words.
    """

    found: list[Read]
    hidden: dict[int, str]

    @property
    def by_sample(self) -> bool:
        """Whether the samples can be told apart wherever units are read."""
        return all(read.samples is not None for read in self.found)


def reads(coupled: Coupled, atoms: Collection[int]) -> Reads:
    """Where the units of some atoms are read.

    Args:
        coupled: a network whose axes are known.
        atoms: that units are.
    """
    found = Reads([], {})
    (samples, *_), wanted = coupled.walked.axes[coupled.walked.jaxpr.invars[-1]], frozenset(atoms)
    of_samples = coupled.atoms.expand(samples)
    _follow(coupled, coupled.walked, of_samples[0] if len(of_samples) == 1 else None, wanted, found, (), "")
    return found


def _follow(
    coupled, walked: Walked, samples: int | None, wanted: frozenset[int], found: Reads, site: Site, hidden: str
):
    for index, equation in enumerate(walked.jaxpr.eqns):
        name, here, inside = equation.primitive.name, (*site, index), walked.inside.get(index, ())
        if inside:
            why = hidden or _why_hidden(name)
            for body in inside[: 1 if name in CALLS else None]:
                _follow(coupled, body, samples, wanted, found, here, why)
            continue
        summed = _summed(coupled, equation, walked.operands(equation), wanted)
        if not any(summed):
            continue
        if hidden:
            found.hidden.update(dict.fromkeys((atom for side in summed for atom in side), hidden))
            continue
        found.found.append(_read(coupled, equation, walked.operands(equation), summed, samples, here))


def _why_hidden(name: str) -> str:
    if name in (*CUSTOM_JVP, *CUSTOM_VJP):
        return "a function with a derivative of its own"
    return {"while": "a while loop", "cond": "a branch"}.get(name, "")


def _axes_summed(equation) -> tuple[tuple[int, ...], ...]:
    """The axes of each operand that an equation sums over; () where it does not."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return tuple(map(whole_numbers, params["dimension_numbers"][0]))
    if name == "conv_general_dilated" and params["batch_group_count"] == 1:
        return (params["dimension_numbers"].lhs_spec[1],), (params["dimension_numbers"].rhs_spec[1],)
    return (whole_numbers(params["axes"]),) if name == "reduce_sum" else ()


def _summed(coupled: Coupled, equation, operands: list[Axes], wanted: frozenset[int]) -> list[frozenset[int]]:
    """The atoms that an equation sums over, of each operand; in a convolution only those that its kernel has."""
    axes = _axes_summed(equation)
    found = [
        wanted.intersection(atom for axis in chosen for atom in coupled.atoms.smallest(operand[axis]))
        for operand, chosen in zip(operands, axes, strict=False)
    ]
    return [found[1], found[1]] if equation.primitive.name == "conv_general_dilated" and found else found


def _read(coupled: Coupled, equation, operands, summed, samples: int | None, site: Site) -> Read:
    places = [_samples_along(coupled, operand, samples) for operand in operands]
    with_samples = [side for side in range(len(summed)) if places[side] is not None]
    side = with_samples[0] if with_samples else 0
    axes = _axes_summed(equation)[side]
    units = {
        atom: [
            Along(axis, entries) for axis in axes for entries in units_along(operands[side][axis], atom, coupled.atoms)
        ]
        for atom in sorted(summed[side])
    }
    return Read(site, side, units, places[side], axes, equation.primitive.name in _PRODUCTS)


def _samples_along(coupled: Coupled, axes: Axes, samples: int | None) -> Along | None:
    """Where the samples lie; None where they don't, or where not every entry is of one."""
    found = [
        Along(index, entries)
        for index, axis in enumerate(axes)
        for entries in (units_along(axis, samples, coupled.atoms) if samples is not None else ())
    ]
    return found[0] if len(found) == 1 and (found[0].entries >= 0).all() else None
