"""Criteria by name, and what of a run's options each of them takes."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from ecjax import _checks, metrics
from ecjax.moments.stream import has_many_rows
from ecjax.score.baselines import magnitude, random
from ecjax.score.definition import elimination_compensation_by_definition
from ecjax.score.linear import elimination_compensation, optimal_brain_damage
from ecjax.score.neuron_baselines import neuron_group_norm, neuron_norm, neuron_random, neuron_variance
from ecjax.score.neurons import (
    neuron_elimination_compensation,
    neuron_elimination_compensation_by_definition,
)
from ecjax.score.nonlinear import nonlinear_elimination_compensation
from ecjax.score.scores import AnyScores, NeuronScores, Scores
from ecjax.score.surgeon import optimal_brain_surgeon
from ecjax.score.wanda import wanda

# (network, params, inputs, **options) -> scores: which options of a run it takes is read from its signature.
Criterion = Callable[..., Scores | NeuronScores]
Result = TypeVar("Result")

_MANY_ROWS = (
    "the outputs have so many positions that the criterion takes random probes of them: give key=, such as "
    "jax.random.key(0)"
)

# By name, those that need no more than a key; others as functools.partial(score.gradient_magnitude, targets=..., ...).
CRITERIA: dict[str, Callable[..., Scores]] = {
    function.__name__: function
    for function in (
        elimination_compensation,
        elimination_compensation_by_definition,
        nonlinear_elimination_compensation,
        optimal_brain_damage,
        optimal_brain_surgeon,
        magnitude,
        random,
        wanda,
    )
}
NEURON_CRITERIA: dict[str, Callable[..., NeuronScores]] = {
    function.__name__: function
    for function in (
        neuron_elimination_compensation,
        neuron_elimination_compensation_by_definition,
        neuron_norm,
        neuron_group_norm,
        neuron_variance,
        neuron_random,
    )
}


def named(criterion: Any, names: Mapping[str, Criterion]) -> Criterion:
    """The criterion that a name stands for, or the criterion itself; the first of all for None.

    Raises:
        ValueError: another name, or what is no function.
    """
    if criterion is None:
        return next(iter(names.values()))
    found = names.get(criterion) if isinstance(criterion, str) else criterion
    if not isinstance(found, Callable):
        raise ValueError(
            f"criterion is {criterion!r:.80}; it must be one of {', '.join(map(repr, names))}, or a function (network, "
            "params, inputs) -> scores, such as functools.partial(score.gradient_magnitude, targets=labels, loss=loss)"
        )
    return found


def giving(criterion: Criterion, *kinds: type[AnyScores]) -> Callable[..., AnyScores]:
    """The criterion, whose scores must be of one of these kinds; a ValueError says what came instead."""

    @functools.wraps(criterion)
    def checked(*arguments, **options):
        return _checks.of_kind(criterion(*arguments, **options), kinds, "the criterion gave")

    return checked


def _keywords(function: Callable) -> dict[str, Any]:
    """What ``functools.partial`` has given a function already."""
    inner = inspect.unwrap(function, stop=lambda function: isinstance(function, functools.partial))
    return inner.keywords if isinstance(inner, functools.partial) else {}


def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # of some builtins there is no signature
        return {}


def reads(function: Callable, name: str) -> bool:
    """Whether a criterion, or a repair, takes an argument that it was not given yet."""
    return name in _parameters(function) and name not in _keywords(function)


def draws(criterion: Criterion, *, always: bool = False) -> bool:
    """Whether a criterion reads a random key: for probes only where it was given some, and ``always`` if it must."""
    if not reads(criterion, "key"):
        return False
    probes = "probes" not in _parameters(criterion) or _keywords(criterion).get("probes") is not None
    return probes and (not always or _parameters(criterion)["key"].default is inspect.Parameter.empty)


def require_read(
    criterion: Criterion,
    metric: Any,
    weights: Any,
    key: Any,
    outputs: jax.ShapeDtypeStruct,
    repair: tuple[str, ...] | None = None,
) -> None:
    """Raises a ValueError for options that nothing reads, and for a criterion that draws without a key.

    Args:
        criterion: of the run.
        metric: of the run, or its name.
        weights: of samples; None where all count the same.
        key: random key, or None.
        outputs: of the network.
        repair: which of these options the repair reads; None where there is none to read any.
    """
    nobody = "not read by this criterion" if repair is None else "read by neither this criterion nor this repair"
    metric, unread = metrics.named(metric), {"metric", "weights"}.difference(repair or ())
    unread = {name for name in unread if not reads(criterion, name)}
    if "metric" in unread and not isinstance(metric, metrics.Euclidean):
        one = "it" if repair is None else "one of them"
        raise ValueError(f"metric={metric!r} is {nobody}; leave it out, or let {one} take metric=")
    if "weights" in unread and weights is not None:
        raise ValueError(f"weights are {nobody}; leave them out")
    require_drawn(criterion, key, has_many_rows(outputs))
    # One that could take probes may need a key for another network: the same call works for all.
    if key is not None and not draws(criterion) and not reads(criterion, "probes"):
        raise ValueError("key is for criteria that draw, such as 'random'; this one does not, so leave it out")


def require_drawn(criterion: Criterion, key: Any, many_rows: bool = False) -> None:
    """Raises a ValueError for a criterion that draws without a key, always or where the metric has many rows."""
    if key is None and many_rows and reads(criterion, "probes"):
        raise ValueError(_MANY_ROWS)
    if key is None and draws(criterion, always=True):
        raise ValueError("this criterion draws at random: give key=, such as jax.random.key(0)")


def drawing(criterion: Criterion, key: Any, many_rows: bool) -> dict[str, Any]:
    """The key, where the criterion draws, and one probe where the rows of the metric are too many to take them all."""
    probes = 1 if key is not None and many_rows else None
    return {"key": key if probes or draws(criterion) else None, "probes": probes}


def given(function: Callable[..., Result], **options: Any) -> Callable[..., Result]:
    """The criterion, or the repair, with what it takes of these; what it does not take, it is not given."""
    taken = {name: option for name, option in options.items() if option is not None and reads(function, name)}
    return functools.partial(function, **taken)
