"""The pruning criteria that the experiments compare, each under one name in flags, tables and figures."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from jax import Array
from jaxtyping import PRNGKeyArray

from ecjax import score
from ecjax.networks import Network, Params
from ecjax.train import Loss


class Calibration(NamedTuple):
    """What a criterion may look at besides the params."""

    network: Network
    inputs: Array
    targets: Array
    few_inputs: Array  # for the nonlinear criterion, whose cost is weights times samples
    loss: Loss
    metric: str


class Method(NamedTuple):
    """A criterion: its name in tables and figures, and its scores for given params and key."""

    label: str
    scores: Callable[[Calibration, Params, PRNGKeyArray], score.Scores]


METHODS = {
    "random": Method("random", lambda given, params, key: score.random(params, key)),
    "magnitude": Method("magnitude", lambda given, params, key: score.magnitude(params)),
    "gradient-magnitude": Method(
        "gradient magnitude",
        lambda given, params, key: score.gradient_magnitude(
            given.network, params, given.inputs, given.targets, given.loss
        ),
    ),
    "optimal-brain-damage": Method(
        "optimal brain damage",
        lambda given, params, key: score.optimal_brain_damage(given.network, params, given.inputs, metric=given.metric),
    ),
    "ec-euclidean": Method(
        "EC (Euclidean)",
        lambda given, params, key: score.elimination_compensation(given.network, params, given.inputs),
    ),
    "ec-fisher": Method(
        "EC (Fisher)",
        lambda given, params, key: score.elimination_compensation(given.network, params, given.inputs, metric="fisher"),
    ),
    "nonlinear-ec": Method(
        "nonlinear EC",
        lambda given, params, key: score.nonlinear_elimination_compensation(
            given.network, params, given.few_inputs, metric=given.metric
        ),
    ),
}
MethodName = Literal[tuple(METHODS)]
