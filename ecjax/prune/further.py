"""Which weights go from a network that is pruned already: what was removed stays removed."""

import dataclasses

import jax.numpy as jnp

from ecjax import _checks, _trees
from ecjax._types import Kernels, Params, Patterns, Sparsities
from ecjax.graph.layers import chosen
from ecjax.prune import patterns
from ecjax.prune.masks import Pruned, least_important, require_none_back
from ecjax.score import Scores


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
    scores = dataclasses.replace(scores, importance=_trees.replace(scores.importance, ranked))
    if scores.bias_shift is not None:  # what went before has shifted its biases, whatever params the scores are of
        shifts = _trees.by_path(scores.bias_shift)
        left = {path: jnp.where(kept[path], shift, 0) for path, shift in shifts.items() if path in kept}
        scores = dataclasses.replace(scores, bias_shift=_trees.replace(scores.bias_shift, left))
    pruned = least_important(params, scores, sparsity, scope=scope, exclude=exclude)
    after = _trees.by_path(pruned.masks)
    back = sum(jnp.sum(~mask & after.get(path, True)) for path, mask in kept.items())
    require_none_back(back, "weights", "sparsity")
    return pruned
