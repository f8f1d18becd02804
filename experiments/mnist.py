"""Training, pruning, training on handwritten digits: ``python -m experiments.mnist``.

As in Figure 1 of the elimination-compensation paper (arXiv:2602.20467): train an MLP, score its weights by each method,
remove the least important ones, fine-tune what is left, and show the test loss before and after against the sparsity.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import optax

from ecjax import networks
from experiments import report, runs, saved, sweep
from experiments.datasets import choose
from experiments.methods import METHODS, MethodName


@dataclass(frozen=True)
class Config:
    """Train an MLP on handwritten digits, prune it by several methods, fine-tune, and compare the test losses.

    Writes results.csv, config.json, loss.png and accuracy.png, and prints the table.
    """

    data: Literal["mnist", "digits"] = "mnist"
    """MNIST, or the 8x8 digits bundled with scikit-learn."""
    data_dir: Path | None = None
    """Folder with the four idx files of MNIST, gzipped or not. Default: $ECJAX_DATA_DIR, else they are downloaded."""
    widths: tuple[int, ...] = (300, 100)
    """Widths of the hidden layers."""
    activation: Literal["relu", "tanh", "gelu"] = "relu"
    """Activation between the layers."""
    seeds: int = 3
    """How many networks to train, prune and average over."""
    epochs: int | None = None
    """Epochs of training. Default: 10 on MNIST, 60 on the digits."""
    fine_tuning_epochs: int | None = None
    """Epochs of training after pruning; 0 skips that phase. Default: 1 on MNIST, 6 on the digits."""
    learning_rate: float = 1e-3
    """Adam's, at the start; it falls to zero along a cosine."""
    batch_size: int = 128
    """Samples a training step."""
    methods: tuple[MethodName, ...] = tuple(name for name in METHODS if name != "nonlinear-ec")
    """Criteria to compare. nonlinear-ec is exact and slow: hours for the default network, seconds for widths of 20."""
    sparsities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
    """Fractions of the weights to remove."""
    metric: Literal["euclidean", "fisher"] = "fisher"
    """Output metric of optimal-brain-damage and nonlinear-ec."""
    calibration: int = 10_000
    """How many training samples the criteria see."""
    nonlinear_calibration: int = 500
    """How many of these nonlinear-ec sees: its cost is weights times samples."""
    output: Path | None = None
    """Folder for the results. Default: results/ and the name of the data."""
    save: Path | None = None
    """Folder for each pruned network, as one small file, and report.csv with its size and speed. Takes minutes more."""


def main(config: Config) -> None:
    """Runs the experiment from data to figures."""
    counts = ("seeds", "epochs", "batch_size", "calibration", "nonlinear_calibration")
    report.require_flags(config, fractions=("sparsities",), counts=counts, distinct=("methods",))
    data = choose.load_or_exit(config.data, config.data_dir)
    config = _with_epochs(config, data.name)
    folder = config.output or Path("results") / data.name.lower()
    classes = int(data.train_targets.max()) + 1
    layers = "-".join(str(width) for width in (data.train_inputs.shape[1], *config.widths, classes))
    mlp = networks.MLP(features=(*config.widths, classes), activation=saved.ACTIVATIONS[config.activation][0])
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    task = sweep.Task(
        network=networks.pure(mlp),
        data=data,
        loss=cross_entropy,
        measures=sweep.CLASSIFIER_MEASURES,
        batch_size=config.batch_size,
    )
    phases = [sweep.PRUNED, sweep.FINE_TUNED] if config.fine_tuning_epochs else [sweep.PRUNED]
    plan = [
        sweep.lines(unit, data=data.name)
        for unit in sweep.plan(config.seeds, config.methods, config.sparsities, phases)
    ]
    values = dict.fromkeys(sweep.CLASSIFIER_MEASURES, float)
    facts = {"data": data.name, "data_sha256": runs.digest(data), "layers": layers, "output": folder}
    kept = None
    if config.save:
        kept = saved.Folder(config.save, config.activation, config.methods, config.sparsities, config, **facts)
    with runs.opened(folder, config, plan, values, **facts) as rows, report.progress() as bar:
        step = bar.add_task("training", total=_epochs(rows.planned, config), completed=_epochs(rows.count, config))
        params = runs.trained(
            folder,
            layers,
            config.activation,
            config.seeds,
            lambda: sweep.train_seeds(
                task,
                lambda key: mlp.init(key, jnp.asarray(data.train_inputs[:1]))["params"],
                config.seeds,
                optimizer=sweep.decaying_adam(task, config.learning_rate, config.epochs),
                epochs=config.epochs,
                advance=lambda epochs: bar.advance(step, epochs),
            ),
        )
        for unit in sweep.run(
            task,
            params,
            methods=config.methods,
            sparsities=config.sparsities,
            metric=config.metric,
            calibration=config.calibration,
            nonlinear_calibration=config.nonlinear_calibration,
            optimizer=sweep.decaying_adam(task, config.learning_rate, config.fine_tuning_epochs),
            epochs=config.fine_tuning_epochs,
            advance=lambda epochs: bar.advance(step, epochs),
            done=lambda **keys: rows.has(**keys) and (kept is None or kept.has(**keys)),
            keep=kept.add if kept else None,
        ):
            rows.add(sweep.lines(unit, data=data.name))
            bar.update(step, description=f"{report.label(unit[0].method)}, {unit[0].sparsity:g}")
    frame = rows.frame()
    title = f"{data.name}, MLP {layers}, {config.activation}, {config.seeds} seeds"
    grid = [report.panels(frame)]
    for column, measure in report.CLASSIFIER_MEASURES.items():
        report.figure(grid, column, measure, title, folder / f"{column.removeprefix('test_')}.png")
    console = report.console()
    console.print(report.table(frame, report.CLASSIFIER_MEASURES, title))
    console.print(f"results.csv, config.json, loss.png and accuracy.png are in {folder}/")
    if kept:
        console.print(kept.finish())


def _epochs(count: Callable[..., int], config: Config) -> int:
    """How many epochs it takes to so many rows, which are those of all seeds."""
    tuned = count(phase=sweep.FINE_TUNED) // config.seeds
    return (count(method=sweep.DENSE) // config.seeds) * config.epochs + tuned * config.fine_tuning_epochs


def _with_epochs(config: Config, data: str) -> Config:
    """Fills in the epochs: the digits are few, so they take more to come to as many steps."""
    epochs, tuning = (10, 1) if data == "MNIST" else (60, 6)
    return replace(
        config,
        epochs=epochs if config.epochs is None else config.epochs,
        fine_tuning_epochs=tuning if config.fine_tuning_epochs is None else config.fine_tuning_epochs,
    )


if __name__ == "__main__":
    runs.command(Config, main, __doc__)
