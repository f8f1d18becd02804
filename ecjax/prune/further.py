"""Decisions about a network that is pruned already: what was removed stays removed."""

import dataclasses

import jax.numpy as jnp

from ecjax import _checks, _trees
from ecjax._types import Inputs, Kernels, Network, Params, Patterns, Sparsities
from ecjax.graph.layers import chosen
from ecjax.prune import patterns
from ecjax.prune.masks import Pruned, least_important
from ecjax.prune.removal import How, remove
from ecjax.score import NeuronScores, Scores


def further(
    params: Params,
    scores: Scores,
    masks: Kernels,
    sparsity: Sparsities,
    *,
    scope: str | tuple[int, int] = "network",
    exclude: Patterns = (),
) -> Pruned:
    """Removes the weights of least importance, up to a sparsity, and before them all that the masks have removed.

    Of an N:M pattern the sparsity is the fraction of groups that have it.

    Raises:
        ValueError: as ``one_shot``.
    """
    excluded = chosen(exclude, list(_trees.by_path(params)))
    _checks.require_kernels(params, scores.importance, "importances")
    kept, scored = _trees.by_path(masks), _trees.by_path(scores.importance)
    for _, paths in patterns.groups(sparsity, [path for path in scored if path not in excluded]):
        for path in paths:
            if path not in kept:
                raise ValueError(
                    f"the criterion scores '{path}', which is no kernel or was left dense so far; give None in its "
                    "place, or a sparsity in every stage"
                )
    ranked = {  # below everything else, also below survivors of importance 0
        path: jnp.where(kept[path], value, -jnp.inf) if path in kept else value for path, value in scored.items()
    }
    importance = _trees.replace(scores.importance, ranked)
    scores = dataclasses.replace(scores, importance=importance)
    return _none_back(least_important(params, scores, sparsity, scope=scope, exclude=exclude), masks)


def fewer_units(
    network: Network,
    params: Params,
    inputs: Inputs,
    scores: NeuronScores,
    masks: Kernels,
    fraction: Sparsities,
    how: How,
    exclude: Patterns,
) -> Pruned:
    """Removes the units of least importance, and before them those of which nothing is left.

    Raises:
        ValueError: as ``neurons``.
    """
    return _none_back(remove(network, params, inputs, scores, fraction, how, exclude, masks), masks)


def _none_back(pruned: Pruned, masks: Kernels) -> Pruned:
    """What was pruned; a ValueError if a removed weight would be among those that stay."""
    before, after = _trees.by_path(masks), _trees.by_path(pruned.masks)
    back = sum(jnp.sum(~mask & after.get(path, True)) for path, mask in before.items())
    if _checks.are_known(back) and back:
        raise ValueError(
            f"{back} weights that are removed would come back: the sparsity is lower than it is already, in all or in "
            "some scope, or the criterion leaves out a kernel that is pruned. What was removed stays removed: go on to "
            "a higher sparsity, in the same scope, or start anew"
        )
    return pruned
