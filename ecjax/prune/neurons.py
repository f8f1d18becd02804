"""Removing whole hidden neurons of an MLP."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp

from ecjax import _checks, _trees, graph
from ecjax._types import Params, Sparsities
from ecjax.graph import Layer
from ecjax.prune import patterns
from ecjax.prune.masks import Pruned, apply_masks, keep_in_each
from ecjax.score import NeuronScores

NEURON_SCOPES = ("network", "layer")


def neurons(params: Params, scores: NeuronScores, fraction: Sparsities, *, scope: str = "network") -> Pruned:
    """Removes the hidden neurons of least importance, with all weights into and out of them.

    Exactly ``round(fraction * neurons)`` go in each scope; among equals, the ones that come first do. The biases of the
    next layer gain ``constant_j · W_j`` of each removed neuron. ``compact.compact`` then makes the arrays smaller.

    Args:
        params: of a multilayer perceptron.
        scores: of a criterion for neurons, for these params.
        fraction: of the hidden neurons to remove, in [0, 1]; or one for each pattern of the paths of kernels whose
            neurons go, as in ``one_shot``. Neurons of kernels that no pattern matches stay.
        scope: where neurons compete: "network", or each "layer".

    Returns:
        Pruned: with masks that are False for all weights into and out of the removed neurons.

    Raises:
        ValueError: a fraction outside [0, 1] or of a pattern that gets no kernel, an unknown scope, scores unlike the
            params or without their layers, or shifts that overflow.

    Example:
        >>> scores = score.neuron_elimination_compensation(network, params, inputs, metric="fisher")
        >>> pruned = prune.neurons(params, scores, fraction=0.5)
        >>> int(pruned.masks["Dense_1"]["kernel"].any(1).sum())
        4
    """
    patterns.require_sparsities(fraction)
    _checks.require_scores(scores, NeuronScores, "scores are")
    if scope not in NEURON_SCOPES:
        raise ValueError(f"scope is {scope!r}; for neurons it must be one of {', '.join(map(repr, NEURON_SCOPES))}")
    chain, leaves = graph.chain(scores.layers), _trees.by_path(params)
    _require_neurons(scores, chain, leaves)
    importance = {layer.kernel: scores.importance[layer.kernel] for layer in chain[:-1]}
    kept = {path: jnp.ones(leaf.shape, bool) for path, leaf in importance.items()}
    for number, paths in patterns.groups(fraction, importance):
        kept |= keep_in_each({path: importance[path] for path in paths}, number, together=scope == "network")
    masks = {layer.kernel: jnp.ones(layer.layout.sizes[1:], bool) for layer in chain}
    shifted = {}
    for own, following in itertools.pairwise(chain):
        masks[own.kernel] &= kept[own.kernel]
        masks[following.kernel] &= kept[own.kernel][:, None]
        if scores.constant is not None:
            bias = leaves[following.bias]
            weights = graph.as_matrices(leaves[following.kernel], following.layout)[0]
            shift = jnp.where(kept[own.kernel], 0, scores.constant[own.kernel]) @ weights
            shifted[following.bias] = bias + graph.as_leaf(shift[None, None], following.bias_layout).astype(bias.dtype)
    _checks.require_finite(shifted, "shifted biases")
    masks = {layer.kernel: graph.as_leaf(masks[layer.kernel][None], layer.layout) for layer in chain}
    as_kernels = _trees.as_kernels(params, masks)
    return Pruned(apply_masks(_trees.replace(params, shifted), as_kernels), as_kernels)


def _require_neurons(scores: NeuronScores, chain: Sequence[Layer], leaves: dict) -> None:
    for layer in chain:
        found = getattr(leaves.get(layer.kernel), "shape", "no such leaf")
        if found != layer.shape:
            raise ValueError(
                f"the scores are of another network: kernel '{layer.kernel}' is of shape {layer.shape} there, {found} "
                "in the params"
            )
    for given, name in ((scores.importance, "importances"), (scores.constant, "constants")):
        found = {path: leaf.shape for path, leaf in (given or {}).items()}
        expected = {layer.kernel: layer.layout.sizes[2:] for layer in chain[:-1]}
        if given is not None and found != expected:
            raise ValueError(f"{name} of neurons do not fit the hidden layers {expected}: {found} given")
    for layer in chain[1:]:
        if scores.constant is not None and layer.bias is None:
            raise ValueError(f"kernel '{layer.kernel}' has no bias to which the constants could be added")
    _checks.require_no_nan(scores.importance, "importances")
