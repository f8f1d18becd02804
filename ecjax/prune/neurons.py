"""Removing whole hidden neurons of an MLP."""

import itertools

import jax
import jax.numpy as jnp
from jax import Array

from ecjax import checks, networks
from ecjax.checks import Sparsity
from ecjax.networks import Kernels, Params
from ecjax.prune.masks import Pruned, apply_masks, keep
from ecjax.score import NeuronScores

NEURON_SCOPES = ("network", "layer")


def neurons(params: Params, scores: NeuronScores, fraction: Sparsity, *, scope: str = "network") -> Pruned:
    """Removes the hidden neurons of least importance, with all weights into and out of them.

    Exactly ``round(fraction * neurons)`` go in each scope; among equals, the ones that come first do. The biases of the
    next layer gain ``constant_j · W_j`` of each removed neuron. ``compact.compact`` then makes the arrays smaller.

    Args:
        params: an MLP's.
        scores: of a criterion for neurons, for these params.
        fraction: of the hidden neurons to remove, in [0, 1].
        scope: where neurons compete: "network", or each "layer".

    Returns:
        Pruned: with masks that are False for all weights into and out of the removed neurons.

    Raises:
        ValueError: a fraction outside [0, 1], an unknown scope, scores unlike the params, params that are not an MLP's,
            or shifts that overflow.

    Example:
        >>> scores = score.neuron_elimination_compensation(network, params, inputs, metric="fisher")
        >>> pruned = prune.neurons(params, scores, fraction=0.5)
        >>> compact.widths(compact.compact(pruned.params, nn.relu))
        (4, 2)
    """
    checks.require_sparsity(fraction)
    if scope not in NEURON_SCOPES:
        raise ValueError(f"scope is {scope!r}; for neurons it must be one of {', '.join(map(repr, NEURON_SCOPES))}")
    paths, leaves = networks.layers(params), networks.by_path(params)
    _require_neurons(scores, paths, leaves)
    if scores.constant is not None:
        checks.require_biases(params)
    kept = _kept({path: scores.importance[path] for path in paths[:-1]}, fraction, scope)
    masks = {path: jnp.ones(leaves[path].shape, bool) for path in paths}
    shifted = {}
    for own, following in itertools.pairwise(paths):
        masks[own] &= kept[own]
        masks[following] &= kept[own][:, None]
        if scores.constant is not None:
            bias = networks.bias_path(following)
            shift = jnp.where(kept[own], 0, scores.constant[own]) @ leaves[following]
            shifted[bias] = leaves[bias] + shift.astype(leaves[bias].dtype)
    checks.require_finite(shifted, "shifted biases")
    as_kernels = networks.replace(networks.kernels(params), masks)
    return Pruned(apply_masks(networks.replace(params, shifted), as_kernels), as_kernels)


def _kept(importance: dict[str, Array], fraction: Sparsity, scope: str) -> dict[str, Array]:
    if scope == "layer":
        return {path: keep(values, fraction) for path, values in importance.items()}
    if not importance:
        return {}
    together = keep(jnp.concatenate(list(importance.values())), fraction)
    ends = list(itertools.accumulate(values.size for values in importance.values()))
    return dict(zip(importance, jnp.split(together, ends[:-1]), strict=True))


def _require_neurons(scores: NeuronScores, paths: list[str], leaves: dict[str, Array]) -> None:
    for given, name in ((scores.importance, "importances"), (scores.constant, "constants")):
        found = {path: leaf.shape for path, leaf in (given or {}).items()}
        expected = {path: leaves[path].shape[1:] for path in paths[:-1]}
        if given is not None and found != expected:
            raise ValueError(f"{name} of neurons do not fit the hidden layers {expected}: {found} given")
    checks.require_no_nan(scores.importance, "importances")


def alive(params: Params, masks: Kernels) -> dict[str, Array]:
    """Which neurons of each hidden layer still have a weight out of them."""
    paths, kept = networks.layers(params), networks.by_path(masks)
    return {own: kept[following].any(1) for own, following in itertools.pairwise(paths)}


def ranked_last(scores: NeuronScores, still: dict[str, Array]) -> NeuronScores:
    """Ranks neurons that are already removed below all others."""
    importance = jax.tree.map(lambda value, there: jnp.where(there, value, -jnp.inf), scores.importance, still)
    return scores._replace(importance=importance)
