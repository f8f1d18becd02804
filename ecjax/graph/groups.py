"""Groups of axes that must have the same length, and which of them may become shorter; shown as a table."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, PyTree

from ecjax import _trees
from ecjax.graph import tables, zeros
from ecjax.graph.atoms import Atoms, Axes, Axis
from ecjax.graph.couple import Walked, walk
from ecjax.graph.reading import trace
from ecjax.graph.uses import Uses, uses

_NAMED = 3  # paths in a cell of the table


class Place(NamedTuple):
    """An axis of a leaf along which the units of a group lie.

    Attributes:
        path: of the leaf.
        axis: which one of it.
        units: for each entry along it, the unit that it belongs to; -1 where it belongs to none of this group.

    Example:
        >>> networks.groups(network, params, inputs)[0].places[0]
        Place(path='Dense_0/bias', axis=0, units=(0, 1, 2, 3, 4, 5, 6, 7))
    """

    path: str
    axis: int
    units: tuple[int, ...]


class Group(NamedTuple):
    """Units that can only go together with all that is theirs in every leaf: a neuron, a channel, an attention head.

    Attributes:
        length: how many units there are.
        produced: the paths of the leaves that make them, in order of execution.
        read: what takes them up: paths of leaves, "a product of two values", "a sum".
        places: the axes of leaves along which they lie.
        reasons: why none of them can go, in words; empty if they can.

    Example:
        >>> group = networks.groups(network, params, inputs)[0]
        >>> group.length, group.produced, group.read, group.free
        (8, ('Dense_0/kernel',), ('Dense_1/kernel',), True)
        >>> [(place.path, place.axis) for place in group.places]
        [('Dense_0/bias', 0), ('Dense_0/kernel', 1), ('Dense_1/kernel', 0)]
    """

    length: int
    produced: tuple[str, ...]
    read: tuple[str, ...]
    places: tuple[Place, ...]
    reasons: tuple[str, ...]

    @property
    def free(self) -> bool:
        """Whether units of this group can go."""
        return not self.reasons


class Groups(tuple[Group, ...]):
    """All groups of a network, in order of execution: a tuple that prints as a table.

    Example:
        >>> networks.groups(network, params, inputs)
        units  made by         read by         can go
        ────────────────────────────────────────────────────────────────────
        8      Dense_0/kernel  Dense_1/kernel  yes
        2      Dense_1/kernel                  no: is an axis of the outputs
        4                      Dense_0/kernel  no: is an axis of the inputs
    """

    def __new__(cls, groups: Iterable[Group]):
        """Groups, in their order."""
        return super().__new__(cls, groups)

    @property
    def named(self) -> dict[str, Group]:
        """The groups whose units can go, by name: the path of the leaf that makes them, the first of several.

        Where a leaf makes several groups, as heads and their features, the second is called "path (2)", and so on.
        """
        found: dict[str, Group] = {}
        times: dict[str, int] = {}
        for group in self:
            if group.free:
                path = group.produced[0]
                times[path] = times.get(path, 0) + 1
                found[path if times[path] == 1 else f"{path} ({times[path]})"] = group
        return found

    def __repr__(self) -> str:
        """The table."""
        return tables.as_text(_cells(self))

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """The table in Jupyter."""
        return tables.as_html(_cells(self))


def _cells(groups: Groups) -> list[tuple[str, ...]]:
    rows, names = [("units", "made by", "read by", "can go")], iter(groups.named)
    for group in groups:
        name = next(names) if group.free else ""
        of_several = f", as '{name}'" if group.free and name != group.produced[0] else ""
        can = f"no: {'; '.join(group.reasons)}" if group.reasons else f"yes{of_several}"
        rows.append((f"{group.length:,}", _names(group.produced), _names(group.read), can))
    return rows


def _names(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return ", ".join(path or "(params)" for path in paths[:_NAMED]) + more


class Coupled(NamedTuple):
    """A network whose axes are known.

    Attributes:
        walked: its jaxpr.
        atoms: what its axes are made of.
        leaves: the axes of each leaf of its params, by path.
        uses: what makes and takes up the units of each atom.
    """

    walked: Walked
    atoms: Atoms
    leaves: dict[str, Axes]
    uses: Uses


def couple(network: Callable, params: PyTree, inputs: Any) -> Coupled:
    """Reads the axes of a network.

    Args:
        params: of arrays alone, or of their shapes.
        inputs: an array of samples, or its shape.

    Raises:
        ValueError: a network that does not take these.
    """
    closed = trace(network, params, inputs)
    leaves, atoms = _trees.by_path(params), Atoms()
    axes = {path: tuple(map(atoms.new, np.shape(leaf))) for path, leaf in leaves.items()}
    given = tuple(map(atoms.new, inputs.shape))
    for index, axis in enumerate(given):
        atoms.pin(axis, "is an axis of the inputs" if index else "is the axis of the samples")
    walked = walk(closed, [*axes.values(), given], atoms)
    for axis in (axis for result in walked.results for axis in result):
        atoms.pin(axis, "is an axis of the outputs")
    known = [zeros.of_leaf(path, own, atoms) for path, own in axes.items()]
    return Coupled(walked, atoms, axes, uses(walked, [*known, zeros.of_inputs(given)], atoms))


def of_coupled(coupled: Coupled) -> Groups:
    """The groups of a network of which the axes are known: those with an axis of a leaf."""
    return Groups(by_atom(coupled).values())


def by_atom(coupled: Coupled) -> dict[int, Group]:
    """The groups of a network by the atom that their units are, in order of execution."""
    atoms, uses = coupled.atoms, coupled.uses
    carried: dict[int, list[Place]] = {}
    for path, axes in coupled.leaves.items():
        for index, axis in enumerate(axes):
            for atom in dict.fromkeys(atoms.smallest(axis)):
                places = [Place(path, index, tuple(map(int, units))) for units in units_along(axis, atom, atoms)]
                carried.setdefault(atom, []).extend(places)
    order = [atom for atom in dict.fromkeys((*uses.produced, *uses.read)) if atom in carried]
    found = {atom: _group(atom, carried[atom], coupled) for atom in dict.fromkeys((*order, *carried))}
    return {
        atom: group
        for atom, group in found.items()
        if group.free or (group.length != 1 and (group.produced or group.read))
    }


def atoms_by_name(coupled: Coupled) -> dict[str, int]:
    """The atoms of groups whose units can go, by the group's name (``Groups.named``)."""
    found = by_atom(coupled)
    return dict(zip(Groups(found.values()).named, (atom for atom in found if found[atom].free), strict=True))


