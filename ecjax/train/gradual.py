"""Gradual pruning: masks that grow while an optimiser trains what is left, with labels."""

import functools
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jaxtyping import Float, Int, Num, PRNGKeyArray

from ecjax import _checks, _door, _progress, _trees, score
from ecjax._types import Inputs, Kernels, Loss, Network, Params, Patterns, Sparsities, Targets
from ecjax.graph.layers import chosen
from ecjax.prune import patterns
from ecjax.prune.further import further
from ecjax.prune.masks import of_weights, require_scope
from ecjax.score import Scores, criteria
from ecjax.score.criteria import Criterion
from ecjax.staged import Stage
from ecjax.train.training import State, one_step, shuffled, start


class Gradual(NamedTuple):
    """What gradual pruning gives.

    Attributes:
        params: trained, with removed weights exactly 0.
        masks: Kernels of booleans, True where the weight stays.
        losses: the mean training loss of each epoch.

    Example:
        >>> found = train.gradually(network, params, inputs, labels, sparsity=0.5, epochs=20, **fit)
        >>> bool(((found.params["Dense_0"]["kernel"] != 0) == found.masks["Dense_0"]["kernel"]).all())
        True
    """

    params: Params
    masks: Kernels
    losses: Float[Array, " epochs"]


def gradually(
    network: Network,
    params: Params,
    inputs: Inputs,
    targets: Targets,
    loss: Loss,
    sparsity: Sparsities | None = None,
    *,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    epochs: int,
    batch_size: int = 128,
    stages: int = 20,
    begin: float | int = 0.0,
    end: float | int = 0.75,
    criterion: Criterion | str = "magnitude",
    calibration: Num[Array | np.ndarray, "_few *_features"] | None = None,
    scope: str | tuple[int, int] = "network",
    exclude: Patterns = (),
    progress: bool | Callable[[Stage], None] | None = None,
) -> Gradual:
    """Trains a network with labels, and removes weights in stages while it does.

    From a fraction ``begin`` of the training steps to ``end``, the weights are scored ``stages`` times at equal
    distances, and removed up to the sparsity of a cubic: after a fraction t of the stages it is
    ``s(t) = r (1 − (1 − t)³)``. What was removed stays removed, and the optimiser moves the others. One training step
    is compiled for all stages. With a sparsity of 0 this is ``fit``. Source: Zhu, Gupta, "To prune, or not to prune",
    arXiv:1710.01878, equation 1; there the criterion is magnitude.

    Args:
        params: where to start: of a trained network, or fresh ones with a ``begin`` above 0.
        targets: one for each sample, as ``fit`` takes them.
        loss: ``(outputs, targets) -> losses``, as optax's; its mean over a batch is minimised.
        sparsity: r, the fraction of weights to remove in the end, in [0, 1], or that of each pattern of paths, as in
            ``prune.one_shot``. Left out for N:M.
        optimizer: any optax transformation; compiled once for each object, so make it once. Its learning rate decides
            how much is recovered between two stages: one that has decayed to 0 at the end recovers nothing there.
        key: shuffles the samples anew each epoch, and is what a criterion that draws draws with.
        epochs: passes over the samples.
        batch_size: samples a step.
        stages: how many times weights are removed.
        begin: the fraction of the training steps at which the sparsity starts to grow; the first weights go one
            ``stages``-th of the way from here to the end.
        end: the fraction of the training steps at which the sparsity is reached; the rest is fine-tuning.
        criterion: ``(network, params, inputs) -> Scores``, by name (``score.CRITERIA``) or as a function; options of
            its own with ``functools.partial``.
        calibration: the inputs that the criterion sees at each stage; all inputs if None.
        scope: where weights compete, as in ``prune.staged``.
        exclude: patterns of paths of leaves that keep every bit. What is to be trained and not pruned is excluded from
            the criterion alone: ``functools.partial(score.magnitude, exclude="head/*")``.
        progress: True for a bar, as for ``prune.staged``; or a function called after each stage. The objective is the
            training loss, the mean over the steps since the stage before; the bar shows no more than the stages.

    Raises:
        ValueError: bad input, as ``fit``, ``prune.one_shot`` and the criterion say; fractions of the steps that are not
            ``0 <= begin < end <= 1``; a loss that gives params with NaN or infinity.

    Example:
        >>> found = train.gradually(network, params, inputs, labels, sparsity=0.75, epochs=20, stages=5, **fit)
        >>> prune.sparsity(found.masks)
        0.75
    """
    seen = inputs if calibration is None else calibration
    criterion = _checked(inputs, targets, key, sparsity, begin, end, criterion, scope)
    _progress.require(progress)
    for count, name in ((epochs, "epochs"), (batch_size, "batch_size"), (stages, "stages")):
        _checks.require_positive(count, name)
    of_arrays, arrays, static = _trees.split(network, params)
    layers = _door.layers(of_arrays, arrays, seen, exclude=exclude, need="any", each_alone=False)
    leaves = _trees.by_path(arrays)
    masks = _trees.as_kernels(params, {x.kernel: jnp.ones_like(leaves[x.kernel], bool) for x in layers})

    options = {"loss": loss, "optimizer": optimizer, "batch_size": int(batch_size)}
    options["frozen"] = chosen(exclude, list(_trees.by_path(params)))
    of_criterion = key if criteria.draws(criterion) else None
    run = _first(start(arrays, optimizer, key), inputs.shape[0], int(batch_size), int(epochs))
    steps = run.losses.size * run.order.shape[0]
    stops = [round(steps * (begin + (end - begin) * number / int(stages))) for number in range(int(stages) + 1)]
    began = time.monotonic()
    with _progress.told(progress, "stage", int(stages), ("sparsity", "objective")) as tell:
        for number, (before, stop) in enumerate(itertools.pairwise([0, *stops[1:]]), start=1):
            earlier = run.losses.sum()
            run = _train(of_arrays, run, inputs, targets, masks, before, stop, **options)
            params = _trees.whole(run.state.params, static)
            draw = None if of_criterion is None else jax.random.fold_in(of_criterion, number)
            scores = criteria.given(criterion, exclude=exclude, key=draw)(network, params, seen)
            reached = patterns.towards(sparsity, 1 - (1 - number / stages) ** 3)
            params, masks = further(params, scores, masks, reached, scope=scope, exclude=exclude)
            run = run._replace(state=run.state._replace(params=_trees.split(network, params)[1]))
            if progress:
                mean = (run.losses.sum() - earlier) * run.order.shape[0] / max(stop - before, 1)
                removed = of_weights(reached, scope)
                tell(Stage(number, int(stages), removed, jax.block_until_ready(mean), time.monotonic() - began))
    run = _train(of_arrays, run, inputs, targets, masks, stops[-1], steps, **options)
    _checks.require_finite(run.state.params, "params of the training")
    return Gradual(_trees.whole(run.state.params, static), masks, run.losses)


