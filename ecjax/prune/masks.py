"""Masks, and which weights they leave."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from ecjax import _checks, _trees, graph
from ecjax._types import Kernels, Params, Patterns, Sparsities, Sparsity
from ecjax.graph import Layer, Layers
from ecjax.graph.layers import chosen
from ecjax.prune import patterns
from ecjax.prune.selection import smallest_of
from ecjax.score import Scores

SCOPES = ("network", "layer", "neuron")


class Pruned(NamedTuple):
    """A pruned network.

    Attributes:
        params: as given, with removed weights exactly 0 and biases shifted.
        masks: Kernels of booleans, True where the weight stays: a pytree shaped like the params, with None in place of
            every leaf that is no kernel.

    Example:
        >>> pruned = prune.one_shot(params, scores, sparsity=0.5)
        >>> bool(((pruned.params["Dense_0"]["kernel"] != 0) == pruned.masks["Dense_0"]["kernel"]).all())
        True

        To go over Kernels and params together, None has to count as a leaf; over Kernels alone it does not:

        >>> kept = lambda mask, leaf: leaf.size if mask is None else int(mask.sum())
        >>> jax.tree.map(kept, pruned.masks, params, is_leaf=lambda leaf: leaf is None)
        {'Dense_0': {'bias': 8, 'kernel': 12}, 'Dense_1': {'bias': 2, 'kernel': 12}}
        >>> jax.tree.map(lambda mask: mask.shape, pruned.masks)
        {'Dense_0': {'bias': None, 'kernel': (4, 8)}, 'Dense_1': {'bias': None, 'kernel': (8, 2)}}
    """

    params: Params
    masks: Kernels


def least_important(
    params: Params,
    scores: Scores,
    sparsity: Sparsities,
    *,
    scope: str | tuple[int, int],
    exclude: Patterns,
) -> Pruned:
    """What ``one_shot`` does, and a part of an N:M pattern.

    Args:
        scores: of a criterion.
        sparsity: the fraction of weights to remove; for (N, M), of the groups that get the pattern, those that lose
            least of their importance first.
        scope: where weights, or for (N, M) groups of them, compete.
        exclude: patterns of paths of leaves that keep every bit.
    """
    scores = _checks.of_kind(scores, (Scores,), "scores are")
    _checks.require_kernels(params, scores.importance, "importances")
    excluded = chosen(exclude, list(_trees.by_path(params)))
    importance = _left(_trees.by_path(scores.importance), excluded)
    _checks.require_no_nan(importance, "importances")
    layers = _known(scores.layers, importance, scope)
    found = {}
    for number, paths in patterns.groups(sparsity, importance):
        found |= _masks({path: importance[path] for path in paths}, layers, number, scope)
    masks = _trees.as_kernels(params, found)
    if scores.bias_shift is None:
        return Pruned(apply_masks(params, masks), masks)
    _checks.require_kernels(params, scores.bias_shift, "bias shifts")
    shifts = _left(_trees.by_path(scores.bias_shift), excluded)
    _known(scores.layers, shifts, "neuron")
    return Pruned(apply_masks(_shift_biases(params, shifts, found, layers, excluded), masks), masks)


def _left(kernels: dict[str, Array], excluded: frozenset[str]) -> dict[str, Array]:
    """What is not excluded, by path."""
    left = {path: leaf for path, leaf in kernels.items() if path not in excluded}
    if not left:
        raise ValueError("every kernel is excluded; there is nothing to prune")
    return left


def _known(layers: Layers, kernels: dict[str, Array], scope: str | tuple[int, int]) -> dict[str, Layer]:
    """The layers by path; where weights compete within a neuron, all kernels must be among them."""
    known = {layer.kernel: layer for layer in layers}
    missing = [path for path in kernels if path not in known or known[path].of_kernel is None]
    if missing and scope not in ("network", "layer"):
        raise ValueError(
            f"which axes of kernel '{missing[0]}' are its inputs is not known; give the scores their layers: "
            "score.Scores(importance, bias_shift, layers=networks.layers(network, params, inputs))"
        )
    return known


def _require_finite_removed(importance: dict[str, Array], masks: dict[str, Array]) -> None:
    """Raises a ValueError if a weight of infinite importance goes: it was to be kept."""
    for path, mask in masks.items():
        removed = jnp.any(~mask & (importance[path] == jnp.inf))
        if _checks.are_known(removed) and removed:
            raise ValueError(
                f"the sparsity asks for more weights than there are of finite importance: some of '{path}', of "
                f"importance inf, would go; to keep a layer out, name it: exclude=('{path}',)"
            )


def require_none_back(back: Any, what: str, fraction: str) -> None:
    """Raises a ValueError if some of what is removed would be among what stays.

    Args:
        back: how many.
        what: they are.
        fraction: how it is called how many are to go.
    """
    if _checks.are_known(back) and back:
        raise ValueError(
            f"{back} {what} that are removed would come back: the {fraction} is lower than it is already, in all or in "
            "some scope, or the criterion leaves out what is pruned. What was removed stays removed: go on to a higher "
            f"{fraction}, in the same scope, or start anew"
        )


def require_scope(scope: Any, sparsity: Any) -> None:
    """Raises a ValueError unless ``scope`` is one, with a sparsity that can be used, or for (N, M) without one."""
    if isinstance(scope, tuple):
        if [type(number) for number in scope] != [int, int] or not 0 < scope[0] < scope[1]:
            raise ValueError(f"scope is {scope}; a pattern (N, M) keeps N of M inputs, with 0 < N < M")
        if sparsity is not None:
            raise ValueError(f"scope {scope} says itself how many weights stay; leave the sparsity out")
    elif scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}; it must be one of {', '.join(map(repr, SCOPES))}, or a pair (N, M)")
    elif sparsity is None:
        raise ValueError(f"scope {scope!r} needs a sparsity, the fraction of weights to remove")
    else:
        patterns.require_sparsities(sparsity)


def of_weights(sparsity: Sparsities, scope: str | tuple[int, int]) -> Sparsities:
    """The fraction of weights removed; for (N, M), the fraction of groups that have the pattern says it."""
    return patterns.towards(sparsity, 1 - scope[0] / scope[1]) if isinstance(scope, tuple) else sparsity


def apply_masks(params: Params, masks: Kernels) -> Params:
    """The same params with exact zeros where a mask is False; biases stay as they are.

    Args:
        masks: Kernels of booleans, True where the weight stays.

    Raises:
        ValueError: masks that are not boolean, or shaped unlike the params.

    Example:
        >>> none_stay = jax.tree.map(jnp.zeros_like, pruned.masks)
        >>> float(jnp.abs(prune.apply_masks(params, none_stay)["Dense_0"]["kernel"]).max())
        0.0
    """
    _checks.require_masks(params, masks)
    return _trees.masked(params, masks)


def sparsity(masks: Kernels) -> float:
    """The fraction of weights removed, of those that could be: of all kernels that have a mask; 0 if there are none.

    Raises:
        ValueError: masks that are not boolean.

    Example:
        >>> prune.sparsity({"kernel": jnp.array([[True, False], [False, False]])})
        0.75
    """
    _checks.require_boolean(masks)
    leaves = jax.tree.leaves(masks)
    total = sum(mask.size for mask in leaves)
    return sum(int(jnp.sum(~mask)) for mask in leaves) / max(total, 1)


def _masks(
    importance: dict[str, Array],
    layers: dict[str, Layer],
    sparsity: Sparsity,
    scope: str | tuple[int, int],
) -> dict[str, Array]:
    stacks = any(layer.of_kernel and layer.of_kernel.stacked for path, layer in layers.items() if path in importance)
    if scope == "network" or (scope == "layer" and not stacks):
        return keep_in_each(importance, sparsity, together=scope == "network")
    if isinstance(scope, tuple):
        return _keep_of_every(importance, layers, sparsity, *scope)
    choose = functools.partial(_keep_in_matrix if scope == "layer" else _keep_in_columns, sparsity=sparsity)
    found = {}
    for path, leaf in importance.items():
        if path not in layers or layers[path].of_kernel is None:  # of one that nothing is known of, all compete
            found[path] = _keep_in_matrix(leaf, sparsity=sparsity)
            continue
        matrices = jax.vmap(choose)(graph.as_matrices(leaf, layers[path].layout))
        found[path] = graph.as_leaf(matrices, layers[path].layout)
    _require_finite_removed(importance, found)
    return found


def keep_in_each(importance: dict[str, Array], sparsity: Sparsity, *, together: bool) -> dict[str, Array]:
    """False for the smallest of several arrays: of all together, or of each by itself.

    Raises:
        ValueError: an entry of infinite importance would go.
    """
    groups = [importance] if together else [{path: leaf} for path, leaf in importance.items()]
    found = {}
    for group in groups:
        found |= dict(zip(group, keep(list(group.values()), sparsity), strict=True))
    _require_finite_removed(importance, found)
    return found


def _keep_in_matrix(importance: Float[Array, "in out"], *, sparsity: Sparsity) -> Bool[Array, "in out"]:
    return keep([importance], sparsity)[0]


def _keep_in_columns(importance: Float[Array, "in out"], *, sparsity: Sparsity) -> Bool[Array, "in out"]:
    return jax.vmap(lambda column: keep([column], sparsity)[0])(importance.T).T  # a neuron's inputs side by side


def _keep_of_every(
    importance: dict[str, Array], layers: dict[str, Layer], sparsity: Sparsity, stay: int, group: int
) -> dict[str, Array]:
    """True for the ``stay`` largest of every ``group`` consecutive inputs of a neuron, in a fraction of the groups."""
    matrices = {path: graph.as_matrices(leaf, layers[path].layout) for path, leaf in importance.items()}
    found = {path: jax.vmap(lambda own: _largest(own, stay, group))(own) for path, own in matrices.items()}
    if not _checks.are_known(sparsity) or float(sparsity) < 1:  # else every group gets the pattern
        lost = [jax.vmap(lambda own: _lost(own, stay, group))(own) for own in matrices.values()]
        for (path, matrix), waits in zip(matrices.items(), keep(lost, sparsity), strict=True):
            found[path] |= jnp.repeat(waits, group, axis=1)[:, : matrix.shape[1]]
    found = {path: graph.as_leaf(kept, layers[path].layout) for path, kept in found.items()}
    _require_finite_removed(importance, found)
    return found


def _grouped(importance: Float[Array, "in out"], group: int) -> Float[Array, "groups group out"]:
    """Every ``group`` consecutive inputs; what fills up the last group is less than all else."""
    filled = jnp.pad(importance, ((0, -importance.shape[0] % group), (0, 0)), constant_values=-jnp.inf)
    return filled.reshape(-1, group, importance.shape[-1])


def _largest(importance: Float[Array, "in out"], stay: int, group: int) -> Bool[Array, "in out"]:
    ranks = _grouped(importance, group).argsort(1, stable=True).argsort(1)
    return (ranks >= group - stay).reshape(-1, importance.shape[-1])[: importance.shape[0]]


def _lost(importance: Float[Array, "in out"], stay: int, group: int) -> Float[Array, "groups out"]:
    """What groups lose by the pattern; minus infinity where all that is to go is gone, of importance minus infinity."""
    least = jnp.sort(_grouped(importance, group), axis=1)[:, : group - stay]
    gone = least == -jnp.inf
    return jnp.where(gone.all(1), -jnp.inf, jnp.where(gone, 0, least).sum(1))


def keep(importance: Sequence[Float[Array, "..."]], sparsity: Sparsity) -> list[Bool[Array, "..."]]:
    """False for the ``round(sparsity * weights)`` smallest of several arrays, the earlier ones first among equals."""
    weights = sum(leaf.size for leaf in importance)
    if _checks.are_known(sparsity):
        removed = round(float(sparsity) * weights)
    else:
        fraction = jnp.asarray(sparsity)
        removed = jnp.round(fraction.astype(jnp.promote_types(fraction.dtype, jnp.float32)) * float(weights))
    return [~there for there in smallest_of(importance, removed)]


def _shift_biases(
    params: Params,
    shifts: dict[str, Array],
    masks: dict[str, Array],
    layers: dict[str, Layer],
    excluded: frozenset[str],
) -> Params:
    """Adds to each bias that is not excluded the shifts of its neuron's removed weights."""
    leaves, biases = _trees.by_path(params), {}
    for path, mask in masks.items():
        layer = layers[path]
        if layer.bias is None or layer.bias in excluded:
            continue
        removed = graph.as_matrices(jnp.where(mask, 0, shifts[path]), layer.layout).sum(1, keepdims=True)
        bias = biases.get(layer.bias, leaves[layer.bias])  # several kernels may share the neurons of one bias
        biases[layer.bias] = bias + graph.as_leaf(removed, layer.bias_layout).astype(bias.dtype)
    _checks.require_finite(biases, "shifted biases")
    return _trees.replace(params, biases)
