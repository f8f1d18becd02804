"""Whole hidden neurons instead of weights: ``python -m experiments.neurons``.

Two MLPs, one with ReLU and one with tanh, lose a growing part of their hidden neurons: by weight norm, by activation
variance, by structured elimination-compensation in one shot, and by the same in stages with repair. No training after.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ecjax import networks, prune, score
from ecjax.networks import Network, Params
from experiments import report, runs, sweep
from experiments.datasets import choose
from experiments.saved import ACTIVATIONS

MEASURES = {
    name: measure._replace(axis="fraction of hidden neurons removed")
    for name, measure in report.CLASSIFIER_MEASURES.items()
}
SECONDS = report.Measure("seconds", ".1f")
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
NETWORKS = {"relu": (300, 100), "tanh": (128, 64)}


@dataclass(frozen=True)
class Config:
    """Remove whole hidden neurons from two MLPs by four methods, and compare what is left, without fine-tuning.

    Writes results.csv, config.json and accuracy.png, and prints a table for each network.
    """

    data: Literal["mnist", "digits"] = "mnist"
    """MNIST, or the 8x8 digits bundled with scikit-learn."""
    data_dir: Path | None = None
    """Folder with the four idx files of MNIST, gzipped or not. Default: $ECJAX_DATA_DIR, else they are downloaded."""
    seeds: int = 3
    """How many networks to train, prune and average over."""
    epochs: int | None = None
    """Epochs of training with Adam at 1e-3. Default: 10 on MNIST, 60 on the digits."""
    fractions: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)
    """Fractions of the hidden neurons to remove."""
    calibration: int = 10_000
    """Calibration inputs."""
    stages: int = 10
    """Stages of the staged method."""
    output: Path | None = None
    """Folder for the results. Default: results/neurons and the name of the data."""


class Given(NamedTuple):
    """What a method sees: a trained network, calibration inputs and the number of stages."""

    network: Network
    params: Params
    inputs: Array
    stages: int


def _norm(given: Given, fraction: float) -> prune.Pruned:
    return prune.neurons(given.params, score.neuron_norm(given.params), fraction)


def _variance(given: Given, fraction: float) -> prune.Pruned:
    return prune.neurons(given.params, score.neuron_variance(*given[:3]), fraction)


def _elimination(given: Given, fraction: float) -> prune.Pruned:
    return prune.neurons(given.params, score.neuron_elimination_compensation(*given[:3], metric="fisher"), fraction)


def _staged(given: Given, fraction: float) -> prune.Pruned:
    return prune.staged_neurons(*given[:3], fraction, metric="fisher", stages=given.stages)


METHODS: dict[str, Callable[[Given, float], prune.Pruned]] = {
    "weight norm": _norm,
    "activation variance": _variance,
    "structured EC": _elimination,
    "structured EC, staged": _staged,
}


def main(config: Config) -> None:
    """Runs the experiment from data to figure."""
    report.require_flags(config, fractions=("fractions",), counts=("seeds", "epochs", "calibration", "stages"))
    data = choose.load_or_exit(config.data, config.data_dir)
    folder = config.output or Path("results") / f"neurons-{data.name.lower()}"
    classes = int(data.train_targets.max()) + 1
    layers = {name: "-".join(map(str, (data.train_inputs.shape[1], *NETWORKS[name], classes))) for name in NETWORKS}
    units = sweep.plan_timed(config.seeds, METHODS, config.fractions)
    plan = [sweep.lines(unit, data=data.name, layers=name) for name in layers.values() for unit in units]
    values = dict.fromkeys((*sweep.CLASSIFIER_MEASURES, "seconds"), float)
    facts = {"data": data.name, "data_sha256": runs.digest(data), "output": folder}
    with runs.opened(folder, config, plan, values, **facts) as rows, report.progress() as bar:
        step = bar.add_task("", total=rows.planned(), completed=rows.count())
        for activation, name in layers.items():
            bar.update(step, description=f"{activation}: training")
            mlp = networks.MLP((*NETWORKS[activation], classes), ACTIVATIONS[activation][0])
            task = sweep.Task(networks.pure(mlp), data, cross_entropy, sweep.CLASSIFIER_MEASURES, 128)
            train = functools.partial(_train, task, mlp, config)
            params = runs.trained(folder, name, activation, config.seeds, train)
            for unit in _measured(task, params, config, functools.partial(rows.has, layers=name)):
                rows.add(sweep.lines(unit, data=data.name, layers=name))
                description = f"{activation}: {unit[0].method}, {unit[0].sparsity:g}"
                bar.update(step, description=description, completed=rows.count())
    frame = rows.frame()
    panels, tables = [], []
    for activation, name in layers.items():
        found = frame[frame["layers"] == name]
        title = f"{data.name}, MLP {name}, {activation}, {config.seeds} seeds, sparsity of neurons"
        tables.append(report.table(found, MEASURES | {"seconds": SECONDS}, title))
        panels += [panel._replace(title=f"{name}, {activation}") for panel in report.panels(found)]
    title = f"{data.name}, hidden neurons removed without fine-tuning, {config.seeds} seeds"
    report.figure([panels], "test_accuracy", MEASURES["test_accuracy"], title, folder / "accuracy.png")
    console = report.console()
    for table in tables:
        console.print(table)
    console.print(f"results.csv, config.json and accuracy.png are in {folder}/")


def _train(task: sweep.Task, mlp: networks.MLP, config: Config) -> Params:
    return sweep.train_seeds(
        task,
        functools.partial(_initial, mlp, jnp.asarray(task.data.train_inputs[:1])),
        config.seeds,
        optimizer=optax.adam(1e-3),
        epochs=config.epochs or (10 if task.data.name == "MNIST" else 60),
        advance=lambda _: None,
    )


def _measured(task: sweep.Task, params: Params, config: Config, done: Callable[..., bool]) -> Iterator[list[sweep.Row]]:
    """The rows of the dense networks, then one for each seed, method and fraction, with the seconds it took."""
    yield sweep.measure(task, params, sweep.DENSE, 0.0, sweep.TRAINED)
    inputs = jnp.asarray(task.data.train_inputs[: config.calibration])

    def give(seed: int) -> Given:
        return Given(task.network, jax.tree.map(lambda leaf: leaf[seed], params), inputs, config.stages)

    for timed in sweep.time_methods(METHODS, give, config.fractions, seeds=config.seeds, done=done):
        yield [sweep.measure_timed(task, timed.result.params, timed)]


def _initial(mlp: networks.MLP, inputs: Array, key: Array) -> Params:
    return mlp.init(key, inputs)["params"]


if __name__ == "__main__":
    runs.command(Config, main, __doc__)
