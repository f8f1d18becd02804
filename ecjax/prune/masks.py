"""Masks, and pruning in one shot."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Real

from ecjax import checks, networks
from ecjax.checks import Sparsity
from ecjax.networks import Kernels, Params
from ecjax.score import Scores

SCOPES = ("network", "layer", "neuron")


class Pruned(NamedTuple):
    """A pruned network.

    Attributes:
        params: as given, with removed weights exactly 0 and biases shifted.
        masks: Kernels of booleans, True where the weight stays.

    Example:
        >>> pruned = prune.one_shot(params, scores, sparsity=0.5)
        >>> bool(((pruned.params["Dense_0"]["kernel"] != 0) == pruned.masks["Dense_0"]["kernel"]).all())
        True
    """

    params: Params
    masks: Kernels


def one_shot(
    params: Params, scores: Scores, sparsity: Sparsity | None = None, *, scope: str | tuple[int, int] = "network"
) -> Pruned:
    """Removes the weights of least importance, all at once, and shifts the biases next to them.

    Exactly ``round(sparsity * weights)`` go in each scope; among equals, the ones that come first do. The shifts of all
    removed weights are added to their biases, independently of each other: ``b_i += Σ_j Δb*_ij``. Source: Ballini et
    al., arXiv:2602.20467.

    Args:
        params: the dense network's.
        scores: of a criterion, for these params.
        sparsity: the fraction of weights to remove, in [0, 1]; biases don't count. May be traced. Left out for N:M.
        scope: where weights compete: "network", each "layer", or each "neuron" (the inputs of one output). Or a pair
            (N, M): of every M consecutive inputs of a neuron N stay, and of a last group of fewer, at most N.

    Raises:
        ValueError: a sparsity outside [0, 1], an unknown scope, importances with NaN, scores shaped unlike the params,
            or shifts that overflow.

    Example:
        >>> sum(int(mask.sum()) for mask in jax.tree.leaves(prune.one_shot(params, scores, sparsity=0.75).masks))
        12
        >>> [int(mask.sum()) for mask in jax.tree.leaves(prune.one_shot(params, scores, scope=(2, 4)).masks)]
        [16, 8]
        >>> prune.one_shot(params, scores, sparsity=75)
        Traceback (most recent call last):
        ValueError: sparsity is 75; it must be in [0, 1], the fraction of weights to remove
    """
    require_scope(scope)
    if isinstance(scope, tuple):
        if sparsity is not None:
            raise ValueError(f"scope {scope} says itself how many weights stay; leave the sparsity out")
    elif sparsity is None:
        raise ValueError(f"scope {scope!r} needs a sparsity, the fraction of weights to remove")
    else:
        checks.require_sparsity(sparsity)
    checks.require_kernels(params, scores.importance, "importances")
    checks.require_no_nan(scores.importance, "importances")
    masks = _masks(scores.importance, sparsity, scope)
    if scores.bias_shift is None:
        return Pruned(apply_masks(params, masks), masks)
    checks.require_kernels(params, scores.bias_shift, "bias shifts")
    checks.require_biases(params)
    return Pruned(apply_masks(_shift_biases(params, scores.bias_shift, masks), masks), masks)


def require_scope(scope: str | tuple[int, int]) -> None:
    """Raises a ValueError unless ``scope`` is one."""
    if isinstance(scope, tuple):
        if not 0 < scope[0] < scope[1]:
            raise ValueError(f"scope is {scope}; a pattern (N, M) keeps N of M inputs, with 0 < N < M")
    elif scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}; it must be one of {', '.join(map(repr, SCOPES))}, or a pair (N, M)")


def apply_masks(params: Params, masks: Kernels) -> Params:
    """The same params with exact zeros where a mask is False; biases stay as they are.

    Args:
        params: of any network.
        masks: Kernels of booleans, True where the weight stays.

    Raises:
        ValueError: masks that are not boolean, or shaped unlike the params.

    Example:
        >>> none_stay = jax.tree.map(jnp.zeros_like, pruned.masks)
        >>> float(jnp.abs(prune.apply_masks(params, none_stay)["Dense_0"]["kernel"]).max())
        0.0
    """
    checks.require_masks(params, masks)
    leaves, kept = networks.by_path(params), networks.by_path(masks)
    return networks.replace(params, {path: jnp.where(mask, leaves[path], 0) for path, mask in kept.items()})


def sparsity(masks: Kernels) -> float:
    """The fraction of weights removed, over all kernels; 0 if there are none.

    Example:
        >>> prune.sparsity({"kernel": jnp.array([[True, False], [False, False]])})
        0.75
    """
    leaves = jax.tree.leaves(masks)
    total = sum(mask.size for mask in leaves)
    return sum(int(jnp.sum(~mask)) for mask in leaves) / max(total, 1)


def _masks(importance: Kernels, sparsity: Sparsity | None, scope: str | tuple[int, int]) -> Kernels:
    if isinstance(scope, tuple):
        return jax.tree.map(lambda layer: _keep_in_groups(layer, *scope), importance)
    if scope == "layer":
        return jax.tree.map(lambda layer: keep(layer.ravel(), sparsity).reshape(layer.shape), importance)
    if scope == "neuron":
        return jax.tree.map(lambda layer: _keep_in_columns(layer, sparsity), importance)
    leaves, structure = jax.tree.flatten(importance)
    kept = keep(jnp.concatenate([leaf.ravel() for leaf in leaves]), sparsity)
    starts = [sum(leaf.size for leaf in leaves[:index]) for index in range(1, len(leaves))]
    parts = zip(jnp.split(kept, starts), leaves, strict=True)
    return jax.tree.unflatten(structure, [part.reshape(leaf.shape) for part, leaf in parts])


def _keep_in_columns(importance: Float[Array, "*in out"], sparsity: Sparsity) -> Bool[Array, "*in out"]:
    columns = importance.reshape(-1, importance.shape[-1])
    kept = jax.vmap(lambda column: keep(column, sparsity), in_axes=1, out_axes=1)(columns)
    return kept.reshape(importance.shape)


def _keep_in_groups(importance: Float[Array, "*in out"], stay: int, group: int) -> Bool[Array, "*in out"]:
    """True for the ``stay`` largest of every ``group`` consecutive inputs; what fills up the last group goes first."""
    columns = importance.reshape(-1, importance.shape[-1])
    inputs = columns.shape[0]
    filled = jnp.pad(columns, ((0, -inputs % group), (0, 0)), constant_values=-jnp.inf)
    ranks = filled.reshape(-1, group, filled.shape[-1]).argsort(1, stable=True).argsort(1)
    kept = (ranks >= group - stay).reshape(filled.shape)
    return kept[:inputs].reshape(importance.shape)


def keep(importance: Float[Array, " weights"], sparsity: Sparsity) -> Bool[Array, " weights"]:
    """False for the ``round(sparsity * weights)`` smallest, the earlier ones first among equals."""
    weights = importance.shape[0]
    traced = isinstance(sparsity, jax.core.Tracer)
    removed = jnp.round(sparsity * weights) if traced else round(float(sparsity) * weights)
    return ~smallest(importance, removed)


def smallest(values: Real[Array, " weights"], count: int | Array) -> Bool[Array, " weights"]:
    """True for the ``count`` smallest values, the earlier ones first among equals.

    Args:
        values: any numbers, one for each weight.
        count: how many; may be traced.

    Example:
        >>> prune.smallest(jnp.array([3.0, 1.0, 2.0, 1.0]), 2).tolist()
        [False, True, False, True]
    """
    chosen = jnp.arange(values.size) < count
    return jnp.zeros(values.size, bool).at[jnp.argsort(values, stable=True)].set(chosen)


def _shift_biases(params: Params, shifts: Kernels, masks: Kernels) -> Params:
    """Adds to each bias the shifts of its neuron's removed weights."""
    leaves, kept = networks.by_path(params), networks.by_path(masks)

    def shifted(path, shift):
        bias = leaves[networks.bias_path(path)]
        removed = jnp.where(kept[path], 0, shift)
        return bias + removed.sum(tuple(range(removed.ndim - 1))).astype(bias.dtype)

    biases = {networks.bias_path(path): shifted(path, shift) for path, shift in networks.by_path(shifts).items()}
    checks.require_finite(biases, "shifted biases")
    return networks.replace(params, biases)
