"""From scores of units to a network without some of them: which go, their masks, and what takes their place."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from ecjax import _checks, _door, _trees, graph
from ecjax._types import Inputs, Kernels, Network, Params, Patterns, Sparsities
from ecjax.graph import Group, Layer, Layers
from ecjax.graph.costs import COSTS
from ecjax.graph.gone import entries_of, gone
from ecjax.graph.groups import atoms_by_name, couple
from ecjax.graph.layers import chosen
from ecjax.graph.readers import of_channels, readers
from ecjax.graph.reading import shape_of_two
from ecjax.prune import patterns, units
from ecjax.prune.masks import Pruned, apply_masks, require_none_back
from ecjax.score import NeuronScores


class How(NamedTuple):
    """How units are removed.

    Attributes:
        scope: where they compete: "network", or each group by itself, "layer".
        by: what the fraction is of: "units", "parameters" or "flops".
        multiple_of: what the number of units left in a group is a multiple of.
    """

    scope: str = "network"
    by: str = "units"
    multiple_of: int = 1


def remove(
    network: Network,
    params: Params,
    inputs: Inputs,
    scores: NeuronScores,
    fraction: Sparsities,
    how: How,
    exclude: Patterns = (),
    masks: Kernels | None = None,
) -> Pruned:
    """Removes the units of least importance.

    Args:
        scores: of the network's units.
        fraction: to remove.
        how: where units compete, and what the fraction is of.
        exclude: patterns of paths of leaves that keep every bit.
        masks: of what is removed already; None for nothing. Units of which nothing is left go first, and weights that
            are removed stay so.

    Raises:
        ValueError: scores unlike the groups of the network, shifts that overflow, or units that would come back.
    """
    inner, arrays, _ = _trees.split(network, params)
    layers = _door.layers(inner, arrays, inputs, exclude=exclude, need="any", each_alone=False)
    groups, leaves = _door.units(inner, arrays, inputs, exclude=exclude), _trees.by_path(arrays)
    _require_scores(scores, groups, layers, _door.groups(inner, arrays, inputs).named)
    groups = {name: group for name, group in groups.items() if name in scores.importance}
    importance = {name: jnp.asarray(scores.importance[name]) for name in groups}
    if masks is not None:
        before = gone(groups, leaves, _trees.by_path(masks))
        importance = {name: jnp.where(before[name], -jnp.inf, value) for name, value in importance.items()}
    removed = _removed(inner, arrays, inputs, importance, fraction, how)
    if masks is not None:
        back = sum(jnp.sum(before[name] & ~removed[name]) for name in groups)
        require_none_back(back, "units", "fraction")
    _require_finite(importance, removed)
    shifted, zeroed, kept = _without(layers, tuple(groups.items()), leaves, removed, scores.constant)
    _checks.require_finite(shifted, "shifted biases")
    pruned = Pruned(_trees.replace(params, shifted | zeroed), _trees.as_kernels(params, kept))
    if masks is None:
        return pruned
    both = {path: kept[path] & mask if path in kept else mask for path, mask in _trees.by_path(masks).items()}
    masks = _trees.as_kernels(params, kept | both)
    return Pruned(apply_masks(pruned.params, masks), masks)


@functools.partial(jax.jit, static_argnames=("layers", "groups"))
def _without(
    layers: Layers,
    groups: tuple[tuple[str, Group], ...],
    leaves: dict[str, Array],
    removed: dict[str, Bool[Array, " units"]],
    constant: Mapping[str, Float[Array, "units *values"]] | None,
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """By path: biases that have taken constants over, leaves with zeros in place of units, and the kernels' masks."""
    shapes = {path: np.shape(leaf) for path, leaf in leaves.items()}
    entries = entries_of(dict(groups), removed, shapes)
    shifted = {} if constant is None else _shifted(leaves, layers, dict(groups), removed, constant)
    moved = leaves | shifted
    zeroed = {path: jnp.where(here, 0, moved[path]) for path, here in entries.items()}
    kept = {layer.kernel: ~entries.get(layer.kernel, jnp.zeros(layer.shape, bool)) for layer in layers}
    return shifted, zeroed, kept


def _removed(network, params, inputs, importance, fraction: Sparsities, how: How) -> dict[str, Bool[Array, " units"]]:
    removed = {name: jnp.zeros(value.shape, bool) for name, value in importance.items()}
    for number, names in patterns.groups(fraction, importance, patterns.UNITS):
        for together in [names] if how.scope == "network" else [[name] for name in names]:
            here = {name: importance[name] for name in together}
            cost = None if how.by == "units" else _cost(network, params, inputs, together, how.by)
            stay = units.kept(here, number, multiple_of=how.multiple_of, cost=cost)
            removed |= {name: ~kept for name, kept in stay.items()}
    return removed


def _cost(network: Network, params: Params, inputs: Inputs, names, by: str) -> units.Cost:
    """What the network costs, by how many units some groups have left."""
    coupled = couple(network, _trees.shapes(params), shape_of_two(inputs))
    atoms = atoms_by_name(coupled)
    return lambda left: COSTS[by](coupled, {atoms[name]: count for name, count in zip(names, left, strict=True)})


