"""Training, pruning, training: methods × sparsities × seeds, all seeds at once under ``vmap``."""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ecjax import prune, train
from ecjax.networks import Network, Params
from experiments.datasets import Dataset
from experiments.methods import METHODS, Calibration

DENSE, SMALL = "dense", "small dense"
TRAINED, PRUNED, FINE_TUNED = "trained", "pruned", "fine-tuned"


# What a classifier is judged by, on logits and labels.
CLASSIFIER_MEASURES = {
    "test_loss": lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(),
    "test_accuracy": lambda logits, labels: (logits.argmax(-1) == labels).mean(),
}


class Task(NamedTuple):
    """What is learnt, and how it is judged.

    Attributes:
        network: pure function ``(params, inputs) -> outputs``.
        data: the data set.
        loss: ``(outputs, targets) -> losses`` for training.
        measures: by the name of a column, ``(outputs, targets) -> number`` on the test set.
        batch_size: samples a step of training and fine-tuning.
    """

    network: Network
    data: Dataset
    loss: train.Loss
    measures: dict[str, Callable[[Array, Array], Array]]
    batch_size: int


class Row(NamedTuple):
    """One measured network. The dense one has sparsity 0 and the phase in which it was trained."""

    method: str
    sparsity: float
    seed: int
    phase: str
    measures: dict[str, float]


class Timed(NamedTuple):
    """What a method made of one network, and the seconds it took."""

    method: str
    sparsity: float
    seed: int
    result: Any
    seconds: float


def lines(rows: Iterable[Row], **where: Any) -> list[dict[str, Any]]:
    """Rows by column: first ``where``, then the keys, then the measures."""
    return [where | {name: row[i] for i, name in enumerate(Row._fields[:-1])} | row.measures for row in rows]


def plan(seeds: int, methods: Sequence[str], sparsities: Sequence[float], phases: Sequence[str]) -> list[list[Row]]:
    """The rows of ``run``, still without measures, unit by unit."""
    return [_plan_dense(seeds)] + [
        [Row(method, float(sparsity), seed, phase, {}) for phase in phases for seed in range(seeds)]
        for method in methods
        for sparsity in sparsities
    ]


def plan_timed(
    seeds: int, methods: Iterable[str], sparsities: Sequence[float], *, networks: int | None = None
) -> list[list[Row]]:
    """The rows of ``time_methods`` after those of the dense networks (one a seed, or so many): a unit each."""
    every = itertools.product(range(seeds), methods, sparsities)
    timed = [[Row(method, float(sparsity), seed, PRUNED, {})] for seed, method, sparsity in every]
    return [_plan_dense(seeds if networks is None else networks), *timed]


def _plan_dense(networks: int) -> list[Row]:
    return [Row(DENSE, 0.0, seed, TRAINED, {}) for seed in range(networks)]


def decaying_adam(task: Task, learning_rate: float, epochs: int) -> optax.GradientTransformation:
    """Adam whose learning rate falls to zero over the epochs along half a cosine."""
    steps = epochs * train.steps_per_epoch(len(task.data.train_inputs), task.batch_size)
    return optax.adam(optax.cosine_decay_schedule(learning_rate, max(steps, 1)))


def train_seeds(
    task: Task,
    initial: Callable[[Array], Params],
    seeds: int,
    *,
    optimizer: optax.GradientTransformation,
    epochs: int,
    advance: Callable[[int], None],
    targets: Array | None = None,
) -> Params:
    """Trains one network for each seed, side by side.

    Args:
        task: what is learnt.
        initial: fresh params from a random key.
        seeds: how many networks.
        optimizer: any optax transformation.
        epochs: passes over the training set.
        advance: called with the number of epochs done since the last call.
        targets: several versions of the training targets, stacked; each seed then learns each of them. None for the
            data's own.

    Returns:
        Their params, stacked along a leading axis: first all seeds on the first version of the targets, and so on.
    """
    versions = 1 if targets is None else len(targets)
    keys = jnp.tile(jax.vmap(jax.random.key)(jnp.arange(seeds)), versions)
    params = jax.vmap(initial)(keys)
    shuffles = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    each = None if targets is None else jnp.repeat(targets, seeds, axis=0)
    options = {"optimizer": optimizer, "epochs": epochs, "advance": advance}
    return _fit(task, params, None, shuffles, targets=each, **options)


