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
import pandas as pd
import tyro
from jax import Array

from ecjax import networks, prune, score
from ecjax.networks import Network, Params
from experiments import report, sweep
from experiments.datasets import Dataset, choose
from experiments.saved import ACTIVATIONS

MEASURES = {
    name: measure._replace(axis="fraction of hidden neurons removed")
    for name, measure in report.CLASSIFIER_MEASURES.items()
}
SECONDS = report.Measure("seconds", ".1f")
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
    folder.mkdir(parents=True, exist_ok=True)
    frames, panels, tables = [], [], []
    with report.progress() as bar:
        step = bar.add_task("training", total=len(NETWORKS) * config.seeds * len(METHODS) * len(config.fractions))
        for activation, widths in NETWORKS.items():
            rows = []
            for row in _measured(widths, activation, data, config):
                rows.append(row)
                bar.update(step, description=f"{activation}: {row.method}, {row.sparsity:g}")
                bar.advance(step, 0 if row.method == sweep.DENSE else 1)
            layers = "-".join(map(str, (data.train_inputs.shape[1], *widths, int(data.train_targets.max()) + 1)))
            frame = report.to_frame(rows, data.name)
            frame.insert(1, "layers", layers)
            frames.append(frame)
            title = f"{data.name}, MLP {layers}, {activation}, {config.seeds} seeds, sparsity of neurons"
            tables.append(report.table(frame, MEASURES | {"seconds": SECONDS}, title))
            panels += [panel._replace(title=f"{layers}, {activation}") for panel in report.panels(frame)]
    pd.concat(frames).to_csv(folder / "results.csv", index=False)
    report.save_config(folder, config, data=data.name, output=folder)
    title = f"{data.name}, hidden neurons removed without fine-tuning, {config.seeds} seeds"
    report.figure([panels], "test_accuracy", MEASURES["test_accuracy"], title, folder / "accuracy.png")
    console = report.console()
    for table in tables:
        console.print(table)
    console.print(f"results.csv, config.json and accuracy.png are in {folder}/")


def _measured(widths: tuple[int, ...], activation: str, data: Dataset, config: Config) -> Iterator[sweep.Row]:
    """A row for the dense networks, then for each seed, method and fraction, with the seconds it took."""
    mlp = networks.MLP((*widths, int(data.train_targets.max()) + 1), ACTIVATIONS[activation][0])
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    task = sweep.Task(networks.pure(mlp), data, cross_entropy, sweep.CLASSIFIER_MEASURES, 128)
    params = sweep.train_seeds(
        task,
        functools.partial(_initial, mlp, jnp.asarray(data.train_inputs[:1])),
        config.seeds,
        optimizer=optax.adam(1e-3),
        epochs=config.epochs or (10 if data.name == "MNIST" else 60),
        advance=lambda _: None,
    )
    yield from sweep.measure(task, params, sweep.DENSE, 0.0, sweep.TRAINED)
    inputs = jnp.asarray(data.train_inputs[: config.calibration])
    for seed in range(config.seeds):
        one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], params)
        given = Given(task.network, one, inputs, config.stages)
        yield from sweep.time_methods(task, METHODS, given, config.fractions, seed=seed)


def _initial(mlp: networks.MLP, inputs: Array, key: Array) -> Params:
    return mlp.init(key, inputs)["params"]


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.neurons", description=__doc__))
