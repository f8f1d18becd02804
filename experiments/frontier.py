"""How much can be removed without training again: ``python -m experiments.frontier``.

It shows two classifiers of handwritten digits and a surrogate of a partial differential equation, pruned to high
sparsity in one shot, by the combinatorial brain surgeon, and in stages with each repair. Only "labels" sees labels, and
nothing is fine-tuned. It takes half an hour on two cores; on the digits with --quick two minutes. It writes
results.csv, config.json and frontier.png, with panels for convnet and GPT once these have run, and prints tables.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pandas as pd

from ecjax import metrics, networks, prune, repair, score, surgeon
from experiments import flags, report, results, sweep
from experiments.datasets import Dataset, diffusion_sorption, hold_out

ACCURACY = sweep.CLASSIFIER_MEASURES["test_accuracy"]._replace(lowest=80.0)


@dataclass(frozen=True)
class Config(flags.Digits):
    """Prune three networks to high sparsity without fine-tuning, by methods from magnitude to staged survivors."""

    networks: tuple[Literal["large", "modest", "surrogate", "taught"], ...] = ("large", "modest", "surrogate")
    """784-300-100-10 by Adam, 784-40-20-10 without biases by SGD (ReLU), and 2-64-64-64-1 (tanh) on diffusion-sorption.
    "taught" is 784-300-100-10, trained better, on all images, towards five of its kind; at 0.985, say."""
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98, 0.995)  # Fractions to remove of the classifiers' weights.
    surrogate_sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98)  # Fractions to remove of the surrogate's.
    calibration: int = 10_000  # Calibration inputs; the modest network takes six times as many.
    stages: int = 10  # Stages of the staged methods; the modest network and the surrogate take twice as many.
    regrow: int | None = None  # Survivors alone, with so many cycles of regrowth at most, by the optimal brain surgeon.
    temperature: float | None = None  # Of the classifiers' survivors without labels. Default: metrics.temperature.
    surrogate_epochs: int = 300  # Epochs of training of the surrogate.
    convnet: Path = Path("results/convnet-batch-mnist")  # Results of experiments.convnet, for a panel of the figure.
    language: Path = Path("results/language-tiny_shakespeare")  # The same of experiments.language.
    quick: bool = False  # One seed, three sparsities and 2,000 calibration inputs.
    save: Path | None = None  # Folder for every pruned network, and a report of sizes and times. Takes minutes more.


class Problem(NamedTuple):
    """A network to train and prune, and how."""

    name: str
    activation: str
    mlp: networks.MLP
    task: sweep.Task
    metric: str  # of the criteria
    sparsities: tuple[float, ...]
    optimizer: optax.GradientTransformation
    epochs: int
    calibration: int  # how many training samples the methods see
    gradients: int  # of so many of these the combinatorial brain surgeon sees the gradients
    stages: int  # of the staged methods
    survivors: repair.Survivors  # without labels
    regrow: prune.Regrowth | None = None
    teachers: int = 0  # how many trained networks it learns from


def methods(problem: Problem, config: Config, trained: networks.Params = None) -> sweep.Methods:
    """By name: from the params of one of the trained networks and a sparsity to the pruned network."""
    network, metric = problem.task.network, problem.metric
    inputs, targets = (jnp.asarray(array[: problem.calibration]) for array in problem.task.data[1:3])

    def one_shot(params: networks.Params, sparsity: float, criterion, **options) -> prune.Pruned:
        return prune.one_shot(params, criterion(network, params, inputs, **options), sparsity)

    def combinatorial(params: networks.Params, sparsity: float) -> prune.Pruned:
        """CBS-S from magnitude, then CBS-U; for a regression that fits, with gradients of the output, not the loss."""
        loss = sweep.cross_entropy if metric == "fisher" else lambda outputs, _: outputs[..., 0]
        few = slice(problem.gradients)
        gradients = surgeon.loss_gradients(network, params, inputs[few], targets[few], loss)
        masks = surgeon.combinatorial_selection(params, gradients, sparsity, start="magnitude")
        return prune.Pruned(surgeon.combinatorial_update(params, masks, gradients), masks)

    def staged(params, sparsity: float, how: repair.Repair | None, aim=None, **more) -> prune.Pruned:
        enough = inputs if isinstance(how, repair.Survivors) else inputs[: config.calibration]
        options = {"stages": problem.stages, "repair": how, "metric": metric, "targets": aim, "regrow": problem.regrow}
        return prune.staged(network, params, enough, sparsity, **options, **more)

    def regrown(params: networks.Params, sparsity: float) -> prune.Pruned:
        """Without labels, and in the end at temperature 1, whose aim is the first choice."""
        pruned, last = staged(params, sparsity, survivors), replace(survivors, iterations=20, metric=metric)
        moved = last(network, pruned.params, pruned.masks, inputs, network(params, inputs))
        return pruned._replace(params=moved)

    survivors = problem.survivors
    if problem.teachers:  # in stages towards the mean logits of all trained networks, which have seen labels
        mean = jax.vmap(network, (0, None))(trained, inputs).mean(0)
        return {"EC, staged, taught": functools.partial(staged, how=survivors, aim=mean, samples=0.25)}
    if problem.regrow:
        return {"EC, staged, survivors, regrown": regrown}
    return {
        "magnitude": functools.partial(one_shot, criterion=score.magnitude),
        "optimal brain damage": functools.partial(one_shot, criterion=score.optimal_brain_damage, metric=metric),
        "EC": functools.partial(one_shot, criterion=score.elimination_compensation, metric=metric),
        "CBS": combinatorial,
        "EC, staged": functools.partial(staged, how=None),
        "EC, staged, biases": functools.partial(staged, how=repair.Biases(products=survivors.products)),
        "EC, staged, survivors": functools.partial(staged, how=survivors),
        "EC, staged, survivors, labels": functools.partial(staged, how=replace(survivors, metric=None), aim=targets),
    }


def main(config: Config) -> None:
    """Runs the experiment from data to figures."""
    flags.require(config)
    if config.quick:
        small = {"sparsities": (0.8, 0.95, 0.98), "surrogate_sparsities": (0.5, 0.8, 0.95)}
        config = replace(config, seeds=1, calibration=min(config.calibration, 2000), surrogate_epochs=60, **small)
    data = config.load() if set(config.networks) - {"surrogate"} else None
    problems = [PROBLEMS[chosen](config, data) for chosen in config.networks]
    data = data or problems[0].task.data
    folder = config.output or Path("results") / f"frontier-{data.name.lower()}"
    measures = dict.fromkeys(measure for problem in problems for measure in problem.task.measures)
    columns = ["data", "layers", "method", "sparsity", "seed", "phase", *measures, *sweep.PRICE]

    tables, panels = [], []
    with results.opened(folder, config, data) as rows, report.progress() as bar:
        rows.columns = rows.columns or columns
        for problem in problems:
            passes = bar.track(range(problem.epochs), description=f"{problem.name}: training")
            seeds = range(max(config.seeds, problem.teachers))
            task, training = problem.task, (problem.mlp, seeds, problem.optimizer, passes)
            params = results.trained(folder, problem.name, sweep.train_seeds, task, *training)

            save, where = config.save and config.save / problem.name, {"data": task.data.name, "layers": problem.name}
            kept = results.Folder(save, problem.activation, task, config) if save else None
            table, compared = sweep.Table(rows, bar, where, kept, f"{problem.name}: "), methods(problem, config, params)
            left = table.left(compared, problem.sparsities, config.seeds)
            few = (jnp.asarray(array[: problem.calibration]) for array in task.data[1:3])
            given = task.network, sweep.one_seed(params, 0), *few, task.loss
            gradient = min(sweep.clocked(sweep.gradient_pass, *given)[1] for _ in range(5))
            slow = compared if config.regrow or problem.teachers else ()
            for found in sweep.timed(task, params, compared, left, costly=slow, gradient=gradient):
                table.add(*found)

            frame, shown = rows.frame().query("layers == @problem.name"), task.measures
            title = f"{where['data']}, MLP {problem.name}, {config.seeds} seeds, no fine-tuning"
            tables += [report.table(frame, shown | sweep.PRICE, title)] + ([report.sizes(kept)] if kept else [])
            panels += report.panels(frame, *next(iter(shown.items())), f"{where['data']}, {problem.name}")

    nats, others = sweep.Measure("cross-entropy in nats", ".3f"), {}
    others[config.convnet / "results.csv"] = "test_accuracy", ACCURACY, "residual convnet"
    others[config.language / "results.csv"] = "test_loss", nats, "character GPT"
    there = [(pd.read_csv(path), *how) for path, how in others.items() if path.exists()]
    beside = [panel for given in there for panel in report.panels(*given)]
    grid = [panels, beside] if beside else [panels]
    report.figure(grid, f"pruned without fine-tuning, {config.seeds} seeds", folder / "frontier.png")
    report.console().print(*tables, f"results.csv, config.json and frontier.png are in {folder}/")


def _classifier(config, data, *, hidden, optimizer, epochs, images, stages, gradients, products, teachers=0) -> Problem:
    """An MLP with ReLU: its epochs on 10,000 images and on fewer, and how many times the images and the stages."""
    (features, name), few = flags.widths(data, hidden), len(data.train_inputs) < 10_000
    mlp, metric = networks.MLP(features, nn.relu), config.temperature and metrics.Fisher(config.temperature)
    measures = {"test_accuracy": ACCURACY, "test_loss": sweep.CLASSIFIER_MEASURES["test_loss"]}
    task = sweep.Task(networks.from_linen(mlp), data, sweep.cross_entropy, measures)
    optimizer = sweep.decaying_adam(task, 2e-3, epochs[few]) if teachers else optimizer
    regrow = config.regrow and prune.Regrowth(0.5 if teachers else 1.0, config.regrow, "optimal_brain_surgeon")
    sizes = images * config.calibration, gradients, stages * config.stages
    how = *sizes, repair.Survivors(products=products, metric=metric), regrow, teachers
    return Problem(name, "relu", mlp, task, "fisher", config.sparsities, optimizer, epochs[few], *how)


def _surrogate(config: Config, _data: Dataset | None) -> Problem:
    """2-64-64-64-1 with tanh on the noise-free solution of diffusion-sorption."""
    data = diffusion_sorption.load(noise=0.0, cells=256, times=101, initial_concentration=0.1)
    mlp = networks.MLP((64, 64, 64, 1), jnp.tanh)
    relative = sweep.ERROR._replace(words="relative error", of=lambda y, u: jnp.linalg.norm(y - u) / jnp.linalg.norm(u))
    measures = {"test_error": relative, "test_loss": sweep.ERROR}
    data = hold_out(data) if config.validation else data
    task = sweep.Task(networks.from_linen(mlp), data, optax.squared_error, measures, batch_size=256)
    survivors, epochs = repair.Survivors(), config.surrogate_epochs
    how = sweep.decaying_adam(task, 5e-3, epochs), epochs, config.calibration, 2000, 2 * config.stages, survivors
    how += (config.regrow and prune.Regrowth(1.0, config.regrow, "optimal_brain_surgeon"),)
    return Problem("2-64-64-64-1", "tanh", mlp, task, "euclidean", config.surrogate_sparsities, *how)


# Trained by Adam at a constant rate, as the papers do, and by plain SGD to about 94 %, with biases that stay zero.
_STILL = optax.masked(optax.set_to_zero(), lambda params: jax.tree.map(lambda leaf: leaf.ndim == 1, params))
_LARGE = {"hidden": (300, 100), "optimizer": optax.adam(1e-3), "epochs": (5, 60), "images": 1, "stages": 1}
_SGD = optax.chain(optax.sgd(0.05), _STILL)
_MODEST = {"hidden": (40, 20), "optimizer": _SGD, "epochs": (5, 100), "images": 6, "stages": 2}
_TAUGHT = {"epochs": (20, 60), "images": 6, "stages": 2, "teachers": 5}
PROBLEMS = {
    "large": functools.partial(_classifier, **_LARGE, gradients=500, products=15),
    "modest": functools.partial(_classifier, **_MODEST, gradients=2000, products=20),
    "surrogate": _surrogate,
    "taught": functools.partial(_classifier, **_LARGE | _TAUGHT, gradients=500, products=15),
}

if __name__ == "__main__":
    results.command(Config, main, __doc__)
