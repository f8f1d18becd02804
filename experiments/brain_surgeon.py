"""The brain surgeons on a modest network of digits: ``python -m experiments.brain_surgeon``.

As in the one-shot tables of the combinatorial brain surgeon (arXiv:2203.04466): an MLP 784-40-20-10 without biases,
trained by plain SGD to 94 %, is pruned without any training after. Methods that use gradients see 5 samples of them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ecjax import networks, prune, score, surgeon, train
from ecjax.networks import Kernels, Params
from experiments import report, runs, sweep
from experiments.datasets import Dataset, choose

MEASURES = report.CLASSIFIER_MEASURES | {"seconds": report.Measure("seconds", ".2f")}
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@dataclass(frozen=True)
class Config:
    """Prune one modest network by magnitude, WoodFisher, the combinatorial brain surgeon and EC, and compare.

    Writes results.csv, config.json, accuracy.png and loss.png, and prints the table with the time of each method.
    """

    data: Literal["mnist", "digits"] = "mnist"
    """MNIST, or the 8x8 digits bundled with scikit-learn."""
    data_dir: Path | None = None
    """Folder with the four idx files of MNIST, gzipped or not. Default: $ECJAX_DATA_DIR, else they are downloaded."""
    widths: tuple[int, ...] = (40, 20)
    """Widths of the hidden layers (ReLU, no biases)."""
    target_accuracy: float = 0.94
    """Plain SGD stops at the first epoch that reaches it on the test set."""
    learning_rate: float = 0.05
    """Of plain SGD."""
    batch_size: int = 128
    """Samples a training step."""
    seeds: int = 5
    """How many samples of gradients to average over."""
    gradients: int = 2000
    """Per-sample gradients in each; at most as many as half of the training images."""
    sparsities: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
    """Fractions of the weights to remove."""
    damping: float = 1e-2
    """λ of the empirical Fisher. The smaller it is, the further the updates trust the quadratic."""
    draws: int = 100
    """Draws of randomised magnitude pruning, where the combinatorial selection starts."""
    output: Path | None = None
    """Folder for the results. Default: results/brain-surgeon and the name of the data."""


class Given(NamedTuple):
    """What a method sees: the trained network, a sample of gradients, calibration inputs and a key."""

    params: Params
    gradients: Kernels
    inputs: jax.Array
    key: jax.Array
    config: Config


def magnitude(given: Given, sparsity: float) -> Params:
    """The smallest weights go."""
    return prune.one_shot(given.params, score.magnitude(given.params), sparsity).params


def magnitude_update(given: Given, sparsity: float) -> Params:
    """The smallest weights go, the survivors move together (CBS-U)."""
    masks = prune.one_shot(given.params, score.magnitude(given.params), sparsity).masks
    return surgeon.combinatorial_update(given.params, masks, given.gradients, damping=given.config.damping)


def woodfisher(given: Given, sparsity: float) -> Params:
    """Saliencies and updates of optimal brain surgeon, each weight as if it were the only one."""
    damping = given.config.damping
    saliency = surgeon.brain_surgeon_saliency(given.params, given.gradients, damping=damping)
    masks = prune.one_shot(given.params, saliency, sparsity).masks
    return surgeon.brain_surgeon_update(given.params, masks, given.gradients, damping=damping)


def _select(given: Given, sparsity: float, start: str) -> Kernels:
    options = {"damping": given.config.damping, "draws": given.config.draws, "key": given.key}
    return surgeon.combinatorial_selection(given.params, given.gradients, sparsity, start=start, **options)


def selection_from_magnitude(given: Given, sparsity: float) -> Params:
    """CBS-S that starts from the smallest weights."""
    return prune.apply_masks(given.params, _select(given, sparsity, "magnitude"))


def selection(given: Given, sparsity: float) -> Params:
    """CBS-S that starts from randomised magnitude pruning."""
    return prune.apply_masks(given.params, _select(given, sparsity, "rmp"))


def selection_and_update(given: Given, sparsity: float) -> Params:
    """CBS-S from magnitude, then CBS-U."""
    masks = _select(given, sparsity, "magnitude")
    return surgeon.combinatorial_update(given.params, masks, given.gradients, damping=given.config.damping)


def elimination_compensation(given: Given, sparsity: float) -> Params:
    """EC (Fisher) on the same network with biases of zero, which it moves."""
    widths = [kernel.shape[-1] for kernel in jax.tree.leaves(given.params)]
    *_, network = _networks(tuple(widths))
    params = {name: layer | {"bias": jnp.zeros(layer["kernel"].shape[-1])} for name, layer in given.params.items()}
    scores = score.elimination_compensation(network, params, given.inputs, metric="fisher")
    return prune.one_shot(params, scores, sparsity).params


METHODS: dict[str, Callable[[Given, float], Params]] = {
    "magnitude": magnitude,
    "magnitude + CBS-U": magnitude_update,
    "WoodFisher": woodfisher,
    "CBS-S (magnitude)": selection_from_magnitude,
    "CBS-S (RMP)": selection,
    "CBS-S + CBS-U": selection_and_update,
    "EC (Fisher)": elimination_compensation,
}


@functools.cache
def _networks(widths: tuple[int, ...]) -> tuple[networks.MLP, networks.Network, networks.Network]:
    """The MLP without biases, its function, and the same with biases."""
    without = networks.MLP(widths, use_bias=False)
    return without, networks.pure(without), networks.pure(networks.MLP(widths))


def main(config: Config) -> None:
    """Runs the experiment from data to figures."""
    counts = ("seeds", "batch_size", "gradients", "draws")
    report.require_flags(config, fractions=("sparsities",), counts=counts)
    data = choose.load_or_exit(config.data, config.data_dir)
    folder = config.output or Path("results") / f"brain-surgeon-{data.name.lower()}"
    widths = (*config.widths, int(data.train_targets.max()) + 1)
    layers = "-".join(map(str, (data.train_inputs.shape[1], *widths)))
    _, network, biased = _networks(widths)
    task = sweep.Task(network, data, cross_entropy, sweep.CLASSIFIER_MEASURES, config.batch_size)
    units = sweep.plan_timed(config.seeds, METHODS, config.sparsities, networks=1)
    plan = [sweep.lines(unit, data=data.name) for unit in units]
    values = dict.fromkeys((*sweep.CLASSIFIER_MEASURES, "seconds"), float)
    facts = {"data": data.name, "data_sha256": runs.digest(data), "layers": layers, "output": folder}
    with runs.opened(folder, config, plan, values, **facts) as rows, report.progress() as bar:
        step = bar.add_task("training", total=rows.planned(), completed=rows.count())
        dense = runs.trained(folder, layers, "relu", 1, lambda: _trained(widths, data, config))
        rows.add(sweep.lines(sweep.measure(task, dense, sweep.DENSE, 0.0, sweep.TRAINED), data=data.name))
        give = functools.partial(_given, network, jax.tree.map(lambda leaf: leaf[0], dense), data, config)
        for timed in sweep.time_methods(METHODS, give, config.sparsities, seeds=config.seeds, done=rows.has):
            judged = biased if METHODS[timed.method] is elimination_compensation else network
            row = sweep.measure_timed(task._replace(network=judged), timed.result, timed)
            rows.add(sweep.lines([row], data=data.name))
            bar.update(step, description=f"{timed.method}, {timed.sparsity:g}", completed=rows.count())
    frame = rows.frame()
    title = f"{data.name}, MLP {layers} without biases, {config.seeds} samples of gradients"
    for column, measure in report.CLASSIFIER_MEASURES.items():
        path = folder / f"{column.removeprefix('test_')}.png"
        report.figure([report.panels(frame)], column, measure, title, path)
    console = report.console()
    console.print(report.table(frame, MEASURES, title))
    console.print(f"results.csv, config.json, accuracy.png and loss.png are in {folder}/")


def _trained(widths: tuple[int, ...], data: Dataset, config: Config) -> Params:
    """The one network, as if it were the first of several."""
    return jax.tree.map(lambda leaf: leaf[None], train_to(config.target_accuracy, widths, data, config))


def train_to(accuracy: float, widths: tuple[int, ...], data: Dataset, config: Config) -> Params:
    """Plain SGD until an epoch reaches the accuracy on the test set, 200 epochs at the most."""
    module, network, _ = _networks(widths)
    optimizer = optax.sgd(config.learning_rate)
    inputs, targets = jnp.asarray(data.train_inputs), jnp.asarray(data.train_targets)
    state = train.start(module.init(jax.random.key(0), inputs[:1])["params"], optimizer, jax.random.key(1))
    options = {"optimizer": optimizer, "batch_size": config.batch_size}
    reached = 0.0
    for _ in range(200):
        state, _ = train.epoch(network, state, inputs, targets, cross_entropy, **options)
        reached = float((network(state.params, data.test_inputs).argmax(-1) == data.test_targets).mean())
        if reached >= accuracy:
            return state.params
    raise SystemExit(f"200 epochs of SGD reached {reached:.2%}; lower --target-accuracy or raise --learning-rate")


def _given(network, params: Params, data: Dataset, config: Config, seed: int) -> Given:
    key = jax.random.key(seed)
    samples = min(config.gradients, len(data.train_inputs) // 2)  # of few samples, half: or all seeds were the same
    chosen = jax.random.choice(key, len(data.train_inputs), (samples,), replace=False)
    inputs = jnp.asarray(data.train_inputs)[chosen]
    gradients = surgeon.loss_gradients(network, params, inputs, jnp.asarray(data.train_targets)[chosen], cross_entropy)
    return Given(params, jax.block_until_ready(gradients), inputs, key, config)


if __name__ == "__main__":
    runs.command(Config, main, __doc__)