def _group(atom: int, places: list[Place], coupled: Coupled) -> Group:
    atoms, uses = coupled.atoms, coupled.uses
    read, made = tuple(uses.read.get(atom, ())), tuple(uses.produced.get(atom, ()))
    reasons = atoms.pins.get(atom, ())
    if not reasons and not made:
        made = tuple(dict.fromkeys(place.path for place in places if place.path not in read))
        reasons = () if made else ("no leaf makes them",)
    if not reasons and not read:
        reasons = ("nothing reads them",)
    return Group(atoms.lengths[atom], made, read, tuple(places), reasons)


def units_along(axis: Axis, atom: int, atoms: Atoms) -> list[Int[np.ndarray, " _"]]:
    """For each entry along an axis the unit of an atom that it belongs to, or -1; several where it belongs to two."""
    found: list[np.ndarray] = []
    expanded = atoms.expand(axis)
    for index, own in enumerate(expanded):
        if own == atom:
            here = [np.arange(atoms.lengths[own])]
        else:
            here, start = [], 0
            for part in atoms.segments.get(own, ()):
                for units in units_along(part, atom, atoms):
                    whole = np.full(atoms.lengths[own], -1)
                    whole[start : start + len(units)] = units
                    here.append(whole)
                start += atoms.length(part)
        outer, inner = atoms.length(expanded[:index]), atoms.length(expanded[index + 1 :])
        found += [np.tile(np.repeat(units, inner), outer) for units in here]
    return functools.reduce(_overlaid, found, [])


def _overlaid(found: list[np.ndarray], units: np.ndarray) -> list[np.ndarray]:
    """Units of the same atom in other places of the axis, in one array where they don't overlap."""
    for index, before in enumerate(found):
        if ((before < 0) | (units < 0)).all():
            return [*found[:index], np.where(before < 0, units, before), *found[index + 1 :]]
    return [*found, units]
