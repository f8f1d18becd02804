"""Methods × sparsities × seeds, whose rows are kept as they are found: all seeds under one ``vmap``, or one by one."""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.progress import Progress

from ecjax import networks, prune, train
from ecjax.networks import Network, Params
from experiments.datasets import Dataset
from experiments.methods import label
from experiments.results import Folder, Rows

DENSE, SMALL = "dense", "small dense"
TRAINED, PRUNED, FINE_TUNED = "trained", "pruned", "fine-tuned"
_KEYS = ("data", "layers", "noise", "method", "sparsity", "seed", "phase")  # of a row; the other columns are measured
Row = dict[str, Any]
Methods = Mapping[str, Callable[[Any, float], prune.Pruned]]

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
# What a classifier is judged by, on logits and labels.
CLASSIFIER_MEASURES = {
    "test_loss": lambda logits, labels: cross_entropy(logits, labels).mean(),
    "test_accuracy": lambda logits, labels: (logits.argmax(-1) == labels).mean(),
}


class Task(NamedTuple):
    """What is learnt, and how it is judged: ``measures`` are the columns, numbers from outputs and targets."""

    network: Network
    data: Dataset
    loss: networks.Loss
    measures: dict[str, Callable[[jax.Array, jax.Array], jax.Array]]
    batch_size: int = 128


@dataclass
class Table:
    """Where the rows of a sweep go: all rows, a progress bar, the columns these share, and a folder for networks."""

    rows: Rows
    bar: Progress
    shared: Row
    kept: Folder | None = None
    name: str = ""  # at the progress bar, before each method's

    def has(self, method: str, sparsity: float, seed: int, phase: str) -> bool:
        """Whether a row is finished, and its network saved if it is to be."""
        key = {"method": method, "sparsity": sparsity, "seed": seed}
        return (self.kept is None or self.kept.has(**key)) and self.rows.has(**self.shared, **key, phase=phase)

    def expect(self, total: int) -> None:
        """Shows how many rows of all there are, from now on."""
        self.step = self.bar.add_task(self.name, total=total, completed=self.rows.count(**self.shared))

    def add(self, found: Iterable[Row]) -> None:
        """Keeps rows, unless they are there already."""
        for row in (self.shared | row for row in found):
            if not self.rows.has(**{key: value for key, value in row.items() if key in _KEYS}):
                self.rows.add(row)
            words = f"{self.name}{label(row['method'])}, {row['sparsity']:g}"
            self.bar.update(self.step, description=words, completed=self.rows.count(**self.shared))


def decaying_adam(task: Task, learning_rate: float, epochs: int) -> optax.GradientTransformation:
    """Adam whose learning rate falls to zero over the epochs along half a cosine."""
    steps = epochs * train.steps_per_epoch(len(task.data.train_inputs), task.batch_size)
    return optax.adam(optax.cosine_decay_schedule(learning_rate, max(steps, 1)))


def train_seeds(task: Task, mlp: networks.MLP, seeds: int, optimizer, epochs: Iterable[int]) -> Params:
    """Trains one network for each seed, side by side; the params come stacked along a leading axis."""
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    first = jnp.asarray(task.data.train_inputs[:1])
    params = jax.vmap(lambda key: mlp.init(key, first)["params"])(keys)
    shuffles = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    return _fit(task, params, None, shuffles, optimizer, epochs)


def fine_tune(task: Task, pruned: prune.Pruned, optimizer: optax.GradientTransformation, epochs: int) -> Params:
    """Trains pruned networks of every seed, stacked along a leading axis, and keeps their zeros."""
    keys = jax.vmap(jax.random.key)(jnp.arange(len(jax.tree.leaves(pruned.params)[0])))
    return _fit(task, pruned.params, pruned.masks, keys, optimizer, range(epochs))


def _fit(task, params, masks, keys, optimizer, epochs) -> Params:
    inputs, targets = jnp.asarray(task.data.train_inputs), jnp.asarray(task.data.train_targets)
    state = jax.vmap(lambda params, key: train.start(params, optimizer, key))(params, keys)
    for _ in epochs:
        state = _epoch(task.network, state, masks, inputs, targets, task.loss, optimizer, task.batch_size)
        jax.block_until_ready(state)
    return state.params


