"""Whole neurons, channels and attention heads instead of weights: ``python -m experiments.neurons``.

Networks lose whole units, which four criteria choose, in stages, with the same repair and without labels. It shows what
is left against parameters, operations and time, next to dense networks trained small. It takes five minutes on two
cores; on the digits with --quick one. It writes results.csv, config.json and units.png, and prints tables.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import pandas as pd

from ecjax import compact, metrics, networks, prune, repair, score
from ecjax.networks import Network, Params
from experiments import convnet, flags, frontier, language, report, results, sweep
from experiments.datasets import Dataset

CRITERIA = {
    "norm, staged": score.neuron_group_norm,
    "variance, staged": score.neuron_variance,
    "random, staged": score.neuron_random,
    "EC, staged": score.neuron_elimination_compensation,
}
COSTS = {"parameters": "parameters", "operations": "operations", "time": "time of a batch"}
ACCURACY = {"test_accuracy": sweep.CLASSIFIER_MEASURES["test_accuracy"]}
_BATCH = 256  # samples that are timed
_COLUMNS = ("data", "network", "method", "sparsity", "seed", "phase", "test_accuracy", "test_loss", *COSTS, "seconds")


@dataclass(frozen=True)
class Config(flags.Digits):
    """Remove whole units of four networks by four criteria, and compare what is left with small dense networks."""

    seeds: int = 1  # How many networks to train, prune and average over.
    networks: tuple[Literal["mlp", "surrogate", "convnet", "gpt"], ...] = ("mlp", "surrogate")
    """784-300-100-10, 2-64-64-64-1 on diffusion-sorption, and those of experiments.convnet and experiments.language."""
    text: Path | None = None  # Text of the GPT, as for experiments.language.
    fractions: tuple[float, ...] = (0.5, 0.7, 0.9)  # Fractions of the parameters to remove with whole units.
    widths: tuple[float, ...] = (0.75, 0.5, 0.25)  # Of dense networks trained small, as a part of the full widths.
    stages: int = 6  # Stages of pruning.
    samples: float = 0.25  # Part of the calibration inputs that the stages before the last see.
    iterations: int = 2  # Steps of the repair in each stage but the last.
    last_iterations: int | None = None  # Steps after the last stage. Default: 8, and 30 for the surrogate.
    epochs: int | None = None  # Epochs of training. Default: those of the experiments that the networks are from.
    quick: bool = False  # The MLP alone, two fractions, one smaller network.


class Problem(NamedTuple):
    """A network to train at several widths and to prune, and how."""

    name: str
    data: Dataset
    measures: dict[str, sweep.Measure]
    module: Callable[[float], nn.Module]  # at a part of its widths
    train: Callable[[nn.Module, int, Iterable[int]], Params]  # its variables, with a seed, epoch after epoch
    epochs: int
    inputs: jax.Array  # for calibration
    metric: metrics.Metric
    repair: repair.Survivors
    call: dict[str, Any]  # arguments of a call


def main(config: Config) -> None:
    """Runs the experiment from data to figure."""
    flags.require(config)
    if config.quick:
        config = replace(config, networks=("mlp",), fractions=(0.5, 0.9), widths=(0.5,))
    problems = [PROBLEMS[name](config) for name in config.networks]
    data, tables, grid = problems[0].data, [], []
    folder = config.output or Path("results") / f"neurons-{data.name.lower()}"
    with results.opened(folder, config, data) as rows, report.progress() as bar:
        rows.columns = rows.columns or list(_COLUMNS)
        for problem in problems:
            shared = {"data": problem.data.name, "network": problem.name}
            table = sweep.Table(rows, bar, shared, name=f"{problem.name}: ")
            left = table.left(CRITERIA, config.fractions, config.seeds)
            for seed in range(config.seeds):
                dense = trained(folder, problem, 1.0, seed, bar, config)
                table.add(*sized(problem, dense, dense, sweep.DENSE, 0.0, sweep.TRAINED, seed=seed))
                for width in config.widths:
                    if not table.has(sweep.SMALL, 1 - width, seed, sweep.TRAINED):
                        small = trained(folder, problem, width, seed, bar, config)
                        table.add(*sized(problem, dense, small, sweep.SMALL, 1 - width, sweep.TRAINED, seed=seed))
                for method, fraction, _ in (case for case in left if case[2] == seed):
                    call = functools.partial(smaller, problem, *dense, method, fraction, seed, config)
                    found, seconds = sweep.clocked(call, compiled=True)
                    table.add(*sized(problem, dense, found, method, fraction, sweep.PRUNED, seed=seed, seconds=seconds))
            frame, title = rows.frame().query("network == @problem.name"), f"{shared['data']}, {problem.name}"
            costs = {name: sweep.Measure(f"{words},\n% of dense", ".0f", factor=100.0) for name, words in COSTS.items()}
            tables.append(report.table(frame, problem.measures | costs | sweep.SECONDS, title))
            grid.append(panels(frame, *next(iter(problem.measures.items())), problem.name))
    report.figure(grid, f"whole units, without labels or fine-tuning, {config.seeds} seeds", folder / "units.png")
    report.console().print(*tables, f"results.csv, config.json and units.png are in {folder}/")


def smaller(
    problem: Problem, network: Network, params: Params, method: str, fraction: float, seed: int, config: Config
) -> tuple[Network, Params]:
    """The network without the units of least importance that hold a fraction of its parameters."""
    criterion, many = CRITERIA[method], problem.name == "character GPT"  # outputs, of which one probe is taken
    if method == "EC, staged":
        criterion = functools.partial(criterion, metric=problem.metric, probes=1 if many else None)
    draws = method == "random, staged" or (method == "EC, staged" and many)
    last = config.last_iterations or problem.repair.last_iterations
    how = replace(problem.repair, iterations=config.iterations, last_iterations=last)
    options = {"criterion": criterion, "repair": how, "key": jax.random.key(seed) if draws else None}
    given = network, params, problem.inputs, fraction
    pruned = prune.staged_neurons(*given, by="parameters", stages=config.stages, samples=config.samples, **options)
    return compact.compact(network, pruned.params, problem.inputs)


def sized(problem: Problem, dense, found, *of_row: Any, **others: Any) -> sweep.Found:
    """The row of a network, and what it takes as a part of what the dense one does: time by turns with that one."""
    whole, part = compact.report(*dense, *found, problem.inputs, batches=(_BATCH,))
    taken = part.parameters / whole.parameters, part.flops.total / whole.flops.total
    others |= dict(zip(COSTS, (*taken, part.seconds[_BATCH] / whole.seconds[_BATCH]), strict=True))
    task = sweep.Task(found[0], problem.data, sweep.cross_entropy, problem.measures)
    return sweep.one(task, found[1], *of_row, **others)


def trained(folder: Path, problem: Problem, width: float, seed: int, bar, config: Config) -> tuple[Network, Params]:
    """A network of a part of the widths, and its params."""
    epochs, module = config.epochs or problem.epochs, problem.module(width)
    passes = bar.track(range(epochs), description=f"{problem.name}, width {width:g}: training")
    kept = results.trained(folder, f"{problem.name}-{width:g}-{seed}", problem.train, module, seed, passes)
    return networks.from_linen(module, variables=kept, **problem.call), kept["params"]


def panels(frame: pd.DataFrame, column: str, measure: sweep.Measure, name: str) -> list[report.Panel]:
    """A measure against what the smaller networks do without: parameters, operations and time."""
    saved = 1 - frame.groupby(["method", "sparsity"])[[*COSTS]].transform("mean")
    axes = {cost: f"fraction saved of the {words}" for cost, words in COSTS.items()}
    return [(name, frame.assign(sparsity=saved[of]), column, measure._replace(axis=axis)) for of, axis in axes.items()]


def _mlp(name: Literal["large", "surrogate"], config: Config) -> Problem:
    """A network of experiments.frontier."""
    of_frontier, large = frontier.Config(validation=config.validation), name == "large"
    found = frontier.PROBLEMS[name](of_frontier, config.load() if large else None)

    def module(width: float) -> networks.MLP:
        *hidden, last = found.mlp.features
        return found.mlp.clone(features=(*(round(width * count) for count in hidden), last))

    def train(mlp: networks.MLP, seed: int, passes: Iterable[int]) -> Params:
        task = found.task._replace(network=networks.from_linen(mlp))
        return {"params": sweep.one_seed(sweep.train_seeds(task, mlp, [seed], found.optimizer, passes), 0)}

    measures = ACCURACY if large else {"test_loss": sweep.ERROR}
    inputs = jnp.asarray(found.task.data.train_inputs[: found.calibration])
    how = replace(found.survivors, last_iterations=8 if large else 30)
    given = found.epochs, inputs, metrics.named(found.metric), how
    return Problem(found.name, found.task.data, measures, module, train, *given, {})


def _convnet(config: Config) -> Problem:
    data, full = config.load(), convnet.Config()
    classes, epochs = int(data.train_targets.max()) + 1, 5 if len(data.train_inputs) >= 10_000 else 40
    inputs = jnp.asarray(data.train_inputs[: min(full.calibration, 2_000)])

    def module(width: float) -> convnet.ConvNet:
        return convnet.ConvNet(tuple(round(width * count) for count in full.channels), classes, full.norm)

    def train(net: convnet.ConvNet, seed: int, passes: Iterable[int]) -> Params:
        return convnet.train_on(net, data, replace(full, epochs=config.epochs or epochs), seed, passes)

    sizes = {"products": full.products, "curvature_samples": full.curvature, "last_iterations": full.last_iterations}
    sizes["batch_size"] = full.batch_size
    given = epochs, inputs, metrics.Fisher(), repair.Survivors(metric=metrics.Fisher(full.temperature), **sizes)
    return Problem("residual convnet", data, ACCURACY, module, train, *given, {"train": False})


def _gpt(config: Config) -> Problem:
    """The network of experiments.language, on half of its calibration sequences."""
    epochs = config.epochs or language.Config.epochs
    full = language.Config(text=config.text, validation=config.validation, epochs=epochs, calibration=256, curvature=48)
    read, data = language.load(full)

    def module(width: float) -> language.GPT:
        return language.GPT(len(read.alphabet), full.layers, round(width * full.width), round(width * full.heads))

    def train(net: language.GPT, seed: int, passes: Iterable[int]) -> Params:
        task = sweep.Task(networks.from_linen(net), data, sweep.cross_entropy, {}, full.batch_size)
        return {"params": language.train_on(task, net, read.train, full, passes, seed)}

    metric, inputs = metrics.Fisher(full.temperature), language.calibration(data, full, 0).inputs
    sizes = {"products": full.products, "curvature_samples": full.curvature, "last_iterations": full.last_iterations}
    given = module, train, full.epochs, inputs, metric, repair.Survivors(metric=metric, **sizes)
    return Problem("character GPT", data, {"test_loss": language.NATS}, *given, {})


PROBLEMS = {"mlp": functools.partial(_mlp, "large"), "surrogate": functools.partial(_mlp, "surrogate")}
PROBLEMS |= {"convnet": _convnet, "gpt": _gpt}

if __name__ == "__main__":
    results.command(Config, main, __doc__)