def _checked(inputs, targets, key, sparsity, begin, end, criterion, scope) -> Callable[..., Scores]:
    """The criterion, after a look at all that can be wrong; errors are those of ``gradually``."""
    _checks.require_inputs(inputs)
    _checks.require_targets(inputs, targets)
    _checks.require_key(key)
    if not 0 <= begin < end <= 1:
        raise ValueError(
            f"begin is {begin} and end is {end}; they are fractions of the training steps, with 0 <= begin < end <= 1"
        )
    require_scope(scope, sparsity)
    return criteria.giving(criteria.named(criterion, score.CRITERIA), Scores)


class _Run(NamedTuple):
    """Where training stands within an epoch."""

    state: State
    order: Int[Array, "steps batch"]  # of the samples, in this epoch
    losses: Float[Array, " epochs"]


def _first(state: State, samples: int, batch_size: int, epochs: int) -> _Run:
    _, order = shuffled(state.key, samples, batch_size)  # for its shape: the first step shuffles
    return _Run(state, order, jnp.zeros(epochs))


@functools.partial(jax.jit, static_argnames=("network", "loss", "optimizer", "batch_size", "frozen"))
def _train(network, run, inputs, targets, masks, before, stop, *, loss, optimizer, batch_size, frozen) -> _Run:
    """The training steps of these numbers, counted over all epochs."""
    of_epoch = run.order.shape[0]

    def step(number, run):
        state = run.state
        same, anew = lambda: (state.key, run.order), lambda: shuffled(state.key, inputs.shape[0], batch_size)
        key, order = lax.cond(number % of_epoch == 0, anew, same)
        batch = order[number % of_epoch]
        given = inputs[batch], targets[batch], loss, optimizer, masks
        (params, of_optimizer), value = one_step(network, state.params, state.optimizer, *given)
        leaves = _trees.by_path(state.params)
        params = _trees.replace(params, {path: leaves[path] for path in frozen if path in leaves})
        losses = run.losses.at[number // of_epoch].add(value.astype(run.losses.dtype) / of_epoch)
        return _Run(State(params, of_optimizer, key), order, losses)

    return lax.fori_loop(before, stop, step, run)
