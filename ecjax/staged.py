"""Pruning in stages: score, remove, repair, and again. ``prune.staged`` and ``prune.staged_neurons`` are from here.

The loop is short enough to be written by hand, with a schedule, a stop or measurements of one's own:

    >>> state = staged.start(network, params, inputs, metric="fisher")
    >>> for number in range(1, 5):
    ...     reached = 0.75 * (1 - (1 - number / 4) ** 3)
    ...     state = staged.step(network, state, inputs, reached)
    >>> pruned = staged.finish(state)
    >>> prune.sparsity(pruned.masks)
    0.75
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int, PRNGKeyArray

from ecjax import _batches, _checkpoints, _checks, _door, _precision, _progress, _trees, metrics, score
from ecjax._types import Inputs, Kernels, Metric, Network, Params, Patterns, Sparsities, Targets, Weights
from ecjax.graph.layers import as_patterns
from ecjax.moments.stream import has_many_rows
from ecjax.prune import patterns, regrowth
from ecjax.prune.further import further
from ecjax.prune.masks import Pruned, apply_masks, of_weights, require_scope
from ecjax.prune.neurons import as_how
from ecjax.prune.regrowth import Regrowth
from ecjax.prune.removal import remove, require_reachable
from ecjax.repair import Biases, Repair, Survivors, gauss_newton, repairs
from ecjax.score import NeuronScores, Scores, criteria
from ecjax.score.criteria import Criterion

__all__ = ["Stage", "State", "finish", "staged", "staged_neurons", "start", "step"]

_LEAST_SAMPLES = 2000  # of an early stage


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "masks", "metric", "targets", "weights", "damping", "steps", "objective", "stages", "key"],
    meta_fields=["exclude", "many_rows"],
)
@dataclasses.dataclass(frozen=True)
class State:
    """Where pruning in stages stands: a pytree, if the params are one of arrays.

    Attributes:
        params: pruned and repaired so far.
        masks: Kernels of booleans, True where the weight stays.
        metric: of the outputs.
        targets: what the repair aims at; None without one.
        weights: of samples or of their positions; None where all count the same.
        damping: of the repair, as the stages so far have adapted it.
        steps: of the repair so far.
        objective: what the repair has left of the mean distance to the targets, of the samples that the last stage saw;
            infinite without one.
        stages: how many there have been.
        key: random key of the next stage, for criteria that draw; or None.
        exclude: patterns of paths of leaves that are not pruned; static, like what follows.
        many_rows: whether the outputs have so many positions that criteria take a random probe of them.

    Example:
        >>> state = staged.start(network, params, inputs, repair=None)
        >>> float(state.objective), prune.sparsity(state.masks)
        (inf, 0.0)
    """

    params: Params
    masks: Kernels
    metric: metrics.Metric
    targets: Array | np.ndarray | None
    weights: Array | np.ndarray | None
    damping: Float[Array, ""]
    steps: Int[Array, ""]
    objective: Float[Array, ""]
    stages: Int[Array, ""]
    key: PRNGKeyArray | None
    exclude: tuple[str, ...] = ()
    many_rows: bool = False


class Stage(NamedTuple):
    """What a progress callback is told after each stage.

    Attributes:
        number: of the stage, from 1.
        stages: how many there are.
        sparsity: reached so far; of each pattern of paths, where it is given so.
        objective: what the repair has left of the mean distance to the targets, of all samples, those of weight 0 too;
            infinite without one.
        seconds: since the run began.

    Example:
        >>> tell = lambda stage: print(f"{stage.number} of {stage.stages}: {stage.sparsity:.3f}")
        >>> pruned = prune.staged(network, params, inputs, 0.8, stages=2, repair=None, metric="fisher", progress=tell)
        1 of 2: 0.700
        2 of 2: 0.800
    """

    number: int
    stages: int
    sparsity: Sparsities
    objective: Array
    seconds: float


def staged(
    network: Network,
    params: Params,
    inputs: Inputs,
    sparsity: Sparsities | None = None,
    *,
    stages: int = 10,
    samples: int | float | None = None,
    criterion: Criterion | str | None = None,
    repair: Repair | str | None = "survivors",
    metric: Metric = "euclidean",
    targets: Targets | None = None,
    weights: Weights | None = None,
    scope: str | tuple[int, int] = "network",
    exclude: Patterns = (),
    masks: Kernels | None = None,
    regrow: Regrowth | float | int | np.number | None = None,
    key: PRNGKeyArray | None = None,
    progress: bool | Callable[[Stage], None] | None = None,
    checkpoints: str | os.PathLike | None = None,
) -> Pruned:
    """Removes weights in stages, scores afresh before each and repairs after each.

    After a fraction t of the stages the sparsity is ``s(t) = r (1 − (1 − t)³)``: large steps while weights are plenty,
    small ones towards the end (Zhu, Gupta, arXiv:1710.01878). What was removed stays removed. Everything is compiled
    once, for all stages and all sparsities.

    Args:
        sparsity: r, the fraction of weights to remove in the end, in [0, 1]; or that of each pattern of paths, as in
            ``one_shot``. Each follows the schedule. Left out for N:M.
        stages: how many.
        samples: how many of the inputs the stages before the last see, for scores and repair alike, others in each; a
            number, or a fraction such as 0.25. If None, half of them and at least 2,000 where ``Survivors`` repair,
            which make up for it, and all otherwise. The last stage sees all.
        criterion: ``(network, params, inputs) -> Scores``, by name (``score.CRITERIA``) or as a function;
            elimination-compensation if None. One that takes ``metric``, ``exclude`` or ``key`` gets those of the run,
            unless ``functools.partial`` has given it others.
        repair: "survivors" moves all parameters left, "biases" all biases together, None only adds the criterion's own
            shifts; or a value, as ``repair.Survivors(iterations=10)``, or a function ``(network, params, masks, inputs,
            targets) -> params``, which gets ``metric`` and ``exclude`` if it takes them. Whatever it gives, removed
            weights stay zero.
        metric: of the outputs (``metrics``), for the criterion and the repair; Fisher at a temperature of the repair's
            own, that of ``metrics.temperature`` for survivors and 1 for biases, unless the repair is given a metric.
        targets: what the repair aims at: the outputs of the dense network if None, or see ``repair.Survivors``.
        scope: where weights compete, as in ``one_shot``. A pattern (N, M) grows over the stages: the groups of M inputs
            that lose least of their importance get it first, and r is 1.
        exclude: patterns of paths of leaves that are not pruned and do not count. A repair moves them like all that
            is left, unless ``repair.Survivors(frozen=...)`` names them.
        masks: of a network that is pruned already, True where the weight stays. What they removed stays removed and
            counts; without them, a repair may fill its zeros again. The stages go from their sparsity to r.
        regrow: a fraction such as 0.5, or ``prune.Regrowth``: after the last stage so many of the weights left grow
            back, those that would lower the repair's objective most alone (``g² / 2h``); all are repaired, as many are
            removed again, and it is kept if the objective has fallen, six times at most. Each takes as long as two last
            stages. On held-out images of MNIST two networks 784-40-20-10 lost 2.96 and 2.94 points at 0.98, 1.83 and
            2.03 with 0.5, and 1.62 and 1.93 with ``prune.Regrowth(1.0, criterion="optimal_brain_surgeon")``, whose
            cycles take three times as long. None for not at all.
        key: random key, split over the stages, for criteria that draw; where outputs with positions have more than
            256 rows a sample, for one probe. One that could take probes, as elimination-compensation, does not mind it
            where it takes none.
        progress: True for a bar on stderr or in a notebook, with sparsity, objective and the time left (with rich,
            ``pip install 'ecjax[progress]'``; else a line for each stage); or a function called after each stage.
        checkpoints: a folder for the state after each stage. A run that was stopped goes on there when it is called
            again with the same arguments, on other devices too; one that has ended is read from it. It takes the
            room of the params, masks and targets, two times. None keeps nothing.

    Raises:
        ValueError: bad input, as ``one_shot``, the criterion and the repair say; what nothing would read; a folder of
            checkpoints of another run.

    Example:
        >>> pruned = prune.staged(network, params, inputs, sparsity=0.75, stages=4, metric="fisher")
        >>> prune.sparsity(pruned.masks)
        0.75
        >>> how = {"criterion": "random", "key": jax.random.key(0), "repair": repair.Biases(iterations=2)}
        >>> prune.sparsity(prune.staged(network, params, inputs, sparsity=0.75, stages=4, **how).masks)
        0.75
    """
    require_scope(scope, sparsity)
    criterion = criteria.giving(criteria.named(criterion, score.CRITERIA), Scores)
    regrow = regrowth.named(regrow)
    given, of_run = (network, params, inputs, sparsity, stages, samples), (repair, metric, targets, weights)
    return _in_stages(criterion, *given, *of_run, {"scope": scope}, exclude, masks, key, progress, checkpoints, regrow)


def staged_neurons(
    network: Network,
    params: Params,
    inputs: Inputs,
    fraction: Sparsities,
    *,
    stages: int = 10,
    samples: int | float | None = None,
    criterion: Criterion | str | None = None,
    repair: Repair | str | None = "survivors",
    metric: Metric = "euclidean",
    targets: Targets | None = None,
    weights: Weights | None = None,
    scope: str = "network",
    by: str = "units",
    multiple_of: int = 1,
    exclude: Patterns = (),
    masks: Kernels | None = None,
    key: PRNGKeyArray | None = None,
    progress: bool | Callable[[Stage], None] | None = None,
    checkpoints: str | os.PathLike | None = None,
) -> Pruned:
    """Removes whole units in stages, as ``staged`` removes weights: neurons, channels, attention heads.

    What a repair moves leaves the entries of removed units at zero in every leaf.

    Args:
        fraction: to remove in the end, in [0, 1], or that of each pattern, as in ``neurons``.
        stages: how many.
        samples: as for ``staged``.
        criterion: ``(network, params, inputs) -> NeuronScores``, by name (``score.NEURON_CRITERIA``) or as a function;
            ``score.neuron_elimination_compensation`` if None.
        repair: as for ``staged``, like metric, targets, key and progress.
        targets: of the repair.
        scope: where units compete, as in ``neurons``, like by and multiple_of.
        by: what the fraction is of.
        multiple_of: what the number of units left in a group is a multiple of.
        exclude: patterns of paths of leaves that are not pruned; a repair moves them unless they are frozen.
        masks: of a network whose weights are pruned already, True where the weight stays; without them, a repair fills
            their zeros again.
        key: random key, as for ``staged``.
        progress: as for ``staged``, like checkpoints.
        checkpoints: a folder for the state after each stage.

    Raises:
        ValueError: bad input, as ``neurons``, the criterion and the repair say.

    Example:
        >>> pruned = prune.staged_neurons(network, params, inputs, fraction=0.25, stages=2, metric="fisher")
        >>> pruned.masks["Dense_0"]["kernel"].any(0).sum().item()
        6
    """
    how = as_how(fraction, scope, by, multiple_of)
    _door.enter(network, params, inputs, exclude=exclude, need="any")
    require_reachable(network, params, inputs, fraction, how, exclude)
    criterion = criteria.giving(criteria.named(criterion, score.NEURON_CRITERIA), NeuronScores)
    given, of_run = (network, params, inputs, fraction, stages, samples), (repair, metric, targets, weights)
    return _in_stages(criterion, *given, *of_run, how._asdict(), exclude, masks, key, progress, checkpoints)


def _in_stages(
    criterion,
    network,
    params,
    inputs,
    sparsity,
    stages,
    samples,
    repair,
    metric,
    targets,
    weights,
    how,
    exclude,
    masks,
    key,
    progress,
    checkpoints,
    regrow=None,
) -> Pruned:
    _checks.require_positive(stages, "stages")
    stages, repair, _ = int(stages), repairs.named(repair), _count(samples, of_all=1)
    _progress.require(progress)
    options = {"metric": metric, "weights": weights, "exclude": exclude, "key": key}
    require_read(network, params, inputs, criterion=criterion, repair=repair, **options)
    options["targets"] = targets
    state = start(network, params, inputs, repair=repair, masks=masks, **options)
    if regrow is not None:
        _require_regrown(network, inputs, regrow, repair, how["scope"], state, sparsity)
    facts = {"sparsity": sparsity, "stages": stages, "samples": samples, "criterion": criterion, "repair": repair}
    facts |= how | options | {"masks": masks, "params": params, "inputs": inputs, "regrow": regrow}
    facts = {name: value for name, value in facts.items() if value is not None}
    starts = 0.0
    if masks is not None and sparsity is not None and "by" not in how:  # of units, masks tell no fraction
        starts = patterns.begun(sparsity, _trees.by_path(state.masks))
    if samples is None and isinstance(repair, Survivors):
        samples = max(inputs.shape[0] // 2, _LEAST_SAMPLES)
    regrow = regrow or Regrowth(cycles=0)
    most = stages + regrow.cycles
    began = time.monotonic()

    def report(number, reached, state):
        if progress:
            jax.block_until_ready(state.objective)
            removed = of_weights(reached, how["scope"])
            tell(Stage(number, most, removed, state.objective, time.monotonic() - began))

    with (
        _progress.told(progress, "stage", most, ("sparsity", "objective")) as tell,
        _checkpoints.kept(checkpoints, facts, state) as (done, state, keep),
    ):
        for number in range(done + 1, stages + 1):
            reached = patterns.towards(sparsity, 1 - (1 - number / stages) ** 3, starts)
            last = number == stages
            given = {"samples": None if last else samples, "repair": repairs.of_stage(repair, last=last)}
            state = step(network, state, inputs, reached, criterion=criterion, **given, **how)
            keep(number, state)
            report(number, reached, state)
        for number in range(max(done, stages) + 1, most + 1):
            given = regrow.criterion or criterion, repairs.of_stage(repair, last=True), how["scope"], masks
            found = _regrown(network, state, inputs, sparsity, regrow.fraction, *given)
            if not found.objective < state.objective:
                break
            state = found
            keep(number, state)
            report(number, sparsity, state)
    return finish(state)


def _require_regrown(network, inputs, regrow: Regrowth, repair: Repair | None, scope, state: State, sparsity) -> None:
    """Raises a ValueError unless what grows back can be weighed, and counted."""
    if not isinstance(repair, Survivors):
        raise ValueError("regrow needs a repair of survivors, whose objective says what may return: repair='survivors'")
    if isinstance(scope, tuple):
        raise ValueError(f"regrow with scope {scope}: nothing grows back in a pattern (N, M); leave one of the two out")
    criterion = criteria.named(regrow.criterion, score.CRITERIA)
    criteria.require_drawn(criterion, state.key, state.many_rows)
    if getattr(criterion, "func", criterion) is score.optimal_brain_surgeon:
        layers = _door.enter(network, state.params, inputs, exclude=state.exclude, need="any").layers
        regrowth.require_few(state.params, layers, sparsity, regrow.fraction, _trees.by_path(state.masks))


def _regrown(network, state: State, inputs, sparsity, fraction, criterion, repair, scope, before) -> State:
    """Lets weights grow back that would lower the objective most, repairs, and removes as many again."""
    if state.targets is None or not _checks.are_known(state.objective):
        raise ValueError("regrow compares objectives, which can't be seen under jit or vmap; call it outside")
    # λ as large as the mean diagonal: estimates of the diagonal that are near 0 by chance would promise most.
    steps = gauss_newton.State(state.params, jnp.ones_like(state.damping), state.objective, state.steps)
    of_run = {"metric": state.metric, "weights": state.weights}
    gains = repairs.gains(repair, network, steps, state.masks, inputs, state.targets, **of_run)
    layers = _door.enter(network, state.params, inputs, exclude=state.exclude, need="any").layers
    more = {"fraction": fraction, "scope": scope, "layers": layers, "before": before}
    masks = regrowth.grown(state.params, state.masks, gains, sparsity, **more)
    state = _repaired(network, dataclasses.replace(state, masks=masks), inputs, state.targets, state.weights, repair)
    return step(network, state, inputs, sparsity, criterion=criterion, repair=repair, scope=scope)


def start(
    network: Network,
    params: Params,
    inputs: Inputs,
    *,
    repair: Repair | str | None = "survivors",
    metric: Metric = "euclidean",
    targets: Targets | None = None,
    weights: Weights | None = None,
    exclude: Patterns = (),
    masks: Kernels | None = None,
    key: PRNGKeyArray | None = None,
) -> State:
    """The state before the first stage: nothing more is removed, and the repair knows what to aim at.

    Args:
        repair: of every stage.
        metric: of every stage, like ``exclude``: the state holds both.
        targets: of the repair.
        masks: of a network that is pruned already, True where the weight stays, for kernels that are not excluded; what
            they removed stays removed, and no stage may ask for less.
        key: random key, for criteria that draw.

    Raises:
        ValueError: bad input, targets without a repair, or masks of a kernel that is excluded.

    Example:
        >>> staged.start(network, params, inputs).masks["Dense_0"]["kernel"].all().item()
        True
    """
    repair = repairs.named(repair)
    if repair is None and targets is not None:
        raise ValueError("targets are what a repair aims at, and there is none; leave them out, or name a repair")
    if key is not None:
        _checks.require_key(key)
    given = {"metric": metric, "targets": targets, "weights": weights}
    at = _door.enter(network, params, inputs, exclude=exclude, **given, need="any")
    targets = _batches.placed(targets)
    if targets is None and repair is not None:
        # Samples that are spread over devices are few on each; together they stay where they are.
        targets = _outputs(at.network, _batches.blocks(at.inputs) > 1, at.params, at.inputs)
    leaves = _trees.by_path(at.params)
    kept = {layer.kernel: jnp.ones_like(leaves[layer.kernel], bool) for layer in at.layers}  # spread as they are
    if masks is not None:
        params, before = apply_masks(params, masks), _trees.by_path(masks)
        strange = [path for path in before if path not in kept]
        if strange:
            raise ValueError(f"masks say what stays of '{strange[0]}', which is excluded; leave one of the two out")
        kept |= before
    masks = _trees.as_kernels(params, kept)
    beginning = gauss_newton.start(params, getattr(repair, "damping", 0.0))
    steps = {"damping": beginning.damping, "steps": beginning.steps, "objective": beginning.objective}
    steps["stages"] = jnp.int32(0)
    static = {"exclude": as_patterns(exclude), "many_rows": has_many_rows(at.outputs)}
    return State(params, masks, at.metric, targets, at.weights, **steps, key=key, **static)


def step(
    network: Network,
    state: State,
    inputs: Inputs,
    sparsity: Sparsities,
    *,
    samples: int | float | None = None,
    criterion: Criterion | str | None = None,
    repair: Repair | str | None = "survivors",
    scope: str | tuple[int, int] = "network",
    by: str = "units",
    multiple_of: int = 1,
) -> State:
    """One stage: scores what is left, removes weights or neurons up to a sparsity, and repairs.

    Args:
        state: of ``start``, or of the stage before.
        inputs: calibration inputs; others than before, if the state's targets are replaced by theirs.
        sparsity: to be reached, of all weights or of those of each pattern; of units with a criterion for neurons; for
            (N, M), the fraction of groups that have the pattern. Never lower than before.
        samples: how many of the inputs this stage sees, or which fraction, others than the stage before; all if None.
        criterion: gives Scores, or NeuronScores.
        repair: of this stage, with ten iterations unless it says another number.
        scope: where weights or units compete.
        by: what a fraction of units is of, as in ``neurons``, like multiple_of.
        multiple_of: what the number of units left in a group is a multiple of.

    Raises:
        ValueError: bad input, as ``one_shot`` or ``neurons``, the criterion and the repair say.

    Example:
        >>> state = staged.start(network, params, inputs, repair="biases")
        >>> state = staged.step(network, state, inputs, 0.5, criterion="magnitude", repair="biases")
        >>> prune.sparsity(state.masks)
        0.5
    """
    repair = repairs.named(repair)
    criterion = criteria.named(criterion, score.CRITERIA | score.NEURON_CRITERIA)
    criterion = criteria.giving(criterion, Scores, NeuronScores)
    criteria.require_drawn(criterion, state.key)
    key, now = (None, None) if state.key is None else jax.random.split(state.key)
    inputs, targets, weights = _part(inputs, state, samples)
    of_run = {"metric": state.metric, "weights": weights, "exclude": state.exclude}
    drawn = criteria.drawing(criterion, now, state.many_rows)
    scores = criteria.given(criterion, **of_run, **drawn)(network, state.params, inputs)
    if isinstance(scores, NeuronScores):
        how = as_how(sparsity, scope, by, multiple_of)
        given = scores, sparsity, how, state.exclude, state.masks
        params, masks = remove(network, state.params, inputs, *given)
    else:
        params, masks = further(state.params, scores, state.masks, sparsity, scope=scope, exclude=state.exclude)
    state = dataclasses.replace(state, params=params, masks=masks, key=key, stages=state.stages + 1)
    if repair is None:
        return state
    if targets is None:
        raise ValueError("the state has no targets for a repair: give the same repair to staged.start and staged.step")
    if isinstance(repair, Biases | Survivors):
        return _repaired(network, state, inputs, targets, weights, repair)
    moved = criteria.given(repair, **of_run)(network, params, masks, inputs, targets)
    inner, arrays, _ = _trees.split(network, params)
    groups = _door.units(inner, arrays, inputs, exclude=state.exclude)
    return dataclasses.replace(state, params=repairs.held(params, masks, moved, groups))


def _repaired(network, state: State, inputs, targets, weights, repair: Biases | Survivors) -> State:
    before = gauss_newton.State(state.params, state.damping, state.objective, state.steps)
    of_run = {"metric": state.metric, "weights": weights, "exclude": state.exclude}
    found = repairs.go_on(repair, network, before, state.masks, inputs, targets, **of_run)
    return dataclasses.replace(state, **found._asdict())


def _part(inputs: Inputs, state: State, samples: int | float | None) -> tuple[Any, Any, Any]:
    """The samples that a stage sees, with their targets and weights: evenly spaced, and others in each stage.

    Those of weight 0 are left out, but where samples lie on several devices.
    """
    data, count = (inputs, state.targets, state.weights), _count(samples, inputs.shape[0])
    if count is None or count >= inputs.shape[0]:
        return data
    blocks = _batches.blocks(_batches.placed(inputs))
    counting = _batches.counting(state.weights, blocks)
    if counting is not None:
        chosen = _every(jnp.asarray(counting), count, state.stages, 1)
        return jax.tree.map(lambda array: jnp.asarray(array)[chosen], data)
    return jax.tree.map(lambda array: _every(jnp.asarray(array), count, state.stages, blocks), data)


# Compiled as one, or the samples would be copied on the way.
_every = jax.jit(_batches.every, static_argnames=("size", "blocks"))


def _count(samples: int | float | None, of_all: int) -> int | None:
    """How many samples a number or a fraction of them is."""
    if samples is None:
        return None
    if isinstance(samples, float) and 0 < samples <= 1:
        return max(round(samples * of_all), 1)
    if isinstance(samples, bool) or samples < 1 or int(samples) != samples:
        raise ValueError(f"samples is {samples!r}; it must be a whole number of at least 1, or a fraction such as 0.25")
    return int(samples)


def finish(state: State) -> Pruned:
    """The pruned network.

    Example:
        >>> staged.finish(staged.start(network, params, inputs)).params is params
        True
    """
    return Pruned(state.params, state.masks)


def require_read(
    network: Network,
    params: Params,
    inputs: Inputs,
    *,
    criterion: Any,
    repair: Any,
    metric: Metric,
    weights: Weights | None,
    exclude: Patterns,
    key: PRNGKeyArray | None,
) -> None:
    """Raises a ValueError for options of a run that nothing would read, and for a missing key."""
    criterion = criteria.named(criterion, score.CRITERIA | score.NEURON_CRITERIA)
    outputs = _door.enter(network, params, inputs, exclude=exclude, need="any").outputs
    criteria.require_read(criterion, metric, weights, key, outputs, _read_by(repairs.named(repair)))


def _read_by(repair: Repair | None) -> tuple[str, ...]:
    """Which options of a run a repair reads."""
    if isinstance(repair, Biases | Survivors):
        return ("weights",) if repair.metric is not None else ("metric", "weights")
    return tuple(name for name in ("metric", "weights") if repair is not None and criteria.reads(repair, name))


@_precision.compiled("network", "together")
def _outputs(network: Network, together: bool, params: Params, inputs: Inputs) -> Array:
    """What the network answers, the targets of a repair without labels: all samples together, or in batches."""
    if together:
        return network(params, inputs)
    return lax.map(lambda sample: network(params, sample[None])[0], inputs, batch_size=1024)
