"""Methods × sparsities × seeds, which yield finished rows: all seeds under one ``vmap``, or one network at a time."""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.progress import Progress

from ecjax import networks, prune, train
from ecjax.networks import Params
from experiments.datasets import Dataset
from experiments.methods import label
from experiments.results import Folder, Rows

DENSE, SMALL, STAGED, GRADUAL = "dense", "small dense", "EC, staged, survivors", "gradual magnitude, labels"
TRAINED, PRUNED, FINE_TUNED = "trained", "pruned", "fine-tuned"
Row = dict[str, Any]
Found = tuple[list[Row], Params]  # the finished rows of one network, and the network
Case = tuple[str, float, int]  # method, sparsity and seed
Methods = Mapping[str, Callable[[Any, float], prune.Pruned]]

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Measure(NamedTuple):
    """A column: its words, number format and function of outputs and targets; how figures show it."""

    words: str
    number: str
    of: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    factor: float = 1.0
    logarithmic: bool = False
    lowest: float | None = None  # end of the axis
    axis: str = "fraction of weights removed"  # what it is shown against


CLASSIFIER_MEASURES = {
    "test_loss": Measure("loss", ".4f", lambda z, labels: cross_entropy(z, labels).mean(), logarithmic=True),
    "test_accuracy": Measure("accuracy (%)", ".2f", lambda z, labels: (z.argmax(-1) == labels).mean(), factor=100.0),
}
SECONDS = {"seconds": Measure("seconds", ".2f")}
PRICE = {"seconds": Measure("seconds", ".1f"), "gradient_passes": Measure("gradient passes", ".1f")}
ERROR = Measure("mean squared error", ".1e", lambda y, targets: ((y - targets) ** 2).mean(), logarithmic=True)


class Task(NamedTuple):
    """What is learnt, and how it is judged."""

    network: networks.Network
    data: Dataset
    loss: networks.Loss
    measures: dict[str, Measure]  # the columns
    batch_size: int = 128


@dataclass
class Table:
    """Where finished rows go: all rows, a progress bar, the columns that these share, and a folder for networks."""

    rows: Rows
    bar: Progress
    shared: Row
    kept: Folder | None = None
    name: str = ""  # at the progress bar, before each method's

    def left(self, methods: Iterable[str], sparsities, seeds, phase: str = PRUNED) -> list[Case]:
        """The cases without a finished row of a phase or a saved network; sparsities and seeds of all, or by method."""
        levels, numbers = (x if isinstance(x, Mapping) else dict.fromkeys(methods, x) for x in (sparsities, seeds))
        cases = [case for m in methods for case in itertools.product([m], levels[m], range(numbers[m]))]
        left = [case for case in cases if not self.has(*case, phase)]
        self.step = self.bar.add_task(self.name, total=len(cases), completed=len(cases) - len(left))
        return left

    def has(self, method: str, sparsity: float, seed: int, phase: str) -> bool:
        """Whether a row is finished, and its network saved if it is to be."""
        saved = self.kept is None or self.kept.place(method, sparsity, seed).exists()
        return saved and self.rows.count(**self.shared, method=method, sparsity=sparsity, seed=seed, phase=phase) > 0

    def add(self, found: list[Row], params: Params) -> None:
        """Keeps the rows of one network that are not there already, and the network if it was pruned."""
        for row in found:
            key = {name: row[name] for name in ("method", "sparsity", "seed")}
            if not self.rows.count(**self.shared, **key, phase=row["phase"]):
                self.rows.add(self.shared | row)
        pruned = row["phase"] != TRAINED
        if self.kept and pruned:
            self.kept.add(params, **key)
        words = f"{self.name}{label(row['method'])}, {row['sparsity']:g}"
        self.bar.update(self.step, description=words, advance=pruned)


def decaying_adam(task: Task, learning_rate: float, epochs: int) -> optax.GradientTransformation:
    """Adam whose learning rate falls to zero over the epochs along half a cosine."""
    steps = epochs * train.steps_per_epoch(len(task.data.train_inputs), task.batch_size)
    return optax.adam(optax.cosine_decay_schedule(learning_rate, max(steps, 1)))


def train_seeds(task: Task, mlp: networks.MLP, seeds: Iterable[int], optimizer, epochs: Iterable[int]) -> Params:
    """Trains one network for each seed, side by side; the params come stacked along a leading axis."""

    def start(key):
        params = mlp.init(key, jnp.asarray(task.data.train_inputs[:1]))["params"]
        return train.start(params, optimizer, jax.random.fold_in(key, 1))

    return _fit(task, jax.vmap(start)(_keys(seeds)), None, optimizer, epochs)


def fine_tune(task: Task, pruned: prune.Pruned, optimizer: optax.GradientTransformation, epochs: int) -> Params:
    """Trains pruned networks of every seed, stacked along a leading axis, and keeps their zeros."""
    keys = _keys(range(len(jax.tree.leaves(pruned.params)[0])))
    state = jax.vmap(lambda params, key: train.start(params, optimizer, key))(pruned.params, keys)
    return _fit(task, state, pruned.masks, optimizer, range(epochs))