def _shifted(
    leaves: Mapping[str, Array],
    layers: Layers,
    groups: Mapping[str, Group],
    removed: Mapping[str, Bool[Array, " units"]],
    constant: Mapping[str, Float[Array, "units *values"]],
) -> dict[str, Array]:
    """The biases with the constants of removed units; what two groups have in common, as a head has features, once."""
    constants: dict[str, tuple[Layer, str, Array, Array]] = {}
    for name, group in groups.items():
        values, start = jnp.reshape(jnp.asarray(constant[name]), (group.length, -1)), 0
        for layer, bias, places in readers(layers, group):
            stack, inputs, _ = layer.layout.sizes
            nothing = jnp.zeros(stack * inputs // layer.window, values.dtype)
            _, _, here, done = constants.get(layer.kernel, (layer, bias, nothing, nothing > 0))
            goes = removed[name][:, None] & ~done[places]
            own = values[:, start : start + places.shape[1]]
            here = here.at[places].set(jnp.where(goes, own, here[places]))
            constants[layer.kernel] = layer, bias, here, done.at[places].max(goes)
            start += places.shape[1]
    shifted: dict[str, Array] = {}
    for path, (layer, bias, here, _) in constants.items():
        weights = of_channels(jnp.asarray(leaves[path]), layer)
        shift = jnp.einsum("sj,sjo->so", here.reshape(weights.shape[:2]), weights, precision="highest")
        before = shifted.get(bias, leaves[bias])
        shifted[bias] = before + graph.as_leaf(shift[:, None], layer.bias_layout).astype(before.dtype)
    return shifted


def _require_scores(
    scores: NeuronScores, groups: Mapping[str, Group], layers: Layers, every: Mapping[str, Group]
) -> None:
    """Raises a ValueError unless there are scores for groups of this network, of their lengths, and none for others."""
    for name in scores.importance:
        if name in groups:
            continue
        if name in every:
            raise ValueError(
                f"the criterion scores the units of '{name}', of which a leaf is excluded: give it the same exclude, "
                "with functools.partial(criterion, exclude=...)"
            )
        raise ValueError(
            f"the scores are of another network: it has no units named '{name}' that could go; those that can are "
            f"named {', '.join(map(repr, every)) or 'none'}"
        )
    for name, values in scores.importance.items():
        if np.shape(values) != (groups[name].length,):
            raise ValueError(
                f"the scores are of another network: importances of the units of '{name}' are of shape "
                f"{np.shape(values)}, and there are {groups[name].length} of them"
            )
        if scores.constant is not None:
            count = sum(reader.values.shape[1] for reader in readers(layers, groups[name]))
            size = np.size(scores.constant.get(name, ()))
            if size != groups[name].length * count:
                raise ValueError(
                    f"constants of the units of '{name}' are {size} numbers; biases can take over {count} values of "
                    f"each of {groups[name].length} units"
                )
    _checks.require_no_nan(scores.importance, "importances")


def _require_finite(importance: Mapping[str, Array], removed: Mapping[str, Array]) -> None:
    """Raises a ValueError if a unit of infinite importance goes: it was to be kept."""
    for name, values in importance.items():
        lost = jnp.any(removed[name] & (values == jnp.inf))
        if _checks.are_known(lost) and lost:
            raise ValueError(
                f"the fraction asks for more units than there are of finite importance: some of '{name}', of "
                "importance inf, would go"
            )


def require_reachable(
    network: Network, params: Params, inputs: Inputs, fraction: Sparsities, how: How, exclude: Patterns
) -> None:
    """Raises a ValueError if no unit can go, or not as many as a fraction of the cost asks for.

    Args:
        fraction: to remove.
        how: what it is of.
        exclude: patterns of paths of leaves that keep every bit.
    """
    inner, arrays, _ = _trees.split(network, params)
    groups = _door.units(inner, arrays, inputs, exclude=exclude)
    able = {name: units.sizes_of(group.length, how.multiple_of).sum() for name, group in groups.items()}
    if not any(able.values()):
        raise ValueError(f"no unit of this network can go: {_why_none(inner, arrays, inputs, how, exclude)}")
    if how.by == "units" or isinstance(fraction, Mapping):
        patterns.groups(fraction, groups, patterns.UNITS)
        return
    cost = _cost(inner, arrays, inputs, list(groups), how.by)
    most = 1 - units.least_cost([group.length for group in groups.values()], how.multiple_of, cost)
    if _checks.are_known(fraction) and fraction > most + 1e-6:
        raise ValueError(
            f"fraction={fraction} of the {how.by} can't go: with all units that can, as each group keeps one, "
            f"{most:.4f} do"
        )


def _why_none(network: Network, params: Params, inputs: Inputs, how: How, exclude: Patterns) -> str:
    """For each group of units, why none of them can go."""
    excluded, told = chosen(exclude, list(_trees.by_path(params))), []
    for group in _door.groups(network, params, inputs):
        paths = [place.path for place in group.places if place.path in excluded]
        why = "; ".join(group.reasons)
        why = why or (f"'{paths[0]}' is excluded" if paths else f"are {group.length}, of which one is kept")
        if how.multiple_of > 1 and group.free and not paths:
            why = f"are {group.length}, of which a multiple of {how.multiple_of} is kept"
        makers = ", ".join(group.produced) or "what reads them: " + ", ".join(group.read)
        told.append(f"the {group.length} made by {makers} ({why})")
    return "; ".join(told) or "it has none that a leaf makes"
