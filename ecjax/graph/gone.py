"""Units of which nothing is left: all their weights are removed, and all their other entries are zero."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool

from ecjax.graph.groups import Group, Place


def gone(
    groups: Mapping[str, Group], leaves: Mapping[str, Array], masks: Mapping[str, Array]
) -> dict[str, Bool[Array, " units"]]:
    """By the name of a group, which of its units have no entry left: none that a mask keeps or that is not zero.

    Args:
        groups: by name.
        leaves: of the params, by path.
        masks: by path, True where a weight stays; leaves without a mask are looked at themselves.
    """
    paths = {place.path for group in groups.values() for place in group.places}
    given = ({path: leaf for path, leaf in arrays.items() if path in paths} for arrays in (leaves, masks))
    return _gone(tuple(groups.items()), *given)


@functools.partial(jax.jit, static_argnames="groups")
def _gone(groups, leaves, masks):
    return {name: ~_some(group, leaves, masks) for name, group in groups}


def _some(group: Group, leaves: Mapping[str, Array], masks: Mapping[str, Array]) -> Bool[Array, " units"]:
    found = jnp.zeros(group.length + 1, bool)
    for place in group.places:
        entries = masks[place.path] if place.path in masks else jnp.asarray(leaves[place.path]) != 0
        others = tuple(axis for axis in range(entries.ndim) if axis != place.axis)
        found = found.at[_of_units(place, group)].max(entries.any(others))
    return found[: group.length]


def _of_units(place: Place, group: Group) -> np.ndarray:
    """The unit of each entry along an axis; one more where it is of none."""
    units = np.asarray(place.units, int)
    return np.where(units < 0, group.length, units)


def entries_of(
    groups: Mapping[str, Group], units: Mapping[str, Bool[Array, " units"]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Bool[Array, "..."]]:
    """By the path of a leaf, which of its entries belong to some units; without leaves that have none of these groups.

    Args:
        groups: by name.
        units: of each, which ones.
        shapes: of all leaves.
    """
    found: dict[str, Array] = {}
    for name, chosen in units.items():
        for place in groups[name].places:
            along = jnp.append(chosen, False)[_of_units(place, groups[name])]
            shape = shapes[place.path]
            here = along.reshape([-1 if axis == place.axis else 1 for axis in range(len(shape))])
            found[place.path] = jnp.broadcast_to(found.get(place.path, False) | here, shape)
    return found


def of_removed_units(
    groups: Mapping[str, Group], leaves: Mapping[str, Array], masks: Mapping[str, Array]
) -> dict[str, Bool[Array, "..."]]:
    """By the path of a leaf without a mask, which of its entries are zero because their unit was removed.

    Args:
        groups: by name.
        leaves: of the params, by path.
        masks: by path, True where a weight stays.
    """
    shapes = {path: np.shape(leaf) for path, leaf in leaves.items()}
    found = entries_of(groups, gone(groups, leaves, masks), shapes)
    return {path: entries for path, entries in found.items() if path not in masks}