def _fit(task, state, masks, optimizer, epochs) -> Params:
    inputs, targets = map(jnp.asarray, task.data[1:3])
    options = {"optimizer": optimizer, "batch_size": task.batch_size}

    def epoch(state, masks):
        return train.epoch(task.network, state, inputs, targets, task.loss, masks=masks, **options)[0]

    for _ in epochs:
        state = jax.block_until_ready(jax.vmap(epoch)(state, masks))
    return state.params


def _keys(seeds: Iterable[int]) -> jax.Array:
    return jax.vmap(jax.random.key)(jnp.asarray([*seeds]))


def one_seed(params: Params, seed: int) -> Params:
    """The params of one of the networks stacked along a leading axis."""
    return jax.tree.map(lambda leaf: leaf[seed], params)


def measure(task: Task, params: Params, method: str, sparsity: float, phase: str) -> list[Row]:
    """A row for each of the networks stacked along the leading axis of ``params``, which are numbered as seeds."""
    tests = task.data.test_inputs, task.data.test_targets
    measured = _measure(task.network, params, *tests, tuple(measure.of for measure in task.measures.values()))
    return [
        {"method": method, "sparsity": sparsity, "seed": seed, "phase": phase}
        | dict(zip(task.measures, map(float, values), strict=True))
        for seed, values in enumerate(zip(*measured, strict=True))
    ]


@functools.partial(jax.jit, static_argnames=("network", "measures"))
def _measure(network, params, inputs, targets, measures):
    outputs = jax.vmap(network, in_axes=(0, None))(params, inputs)
    return [jax.vmap(measure, in_axes=(0, None))(outputs, targets) for measure in measures]


def unpruned(task: Task, params: Params, method: str = DENSE, sparsity: float = 0.0, **others: Any) -> Iterator[Found]:
    """Yields what is found for networks as they were trained, stacked along a leading axis."""
    for seed, row in enumerate(measure(task, params, method, sparsity, TRAINED)):
        yield [row | others], one_seed(params, seed)


def one_shot(task: Task, params: Params, criteria, left: list[Case], optimizer, epochs: int) -> Iterator[Found]:
    """Yields what is found for each dense network, and for each case left: pruned and fine-tuned, all seeds at once."""
    prune_seeds = jax.jit(jax.vmap(prune.one_shot, in_axes=(0, 0, None)))
    yield from unpruned(task, params)
    for method, of_method in itertools.groupby(left, lambda case: case[0]):
        scores = jax.jit(jax.vmap(criteria[method]))(params, _keys(range(len(jax.tree.leaves(params)[0]))))
        for sparsity, cases in itertools.groupby(of_method, lambda case: case[1]):
            pruned = prune_seeds(params, scores, jnp.float32(sparsity))
            final, rows = pruned.params, [measure(task, pruned.params, method, sparsity, PRUNED)]
            if epochs:
                final = fine_tune(task, pruned, optimizer, epochs)
                rows.append(measure(task, final, method, sparsity, FINE_TUNED))
            for *_, seed in cases:
                yield [row[seed] for row in rows], one_seed(final, seed)


def timed(
    task: Task, params: Params, methods: Methods, left: list[Case], seen=None, *, costly=(), gradient: float = 0.0
) -> Iterator[Found]:
    """Yields the same, one network after the other, with the seconds; those of costly methods are with compilation.

    The methods get the params of a seed, or what ``seen`` gives for it, and a sparsity. With the seconds of a gradient,
    rows hold the gradient passes too.
    """
    seen, compiled = seen or functools.partial(one_seed, params), set(costly)
    price = lambda t: {"seconds": t} | ({"gradient_passes": t / gradient} if gradient else {})  # noqa: E731
    yield from unpruned(task, params, **price(gradient or None))
    for seed, cases in itertools.groupby(sorted(left, key=lambda case: case[2]), lambda case: case[2]):
        given = seen(seed)
        for method, sparsity, _ in cases:
            pruned, seconds = clocked(methods[method], given, sparsity, compiled=method in compiled)
            compiled.add(method)
            yield one(task, pruned.params, method, sparsity, PRUNED, seed=seed, **price(seconds))


def one(task: Task, params: Params, method: str, sparsity: float, phase: str, **others: Any) -> Found:
    """What is found for one network."""
    (row,) = measure(task, jax.tree.map(lambda leaf: leaf[None], params), method, sparsity, phase)
    return [row | others], params


def clocked(call: Callable[..., Any], *given: Any, compiled: bool = False) -> tuple[Any, float]:
    """What a call gives, and its seconds; one that is not compiled yet is made once more, for that."""
    if not compiled:
        jax.block_until_ready(call(*given))
    start = time.perf_counter()
    found = jax.block_until_ready(call(*given))
    return found, time.perf_counter() - start


@functools.partial(jax.jit, static_argnums=(0, 4))
def gradient_pass(network: networks.Network, params: Params, inputs, targets, loss=cross_entropy) -> Params:
    """What is measured in gradient passes: the gradient of a mean loss with respect to all params."""
    return jax.grad(lambda params: loss(network(params, inputs), targets).mean())(params)
