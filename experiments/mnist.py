"""Training, pruning, training on handwritten digits: ``python -m experiments.mnist``.

As in Figure 1 of the elimination-compensation paper (arXiv:2602.20467), it shows the test loss of an MLP whose weights
were removed by several criteria, before and after fine-tuning. It takes two minutes on two cores; on the digits a
quarter of one. It writes results.csv, config.json, loss.png and accuracy.png, and prints the table.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from ecjax import metrics, networks
from experiments import flags, report, results, sweep
from experiments.methods import METHODS, MethodName, criteria


@dataclass(frozen=True)
class Config(flags.Digits):
    """Train an MLP on handwritten digits, prune it by several methods, fine-tune, and compare the test losses."""

    widths: tuple[int, ...] = (300, 100)  # Widths of the hidden layers.
    activation: Literal["relu", "tanh", "gelu"] = "relu"  # Activation between the layers.
    epochs: int | None = None  # Epochs of training. Default: 10, or 60 on fewer than 10,000 images.
    fine_tuning_epochs: int | None = None  # Epochs after pruning; 0 skips them. Default: 1, or 6 on as few images.
    learning_rate: float = 1e-3  # Adam's, at the start; it falls to zero along a cosine.
    batch_size: int = 128  # Samples a training step.
    methods: tuple[MethodName, ...] = tuple(name for name in METHODS if name != "nonlinear-ec")
    """Criteria to compare. nonlinear-ec is exact and slow: hours for the default network, seconds for widths of 20."""
    sparsities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
    """Fractions of the weights to remove."""
    metric: Literal["euclidean", "fisher"] = "fisher"  # Output metric of optimal-brain-damage and nonlinear-ec.
    temperature: float | None = None  # Of the Fisher metric. Default: 1, or 4 on as few images, known by heart.
    calibration: int = 10_000  # How many training samples the criteria see.
    nonlinear_calibration: int = 500  # How many of these nonlinear-ec sees: its cost is weights times samples.
    save: Path | None = None  # Folder for every pruned network, and a report of sizes and times. Takes minutes more.


def main(config: Config) -> None:
    """Runs the experiment from data to figures."""
    flags.require(config, repeating=("widths",))
    data = config.load()
    names, many = ("epochs", "fine_tuning_epochs", "temperature"), len(data.train_inputs) >= 10_000
    defaults = dict(zip(names, (10, 1, 1.0) if many else (60, 6, 4.0), strict=True))  # as many steps on few images
    config = replace(config, **{name: value for name, value in defaults.items() if getattr(config, name) is None})
    epochs, tuning = config.epochs, config.fine_tuning_epochs
    features, layers = flags.widths(data, config.widths)
    mlp = networks.MLP(features, getattr(nn, config.activation))
    task = sweep.Task(networks.from_linen(mlp), data, sweep.cross_entropy, sweep.CLASSIFIER_MEASURES, config.batch_size)
    folder = config.output or Path("results") / data.name.lower()
    kept = results.Folder(config.save, config.activation, task, config, layers=layers) if config.save else None
    with results.opened(folder, config, data, layers=layers) as rows, report.progress() as bar:
        optimizer = sweep.decaying_adam(task, config.learning_rate, epochs)
        passes = bar.track(range(epochs), description="training")
        params = results.trained(folder, layers, sweep.train_seeds, task, mlp, range(config.seeds), optimizer, passes)
        inputs, labels = (jnp.asarray(array[: config.calibration]) for array in data[1:3])
        fisher, few = metrics.Fisher(config.temperature), inputs[: config.nonlinear_calibration]
        metric = fisher if config.metric == "fisher" else config.metric
        compared = criteria(task.network, inputs, labels, few, task.loss, metric, fisher)
        table, last = sweep.Table(rows, bar, {"data": data.name}, kept), sweep.FINE_TUNED if tuning else sweep.PRUNED
        left = table.left(config.methods, config.sparsities, config.seeds, last)
        optimizer = sweep.decaying_adam(task, config.learning_rate, tuning)
        for found in sweep.one_shot(task, params, compared, left, optimizer, tuning):
            table.add(*found)
    title = f"{data.name}, MLP {layers}, {config.activation}, {config.seeds} seeds"
    report.end(folder, rows.frame(), sweep.CLASSIFIER_MEASURES, title, *([report.sizes(kept)] if kept else []))


if __name__ == "__main__":
    results.command(Config, main, __doc__)
