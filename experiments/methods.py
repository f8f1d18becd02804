"""The pruning criteria that the experiments compare. Another one is one more entry of METHODS."""

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


# By the name that --methods takes, in tables and figures with spaces or as LABELS says.
METHODS: dict[str, Callable[[Calibration, Params, PRNGKeyArray], score.Scores]] = {
    "random": lambda seen, params, key: score.random(seen.network, params, seen.inputs, key=key),
    "magnitude": lambda seen, params, key: score.magnitude(seen.network, params, seen.inputs),
    "gradient-magnitude": lambda seen, params, key: score.gradient_magnitude(
        seen.network, params, seen.inputs, targets=seen.targets, loss=seen.loss
    ),
    "optimal-brain-damage": lambda seen, params, key: score.optimal_brain_damage(
        seen.network, params, seen.inputs, metric=seen.metric
    ),
    "ec-euclidean": lambda seen, params, key: score.elimination_compensation(seen.network, params, seen.inputs),
    "ec-fisher": lambda seen, params, key: score.elimination_compensation(
        seen.network, params, seen.inputs, metric="fisher"
    ),
    "nonlinear-ec": lambda seen, params, key: score.nonlinear_elimination_compensation(
        seen.network, params, seen.few_inputs, metric=seen.metric
    ),
}
LABELS = {"ec-euclidean": "EC (Euclidean)", "ec-fisher": "EC (Fisher)", "nonlinear-ec": "nonlinear EC"}
MethodName = Literal[tuple(METHODS)]
