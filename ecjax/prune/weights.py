"""Weights removed all at once."""

from ecjax import _checks
from ecjax._types import Kernels, Params, Patterns, Sparsities
from ecjax.prune.further import further
from ecjax.prune.masks import Pruned, least_important, require_scope
from ecjax.score import Scores


def one_shot(
    params: Params,
    scores: Scores,
    sparsity: Sparsities | None = None,
    *,
    scope: str | tuple[int, int] = "network",
    exclude: Patterns = (),
    masks: Kernels | None = None,
) -> Pruned:
    """Removes the weights of least importance, all at once, and shifts the biases next to them.

    Exactly ``round(sparsity * weights)`` go in each scope; among equals, the ones that come first do. The shifts of all
    removed weights are added to their biases, independently of each other: ``b_i += Σ_j Δb*_ij``. Source: Ballini et
    al., arXiv:2602.20467.

    Args:
        scores: of a criterion, for these params.
        sparsity: the fraction of weights to remove, in [0, 1]; biases don't count. Left out for N:M. It may be traced;
            of more than 2**24 weights, the number to remove is then rounded as float32 is. Or one for each pattern of
            paths, as in ``{"Dense_0/*": 0.95, "*": 0.8}``: of the patterns that match a kernel the first counts, the
            weights of one pattern compete with each other, and kernels that none matches stay dense and get no mask.
        scope: where weights compete: "network", each "layer" (of a stack, each member), or each "neuron" (the inputs of
            one output). Or a pair
            (N, M): of every M consecutive inputs of a neuron N stay, and of a last group of fewer, at most N.
        exclude: patterns of paths of leaves that keep every bit, biases too; a kernel's weights do not count.
        masks: of a network that is pruned already, True where the weight stays: what they removed stays removed, and
            counts. Without them, a removed weight of importance 0 ties with all others of importance 0.

    Returns:
        Pruned: with masks for the kernels that have scores, are not excluded, and have a sparsity.

    Raises:
        ValueError: a sparsity outside [0, 1], below that of the masks, of a pattern that gets no kernel, or that asks
            for a weight of infinite importance; an unknown scope; importances with NaN; scores or masks shaped unlike
            the params; shifts that overflow.

    Example:
        >>> sum(int(mask.sum()) for mask in jax.tree.leaves(prune.one_shot(params, scores, sparsity=0.75).masks))
        12
        >>> [int(mask.sum()) for mask in jax.tree.leaves(prune.one_shot(params, scores, scope=(2, 4)).masks)]
        [16, 8]
        >>> each = prune.one_shot(params, scores, sparsity={"Dense_0/*": 0.75, "*": 0.5})
        >>> [int(mask.sum()) for mask in jax.tree.leaves(each.masks)]
        [8, 8]
        >>> more = prune.one_shot(pruned.params, scores, sparsity=0.75, masks=pruned.masks)
        >>> bool((more.masks["Dense_0"]["kernel"] <= pruned.masks["Dense_0"]["kernel"]).all())
        True
        >>> prune.one_shot(params, scores, sparsity=75)
        Traceback (most recent call last):
        ValueError: sparsity is 75; it must be in [0, 1], the fraction of weights to remove
    """
    require_scope(scope, sparsity)
    fraction = 1 if sparsity is None else sparsity  # every group gets the pattern N:M
    if masks is None:
        return least_important(params, scores, fraction, scope=scope, exclude=exclude)
    _checks.require_masks(params, masks)
    return further(params, scores, masks, fraction, scope=scope, exclude=exclude)
