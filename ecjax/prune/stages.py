"""Pruning step by step, with a repair after each."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ecjax import _door, _trees, batches, checks, compensate, devices, gauss_newton, metrics, precision, score
from ecjax.checks import Sparsity
from ecjax.graph import Layers
from ecjax.graph.layers import chosen
from ecjax.networks import Inputs, Kernels, Network, Params, Patterns, Targets
from ecjax.prune.masks import Pruned, one_shot, require_scope
from ecjax.prune.neurons import alive, neurons, ranked_last
from ecjax.score import NeuronScores, Scores

REPAIRS = (None, "biases", "survivors")
Criterion = Callable[[Network, Params, Inputs], Scores]


class Stage(NamedTuple):
    """What a progress callback is told after each stage.

    Attributes:
        number: of the stage, from 1.
        stages: how many there are.
        sparsity: reached so far.
        objective: what the repair has left of the mean distance to the targets; infinite without one.

    Example:
        >>> tell = lambda stage: print(f"{stage.number} of {stage.stages}: {stage.sparsity:.3f}")
        >>> pruned = prune.staged(network, params, inputs, 0.8, stages=2, repair=None, metric="fisher", progress=tell)
        1 of 2: 0.700
        2 of 2: 0.800
    """

    number: int
    stages: int
    sparsity: float | Array
    objective: Array


def staged(
    network: Network,
    params: Params,
    inputs: Inputs,
    sparsity: Sparsity,
    *,
    stages: int = 10,
    repair: str | None = "survivors",
    metric: str = "euclidean",
    criterion: Criterion | None = None,
    targets: Targets | None = None,
    scope: str | tuple[int, int] = "network",
    exclude: Patterns = (),
    temperature: float | int | None = None,
    damping: float | int = 0.01,
    progress: Callable[[Stage], None] | None = None,
    **options: float | int,
) -> Pruned:
    """Removes weights in stages, scores afresh before each and repairs after each.

    After a fraction t of the stages the sparsity is ``s(t) = r (1 − (1 − t)³)``: large steps while weights are plenty,
    small ones towards the end (Zhu, Gupta, arXiv:1710.01878). What was removed stays removed. Everything is compiled
    once, for all stages and all sparsities.

    Args:
        network: pure function ``(params, inputs) -> outputs`` of shape (samples, K).
        params: the dense network's.
        inputs: calibration inputs, samples along the first axis; no labels are needed.
        sparsity: r, the fraction of weights to remove in the end, in [0, 1].
        stages: how many.
        repair: "survivors" moves all parameters left, "biases" all biases together, None only adds the criterion's own
            shifts.
        metric: "euclidean" or, for the logits of a classifier, "fisher"; of the repair, and of the criterion if it is
            not given.
        criterion: ``(network, params, inputs) -> Scores``; elimination-compensation if None. For instance
            ``functools.partial(score.optimal_brain_damage, metric="fisher")``.
        targets: what the repair aims at: the outputs of the dense network if None, or see ``compensate.joint_biases``.
        scope: where weights compete, as in ``one_shot``; a pattern (N, M) has no stages.
        exclude: patterns of paths of leaves that keep every bit, in pruning and in repair, and do not count.
        temperature: of the repair in the metric "fisher". None for 4 with "survivors", which can keep more than a first
            choice, and 1 with "biases", which can't.
        damping: of the repair, at the start; each stage goes on with what the one before has adapted it to.
        progress: called after each stage.
        **options: of the repair, as ``iterations``, ``products`` or ``batch_size``: see ``compensate.survivors``.

    Raises:
        ValueError: bad input, as ``one_shot``, the criterion and the repair say; an unknown repair.

    Example:
        >>> pruned = prune.staged(network, params, inputs, sparsity=0.75, stages=4, metric="fisher")
        >>> prune.sparsity(pruned.masks)
        0.75
    """
    require_scope(scope)
    if isinstance(scope, tuple):
        raise ValueError(f"scope {scope} is of one sparsity, without stages: one_shot, then compensate.survivors")
    if criterion is None:
        criterion = functools.partial(score.elimination_compensation, metric=metric, exclude=exclude)

    def decide(network, params, masks, reached):
        scores = _removed_first(criterion(network, params, inputs), masks)
        return one_shot(params, scores, reached, scope=scope, exclude=exclude)

    shared = {"stages": stages, "repair": repair, "metric": metric, "targets": targets, "exclude": exclude}
    steps = {"temperature": temperature, "damping": damping, "progress": progress, **options}
    return _in_stages(decide, network, params, inputs, sparsity, **shared, **steps)


def staged_neurons(
    network: Network,
    params: Params,
    inputs: Inputs,
    fraction: Sparsity,
    *,
    stages: int = 10,
    repair: str | None = "survivors",
    metric: str = "euclidean",
    criterion: Callable[[Network, Params, Inputs], NeuronScores] | None = None,
    targets: Targets | None = None,
    scope: str = "network",
    exclude: Patterns = (),
    temperature: float | int | None = None,
    damping: float | int = 0.01,
    progress: Callable[[Stage], None] | None = None,
    **options: float | int,
) -> Pruned:
    """Removes whole hidden neurons of an MLP in stages, as ``staged`` removes weights.

    Args:
        network: an MLP as a pure function ``(params, inputs) -> outputs``.
        params: the dense network's.
        inputs: calibration inputs.
        fraction: of the hidden neurons to remove in the end, in [0, 1].
        stages: how many.
        repair: None, "biases" or "survivors".
        metric: "euclidean" or "fisher".
        criterion: ``(network, params, inputs) -> NeuronScores``; ``score.neuron_elimination_compensation`` if None.
        targets: as for ``staged``, like all arguments below.
        scope: where neurons compete: "network", or each "layer".
        exclude: patterns of paths of leaves that keep every bit; what is left must still be layer after layer.
        temperature: of the repair.
        damping: of the repair.
        progress: called after each stage.
        **options: of the repair.

    Raises:
        ValueError: bad input, as ``neurons``, the criterion and the repair say.

    Example:
        >>> pruned = prune.staged_neurons(network, params, inputs, fraction=0.25, stages=2, metric="fisher")
        >>> pruned.masks["Dense_0"]["kernel"].any(0).sum().item()
        6
    """
    if criterion is None:
        criterion = functools.partial(score.neuron_elimination_compensation, metric=metric, exclude=exclude)

    def decide(network, params, masks, reached):
        scores = criterion(network, params, inputs)
        excluded = chosen(exclude, list(_trees.by_path(params)))
        for layer in scores.layers:
            if layer.kernel in excluded:
                raise ValueError(
                    f"the criterion scores '{layer.kernel}', which is excluded: give it the same exclude, with "
                    "functools.partial(criterion, exclude=...)"
                )
        return neurons(params, ranked_last(scores, alive(scores, masks)), reached, scope=scope)

    shared = {"stages": stages, "repair": repair, "metric": metric, "targets": targets, "exclude": exclude}
    steps = {"temperature": temperature, "damping": damping, "progress": progress, **options}
    return _in_stages(decide, network, params, inputs, fraction, **shared, **steps)


def _in_stages(
    decide,
    network,
    params,
    inputs,
    sparsity,
    *,
    stages,
    repair,
    metric,
    targets,
    exclude,
    temperature,
    damping,
    progress,
    **options,
) -> Pruned:
    """Decides what to remove, removes and repairs it, stage after stage."""
    checks.require_sparsity(sparsity)
    checks.require_inputs(inputs)
    checks.require_positive(stages, "stages")
    metrics.require(metric)
    if repair not in REPAIRS:
        raise ValueError(f"repair is {repair!r}; it must be one of {', '.join(map(repr, REPAIRS))}")
    if options and not repair:
        raise ValueError(f"without a repair there is nothing to give {', '.join(options)} to")
    network, params, static = _trees.split(network, params)
    layers = _door.layers(network, params, inputs, exclude=exclude, scored=False, clear=False)
    inputs = devices.automatic(inputs)
    if targets is None and repair:
        # Samples that are spread over devices are few on each; together they stay where they are.
        targets = _outputs(network, params, inputs, together=batches.blocks(inputs) > 1)
    if temperature is None:
        temperature = 4 if repair == "survivors" else 1
    options |= {"metric": metric, "temperature": temperature}
    masks = _trees.as_kernels(params, {layer.kernel: jnp.ones(layer.shape, bool) for layer in layers})
    state = gauss_newton.start(params, damping)
    for number in range(1, stages + 1):
        reached = sparsity * (1 - (1 - number / stages) ** 3)
        pruned, masks = decide(network, state.params, masks, reached)
        state = state._replace(params=pruned)
        if repair:
            free = _free(repair, layers, pruned, masks, exclude)
            state = compensate.repair(network, state, free, inputs, targets, **options)
        if progress is not None:
            progress(Stage(number, stages, reached, state.objective))
    return Pruned(_trees.whole(state.params, static), masks)


def _free(repair: str, layers: Layers, params: Params, masks: Kernels, exclude: Patterns) -> gauss_newton.Free:
    """What a repair may move: nothing that is excluded."""
    free = compensate.every_bias(layers, params) if repair == "biases" else compensate.every_survivor(params, masks)
    excluded = chosen(exclude, list(_trees.by_path(params)))
    return {path: entries for path, entries in free.items() if path not in excluded}


@functools.partial(jax.jit, static_argnames=("network", "together"))
@precision.in_full
def _outputs(network: Network, params: Params, inputs: Inputs, *, together: bool) -> Array:
    """What the network answers, the targets of a repair without labels: all samples together, or in batches."""
    if together:
        return network(params, inputs)
    return lax.map(lambda sample: network(params, sample[None])[0], inputs, batch_size=1024)


def _removed_first(scores: Scores, masks: Kernels) -> Scores:
    """Ranks what is already removed below everything else, also below survivors of importance 0."""
    kept = _trees.by_path(masks)
    ranked = {
        path: jnp.where(kept[path], value, -jnp.inf) if path in kept else value
        for path, value in _trees.by_path(scores.importance).items()
    }
    return dataclasses.replace(scores, importance=_trees.replace(scores.importance, ranked))