@functools.partial(jax.jit, static_argnames=("network", "loss", "optimizer", "batch_size"))
def _epoch(network, state, masks, inputs, targets, loss, optimizer, batch_size):
    def one_seed(state, masks):
        options = {"optimizer": optimizer, "batch_size": batch_size, "masks": masks}
        return train.epoch(network, state, inputs, targets, loss, **options)[0]

    return jax.vmap(one_seed)(state, masks)


def one_seed(params: Params, seed: int) -> Params:
    """The params of one of the networks stacked along a leading axis."""
    return jax.tree.map(lambda leaf: leaf[seed], params)


def measure(task: Task, params: Params, method: str, sparsity: float, phase: str) -> list[Row]:
    """A row for each of the networks stacked along the leading axis of ``params``, which are numbered as seeds."""
    tests = task.data.test_inputs, task.data.test_targets
    measured = _measure(task.network, params, *tests, tuple(task.measures.values()))
    return [
        {"method": method, "sparsity": sparsity, "seed": seed, "phase": phase}
        | dict(zip(task.measures, map(float, values), strict=True))
        for seed, values in enumerate(zip(*measured, strict=True))
    ]


@functools.partial(jax.jit, static_argnames=("network", "measures"))
def _measure(network, params, inputs, targets, measures):
    outputs = jax.vmap(network, in_axes=(0, None))(params, inputs)
    return [jax.vmap(measure, in_axes=(0, None))(outputs, targets) for measure in measures]


def one_shot(task: Task, params: Params, config: Any, criteria, optimizer, table: Table) -> None:
    """Prunes the networks of every seed, stacked along a leading axis, and fine-tunes them; what is there is left out.

    The flags say by which criteria, to which sparsities, and for how many epochs.
    """
    seeds, epochs = range(len(jax.tree.leaves(params)[0])), config.fine_tuning_epochs
    keys = jax.vmap(jax.random.key)(jnp.arange(len(seeds)))
    prune_seeds = jax.jit(jax.vmap(prune.one_shot, in_axes=(0, 0, None)))
    last, phases = (FINE_TUNED, 2) if epochs else (PRUNED, 1)
    table.expect(len(seeds) * (1 + len(config.methods) * len(config.sparsities) * phases))
    table.add(measure(task, params, DENSE, 0.0, TRAINED))
    for method in config.methods:
        left = [s for s in config.sparsities if not all(table.has(method, s, seed, last) for seed in seeds)]
        if left:
            scores = jax.jit(jax.vmap(criteria[method]))(params, keys)
        for sparsity in left:
            pruned = prune_seeds(params, scores, jnp.float32(sparsity))
            final, found = pruned.params, measure(task, pruned.params, method, sparsity, PRUNED)
            if epochs:
                final = fine_tune(task, pruned, optimizer, epochs)
                found += measure(task, final, method, sparsity, FINE_TUNED)
            for seed in seeds if table.kept else ():
                table.kept.add(one_seed(final, seed), method, sparsity, seed)
            table.add(found)


def timed(task: Task, params: Params, methods: Methods, sparsities, seeds: int, table: Table, seen=None) -> None:
    """Prunes one network at a time, and takes the seconds, compilation aside; what is there is left out.

    The methods get the params of a seed, or what ``seen`` gives for it, and a sparsity.
    """
    seen = seen or functools.partial(one_seed, params)
    dense, compiled = measure(task, params, DENSE, 0.0, TRAINED), set()
    table.expect(len(dense) + seeds * len(methods) * len(sparsities))
    table.add(row | {"seconds": None} for row in dense)
    for seed in range(seeds):
        left = [key for key in itertools.product(methods, sparsities) if not table.has(*key, seed, PRUNED)]
        given = seen(seed) if left else None
        for method, sparsity in left:
            if method not in compiled:
                jax.block_until_ready(methods[method](given, sparsity))
                compiled.add(method)
            start = time.perf_counter()
            pruned = jax.block_until_ready(methods[method](given, sparsity))
            seconds = time.perf_counter() - start
            (row,) = measure(task, jax.tree.map(lambda leaf: leaf[None], pruned.params), method, sparsity, PRUNED)
            if table.kept:
                table.kept.add(pruned.params, method, sparsity, seed)
            table.add([row | {"seed": seed, "seconds": seconds}])
