"""The pruning criteria that the experiments compare."""

import functools
from collections.abc import Callable
from typing import Literal

from ecjax import score


def criteria(network, inputs, targets, few, loss, metric, fisher="fisher") -> dict[str, Callable[..., score.Scores]]:
    """By name: from trained params and a key to scores. Another criterion is one more entry.

    ``few`` are inputs for the nonlinear criterion, whose cost is weights times samples; ``fisher`` is EC's metric.
    """
    linear, nonlinear = score.elimination_compensation, score.nonlinear_elimination_compensation
    gradient = functools.partial(score.gradient_magnitude, targets=targets, loss=loss)
    return {
        "random": lambda params, key: score.random(network, params, inputs, key=key),
        "magnitude": lambda params, key: score.magnitude(network, params, inputs),
        "gradient-magnitude": lambda params, key: gradient(network, params, inputs),
        "optimal-brain-damage": lambda params, key: score.optimal_brain_damage(network, params, inputs, metric=metric),
        "ec-euclidean": lambda params, key: linear(network, params, inputs),
        "ec-fisher": lambda params, key: linear(network, params, inputs, metric=fisher),
        "nonlinear-ec": lambda params, key: nonlinear(network, params, few, metric=metric),
    }


METHODS = tuple(criteria(*[None] * 6))  # their names, for which no data are needed
MethodName = Literal[METHODS]
_LABELS = {"ec-euclidean": "EC (Euclidean)", "ec-fisher": "EC (Fisher)", "nonlinear-ec": "nonlinear EC"}


def label(method: str) -> str:
    """A method's name in tables and figures."""
    return _LABELS.get(method, method.replace("-", " ")) if method in METHODS else method
