"""Removing whole units of any network: neurons, channels, attention heads."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import PRNGKeyArray

from ecjax import _checks, _door, score
from ecjax._types import Inputs, Kernels, Metric, Network, Params, Patterns, Sparsities, Weights
from ecjax.graph.costs import COSTS
from ecjax.moments.stream import has_many_rows
from ecjax.prune import patterns
from ecjax.prune.masks import Pruned
from ecjax.prune.removal import How, remove, require_reachable
from ecjax.score import NeuronScores, criteria
from ecjax.score.criteria import Criterion

NEURON_SCOPES = ("network", "layer")
BY = ("units", *COSTS)


def neurons(
    network: Network,
    params: Params,
    inputs: Inputs,
    fraction: Sparsities,
    *,
    criterion: Criterion | str | None = None,
    metric: Metric = "euclidean",
    weights: Weights | None = None,
    scope: str = "network",
    by: str = "units",
    multiple_of: int = 1,
    exclude: Patterns = (),
    masks: Kernels | None = None,
    key: PRNGKeyArray | None = None,
) -> Pruned:
    """Removes the units of least importance, with all that is theirs in every leaf.

    Units are what ``networks.groups`` says can go: hidden neurons, channels, features of a residual stream, attention
    heads and their features. A removed unit's entries are zero in all leaves, and the biases of those that read it gain
    ``constant · W`` of each. The outputs are those of the network without it, which ``compact.compact`` then is.

    Exactly ``round(fraction · units)`` go in each scope, as long as every group keeps one; among equals, those that
    come first do. By "parameters" or "flops" the units go that are least important for what they cost, until this
    fraction of what the network has, or of what its products take, is gone with them.

    Args:
        fraction: to remove, in [0, 1]; or one for each pattern of the names of groups (``networks.groups(...).named``),
            as in ``one_shot``: units of groups that no pattern matches stay.
        criterion: ``(network, params, inputs) -> NeuronScores``, by name (``score.NEURON_CRITERIA``) or as a function;
            ``score.neuron_elimination_compensation`` if None. One that takes ``metric``, ``weights``, ``exclude`` or
            ``key`` gets those given here.
        scope: where units compete: "network", or each group of units by itself, "layer".
        by: what the fraction is of: "units", "parameters" of the network, or "flops" of its products, where a
            multiplication and an addition are two and a scan's body counts as often as it turns. The last two are of
            the whole network, and go with one fraction and one scope.
        multiple_of: of 8, say, which accelerators like: the units left in a group are a multiple of it where some go,
            so that a few more go than were asked for; a group of fewer stays whole.
        exclude: patterns of paths of leaves that keep every bit: groups with such a leaf stay whole.
        masks: of a network that is pruned already, True where the weight stays: the masks that come back leave out
            what they removed, so that a repair does not bring it back.
        key: random key, for criteria that draw; where outputs with positions have more than 256 rows a sample, for one
            probe.

    Returns:
        Pruned: with masks for all kernels, False for all weights of removed units. Scales, biases and whatever else is
        theirs is zero in the params.

    Raises:
        ValueError: bad input; no unit that could go, with the reasons; a fraction that can't be reached; scores unlike
            the network's groups; shifts that overflow.

    Example:
        >>> pruned = prune.neurons(network, params, inputs, fraction=0.5, metric="fisher")
        >>> int(pruned.masks["Dense_1"]["kernel"].any(1).sum())
        4
        >>> smaller, small = compact.compact(network, pruned.params, inputs)
        >>> jax.tree.map(jnp.shape, small)["Dense_1"]
        {'bias': (2,), 'kernel': (4, 2)}
        >>> pruned = prune.neurons(network, params, inputs, fraction=0.4, by="parameters", criterion="neuron_norm")
        >>> int(pruned.masks["Dense_1"]["kernel"].any(1).sum())
        4
    """
    how = as_how(fraction, scope, by, multiple_of)
    criterion = criteria.giving(criteria.named(criterion, score.NEURON_CRITERIA), NeuronScores)
    given = {"metric": metric, "weights": weights, "exclude": exclude}
    outputs = _door.enter(network, params, inputs, **given, need="any").outputs
    criteria.require_read(criterion, metric, weights, key, outputs)
    require_reachable(network, params, inputs, fraction, how, exclude)
    drawn = criteria.drawing(criterion, key, has_many_rows(outputs))
    scores = criteria.given(criterion, **given, **drawn)(network, params, inputs)
    if masks is not None:
        _checks.require_masks(params, masks)
    return remove(network, params, inputs, scores, fraction, how, exclude, masks)


def as_how(fraction: Any, scope: Any, by: Any, multiple_of: Any) -> How:
    """How units are removed.

    Raises:
        ValueError: a fraction outside [0, 1], or what does not go together.
    """
    patterns.require_sparsities(fraction, patterns.UNITS)
    if scope not in NEURON_SCOPES:
        raise ValueError(f"scope is {scope!r}; for neurons it must be one of {', '.join(map(repr, NEURON_SCOPES))}")
    if by not in BY:
        raise ValueError(f"by is {by!r}; it must be one of {', '.join(map(repr, BY))}")
    if by != "units" and (scope != "network" or isinstance(fraction, Mapping)):
        raise ValueError(
            f"by={by!r} is a fraction of the whole network: give one number as the fraction, and scope='network'; with "
            "several fractions, or scope='layer', by='units' counts units"
        )
    _checks.require_positive(multiple_of, "multiple_of")
    return How(scope, by, int(multiple_of))
