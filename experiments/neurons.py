"""Whole hidden neurons instead of weights: ``python -m experiments.neurons``.

It shows the accuracy of two MLPs, with ReLU and with tanh, that lose a growing part of their hidden neurons by four
methods and are not trained again. It takes ten minutes on two cores; on the digits three. It writes results.csv,
config.json and accuracy.png, and prints a table for each network.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import optax
from jax import Array

from ecjax import networks, prune
from experiments import flags, report, results, sweep

NETWORKS = {"relu": (300, 100), "tanh": (128, 64)}
AXIS = "fraction of hidden neurons removed"
MEASURES = {name: measure._replace(axis=AXIS) for name, measure in sweep.CLASSIFIER_MEASURES.items()}


@dataclass(frozen=True)
class Config(flags.Digits):
    """Remove whole hidden neurons from two MLPs by four methods, and compare what is left, without fine-tuning."""

    epochs: int | None = None  # Epochs of training with Adam at 1e-3. Default: 10, or 60 on fewer than 10,000 images.
    fractions: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)  # Fractions of the hidden neurons to remove.
    calibration: int = 10_000  # Calibration inputs.
    stages: int = 10  # Stages of the staged method.


def methods(network: networks.Network, inputs: Array, stages: int) -> sweep.Methods:
    """By name: from trained params and a fraction of the hidden neurons to the pruned network."""
    once = functools.partial(prune.neurons, network)
    staged = functools.partial(prune.staged_neurons, metric="fisher", stages=stages)
    return {
        "weight norm": lambda params, part: once(params, inputs, part, criterion="neuron_norm"),
        "activation variance": lambda params, part: once(params, inputs, part, criterion="neuron_variance"),
        "structured EC": lambda params, part: once(params, inputs, part, metric="fisher"),
        "structured EC, staged": lambda params, part: staged(network, params, inputs, part),
    }


def main(config: Config) -> None:
    """Runs the experiment from data to figure."""
    flags.require(config)
    data = config.load()
    epochs = config.epochs or (10 if len(data.train_inputs) >= 10_000 else 60)
    inputs = jnp.asarray(data.train_inputs[: config.calibration])
    folder = config.output or Path("results") / f"neurons-{data.name.lower()}"
    tables, panels = [], []
    with results.opened(folder, config, data) as rows, report.progress() as bar:
        for activation, hidden in NETWORKS.items():
            features, layers = flags.widths(data, hidden)
            mlp = networks.MLP(features, results.ACTIVATIONS[activation][0])
            task = sweep.Task(networks.from_linen(mlp), data, sweep.cross_entropy, MEASURES)
            training = mlp, config.seeds, optax.adam(1e-3), bar.track(range(epochs), description=f"{layers}: training")
            params = results.trained(folder, layers, sweep.train_seeds, task, *training)

            compared = methods(task.network, inputs, config.stages)
            table = sweep.Table(rows, bar, {"data": data.name, "layers": layers}, name=f"{layers}: ")
            left = table.left(compared, config.fractions, config.seeds)
            for found in sweep.timed(task, params, compared, left):
                table.add(*found)

            frame = rows.frame().query("layers == @layers")
            title = f"{data.name}, MLP {layers}, {activation}, {config.seeds} seeds, sparsity of neurons"
            tables.append(report.table(frame, MEASURES | sweep.SECONDS, title))
            panels += report.panels(frame, "test_accuracy", MEASURES["test_accuracy"], f"{layers}, {activation}")

    title = f"{data.name}, hidden neurons removed without fine-tuning, {config.seeds} seeds"
    report.figure([panels], title, folder / "accuracy.png")
    report.console().print(*tables, f"results.csv, config.json and accuracy.png are in {folder}/")


if __name__ == "__main__":
    results.command(Config, main, __doc__)