def run(
    task: Task,
    params: Params,
    *,
    methods: Sequence[str],
    sparsities: Sequence[float],
    metric: str,
    calibration: int,
    nonlinear_calibration: int,
    optimizer: optax.GradientTransformation,
    epochs: int,
    advance: Callable[[int], None],
    done: Callable[..., bool],
    keep: Callable[[str, float, Params], None] | None = None,
) -> Iterator[list[Row]]:
    """Prunes trained networks by each method to each sparsity, and fine-tunes them.

    Args:
        task: what was learnt.
        params: trained params of every seed, stacked along a leading axis.
        methods: names in ``experiments.methods.METHODS``.
        sparsities: fractions of weights to remove.
        metric: output metric of the criteria that are not named after one.
        calibration: how many training samples the criteria see, the first ones.
        nonlinear_calibration: how many of these the nonlinear criterion sees.
        optimizer: for fine-tuning.
        epochs: of fine-tuning; 0 leaves that phase out.
        advance: called with the number of epochs done since the last call.
        done: ``(method=, sparsity=)``, whether an earlier start has finished these rows, which are left out.
        keep: called with each method, sparsity and the params in the end, of every seed, stacked.

    Yields:
        What is finished together: the rows of the dense networks, then those of each method and sparsity.
    """
    seeds = len(jax.tree.leaves(params)[0])
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    inputs = jnp.asarray(task.data.train_inputs[:calibration])
    targets = jnp.asarray(task.data.train_targets[:calibration])
    few_inputs = inputs[:nonlinear_calibration]
    seen = Calibration(task.network, inputs, targets, few_inputs, task.loss, metric)
    prune_seeds = jax.jit(jax.vmap(prune.one_shot, in_axes=(0, 0, None)))
    yield measure(task, params, DENSE, 0.0, TRAINED)
    for method in methods:
        left = [sparsity for sparsity in sparsities if not done(method=method, sparsity=sparsity)]
        if not left:
            continue
        scores = jax.jit(jax.vmap(functools.partial(METHODS[method].scores, seen)))(params, keys)
        for sparsity in left:
            pruned = prune_seeds(params, scores, jnp.float32(sparsity))
            rows = measure(task, pruned.params, method, sparsity, PRUNED)
            final = pruned.params
            if epochs:
                final = fine_tune(task, pruned, optimizer=optimizer, epochs=epochs, advance=advance)
                rows += measure(task, final, method, sparsity, FINE_TUNED)
            if keep is not None:
                keep(method, sparsity, final)
            yield rows


def fine_tune(
    task: Task,
    pruned: prune.Pruned,
    *,
    optimizer: optax.GradientTransformation,
    epochs: int,
    advance: Callable[[int], None],
) -> Params:
    """Trains pruned networks of every seed, stacked along a leading axis, and keeps their zeros."""
    seeds = len(jax.tree.leaves(pruned.params)[0])
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    return _fit(task, *pruned, keys, optimizer=optimizer, epochs=epochs, advance=advance)


def _fit(task, params, masks, keys, *, optimizer, epochs, advance, targets=None) -> Params:
    """Trains all seeds, one epoch a call so that progress can be shown."""
    inputs = jnp.asarray(task.data.train_inputs)
    targets, shared = (jnp.asarray(task.data.train_targets), True) if targets is None else (targets, False)
    state = jax.vmap(lambda params, key: train.start(params, optimizer, key))(params, keys)
    for _ in range(epochs):
        state = _epoch(task.network, state, masks, inputs, targets, task.loss, optimizer, task.batch_size, shared)
        jax.block_until_ready(state)
        advance(1)
    return state.params


@functools.partial(jax.jit, static_argnames=("network", "loss", "optimizer", "batch_size", "shared"))
def _epoch(network, state, masks, inputs, targets, loss, optimizer, batch_size, shared):
    def one_seed(state, masks, targets):
        options = {"optimizer": optimizer, "batch_size": batch_size, "masks": masks}
        return train.epoch(network, state, inputs, targets, loss, **options)[0]

    return jax.vmap(one_seed, in_axes=(0, 0, None if shared else 0))(state, masks, targets)


def measure(task: Task, params: Params, method: str, sparsity: float, phase: str) -> list[Row]:
    """A row for each of the networks stacked along the leading axis of ``params``."""
    measured = _measure(
        task.network,
        params,
        task.data.test_inputs,
        task.data.test_targets,
        tuple(task.measures.values()),
    )
    return [
        Row(method, sparsity, seed, phase, dict(zip(task.measures, map(float, values), strict=True)))
        for seed, values in enumerate(zip(*measured, strict=True))
    ]


def time_methods(
    methods: Mapping[str, Callable[[Any, float], Any]],
    give: Callable[[int], Any],
    sparsities: Sequence[float],
    *,
    seeds: int,
    done: Callable[..., bool],
) -> Iterator[Timed]:
    """Prunes one network at a time by each method to each sparsity, and takes the time.

    Args:
        methods: by name, functions of what they are given and a sparsity; each is called once more before it is timed,
            so that compilation does not count.
        give: what the methods see, by seed.
        sparsities: fractions to remove.
        seeds: how many networks.
        done: ``(method=, sparsity=, seed=)``, whether an earlier start has finished this row, which is left out.
    """
    compiled = set()
    for seed in range(seeds):
        every = itertools.product(methods, sparsities)
        left = [(name, sparsity) for name, sparsity in every if not done(method=name, sparsity=sparsity, seed=seed)]
        given = give(seed) if left else None
        for name, sparsity in left:
            if name not in compiled:
                jax.block_until_ready(methods[name](given, sparsity))
                compiled.add(name)
            start = time.perf_counter()
            result = jax.block_until_ready(methods[name](given, sparsity))
            yield Timed(name, sparsity, seed, result, time.perf_counter() - start)


def measure_timed(task: Task, params: Params, timed: Timed) -> Row:
    """The row of one pruned network."""
    (row,) = measure(task, jax.tree.map(lambda leaf: leaf[None], params), timed.method, timed.sparsity, PRUNED)
    return row._replace(seed=timed.seed, measures=row.measures | {"seconds": timed.seconds})


@functools.partial(jax.jit, static_argnames=("network", "measures"))
def _measure(network, params, inputs, targets, measures):
    outputs = jax.vmap(network, in_axes=(0, None))(params, inputs)
    return [jax.vmap(measure, in_axes=(0, None))(outputs, targets) for measure in measures]
