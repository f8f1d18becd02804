"""Decisions about a network that is pruned already: what was removed stays removed."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from ecjax import _checks, _trees, graph
from ecjax._types import Kernels, Params, Patterns, Sparsities
from ecjax.graph.layers import chosen
from ecjax.prune import patterns
from ecjax.prune.masks import Pruned, one_shot
from ecjax.prune.neurons import neurons
from ecjax.score import NeuronScores, Scores


def further(
    params: Params,
    scores: Scores | NeuronScores,
    masks: Kernels,
    sparsity: Sparsities,
    *,
    scope: str = "network",
    exclude: Patterns = (),
) -> Pruned:
    """Removes what is least important, up to a sparsity, and before it all that the masks have removed already.

    Raises:
        ValueError: as ``one_shot`` or ``neurons``, or scores of neurons that are excluded.
    """
    excluded = chosen(exclude, list(_trees.by_path(params)))
    if not isinstance(scores, NeuronScores):
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
        return _none_back(one_shot(params, scores, sparsity, scope=scope, exclude=exclude), masks)
    for layer in scores.layers:
        if layer.kernel in excluded:
            raise ValueError(
                f"the criterion scores '{layer.kernel}', which is excluded: give it the same exclude, with "
                "functools.partial(criterion, exclude=...)"
            )
    return _none_back(neurons(params, _ranked_last(scores, masks), sparsity, scope=scope), masks)


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


def _ranked_last(scores: NeuronScores, masks: Kernels) -> NeuronScores:
    """Ranks neurons of which no weight is left below all others."""
    kept = _trees.by_path(masks)
    still = {
        own.kernel: graph.as_matrices(kept[following.kernel], following.layout)[0].any(1)
        for own, following in itertools.pairwise(graph.chain(scores.layers))
    }
    importance = jax.tree.map(lambda value, there: jnp.where(there, value, -jnp.inf), scores.importance, still)
    return dataclasses.replace(scores, importance=importance)
