"""Pruning a neural surrogate of a partial differential equation: ``python -m experiments.diffusion_sorption``.

As in Figures 2 to 4 of the elimination-compensation paper (arXiv:2602.20467): an MLP learns the solution u(x, t) of the
diffusion-sorption equation from noisy samples, is pruned by each method, and is trained again.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array
from rich.table import Table

from ecjax import networks, prune, score
from ecjax.networks import Params
from experiments import report, runs, sweep
from experiments.datasets import Dataset, diffusion_sorption
from experiments.methods import METHODS, MethodName

LOSS = report.Measure("mean squared error", ".1e", logarithmic=True)


@dataclass(frozen=True)
class Config:
    """Train surrogates of diffusion-sorption, prune them by several methods, fine-tune, and compare the test errors.

    Writes results.csv, config.json, loss.png and snapshots.png, and prints the tables.
    """

    architectures: tuple[str, ...] = ("32-32-32", "64-64-64")
    """Widths of the hidden layers (tanh) of each network."""
    noise: tuple[float, ...] = (0.0, 0.005, 0.05)
    """Noise levels a: the training targets are u + d with d ~ U(-a, a)."""
    seeds: int = 3
    """How many networks to train, prune and average over."""
    epochs: int = 300
    """Epochs of training, for the small dense networks too."""
    fine_tuning_epochs: int = 6
    """Epochs of training after pruning; 0 skips that phase."""
    learning_rate: float = 5e-3
    """Adam's, at the start; it falls to zero along a cosine."""
    batch_size: int = 256
    """Samples a training step."""
    methods: tuple[MethodName, ...] = tuple(name for name in METHODS if name != "ec-fisher")
    """Criteria to compare."""
    sparsities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    """Fractions of the weights to remove."""
    small_network_sparsities: tuple[float, ...] = (0.5, 0.7, 0.9, 0.95)
    """Where to train, from scratch, a small dense network of as many parameters as the pruned one keeps."""
    calibration: int = 10_000
    """How many training samples the criteria see."""
    nonlinear_calibration: int = 500
    """How many of these nonlinear-ec sees: its cost is weights times samples."""
    snapshot_sparsity: float = 0.7
    """Sparsity of the network in snapshots.png, pruned by elimination-compensation."""
    cells: int = 256
    """Cells of the solution in x."""
    times: int = 101
    """Times of the solution in (0, 500]."""
    initial_concentration: float = 0.1
    """u(x, 0), in [0, 0.2]."""
    quick: bool = False
    """One network of 32-32-32, one noise level, three sparsities: under a minute."""
    output: Path = Path("results/diffusion-sorption")
    """Folder for the results."""


def main(config: Config) -> None:
    """Runs the experiment from the solution to the figures."""
    if config.quick:
        small = {"architectures": ("32-32-32",), "noise": (0.005,), "seeds": 1, "sparsities": (0.2, 0.4, 0.7)}
        config = replace(config, epochs=100, small_network_sparsities=(0.4, 0.7), **small)
    hidden = [_widths(architecture) for architecture in config.architectures]
    report.require_flags(
        config,
        fractions=("sparsities", "small_network_sparsities"),
        counts=("seeds", "epochs", "batch_size", "calibration", "nonlinear_calibration"),
        distinct=("architectures", "noise", "methods"),
    )
    grid = {"cells": config.cells, "times": config.times, "initial_concentration": config.initial_concentration}
    data = {noise: diffusion_sorption.load(noise=noise, **grid) for noise in config.noise}

    values, facts = {"test_loss": float}, {"data": "diffusion-sorption"}
    with (
        runs.opened(config.output, config, _plan(hidden, config), values, **facts) as rows,
        report.progress() as bar,
    ):
        total, before = _epochs(rows.planned, config), _epochs(rows.count, config)
        step = bar.add_task("training", total=total + config.fine_tuning_epochs, completed=before)
        advance = functools.partial(bar.advance, step)
        for widths in hidden:
            layers = _layers(widths)
            for noise in config.noise:
                bar.update(step, description=f"{layers}, a = {noise:g}")
                task, initial = _task(widths, data[noise], config)
                train = functools.partial(_train, task, initial, config, advance)
                params = runs.trained(config.output, f"{layers}-{noise:g}", "tanh", config.seeds, train)
                where = {**facts, "layers": layers, "noise": noise}
                done = functools.partial(rows.has, layers=layers, noise=noise)
                for unit in _sweep(task, params, config, advance, done):
                    rows.add(sweep.lines(unit, **where))
            bar.update(step, description=f"{layers}, small dense")
            done = functools.partial(rows.has, layers=layers, method=sweep.SMALL)
            for unit in _small_networks(widths, data, config, advance, done):
                rows.add(_small_lines(layers, unit, config))
        _draw_snapshots(task, params, layers, noise, config=config, advance=advance)

    frame = rows.frame()
    _draw_losses(frame, config)
    console = report.console()
    for layers, chosen in frame.groupby("layers", sort=False):
        console.print(_table(chosen, layers, config))
    console.print(f"results.csv, config.json, loss.png and snapshots.png are in {config.output}/")


def _widths(architecture: str) -> tuple[int, ...]:
    try:
        widths = tuple(map(int, architecture.split("-")))
    except ValueError:
        widths = (0,)
    if min(widths) < 1:
        raise SystemExit(f"--architectures are widths of hidden layers like 64-64-64, got {architecture!r}")
    return widths


def _layers(hidden: tuple[int, ...]) -> str:
    return "-".join(map(str, (2, *hidden, 1)))


def _plan(hidden: list[tuple[int, ...]], config: Config) -> list[list[dict]]:
    """The keys of all rows, in the order in which they are computed."""
    phases = [sweep.PRUNED, sweep.FINE_TUNED] if config.fine_tuning_epochs else [sweep.PRUNED]
    pruned = sweep.plan(config.seeds, config.methods, config.sparsities, phases)
    plan = []
    for layers in map(_layers, hidden):
        where = {"data": "diffusion-sorption", "layers": layers}
        plan += [sweep.lines(unit, **where, noise=noise) for noise in config.noise for unit in pruned]
        for sparsity in config.small_network_sparsities:
            rows = [sweep.Row(sweep.SMALL, sparsity, seed, sweep.TRAINED, {}) for seed in range(config.seeds)]
            plan.append(_small_lines(layers, rows * len(config.noise), config))
    return plan


def _small_lines(layers: str, rows: list[sweep.Row], config: Config) -> list[dict]:
    """Rows of the seeds at the first noise level, then at the next."""
    where = {"data": "diffusion-sorption", "layers": layers}
    levels = [noise for noise in config.noise for _ in range(config.seeds)]
    return [line for noise, row in zip(levels, rows, strict=True) for line in sweep.lines([row], **where, noise=noise)]


def _epochs(count: Callable[..., int], config: Config) -> int:
    """How many epochs it takes to so many rows: all seeds train at once, small networks at all noise levels too."""
    dense, small, tuned = count(method=sweep.DENSE), count(method=sweep.SMALL), count(phase=sweep.FINE_TUNED)
    full = dense // config.seeds + small // (config.seeds * len(config.noise))
    return full * config.epochs + tuned // config.seeds * config.fine_tuning_epochs


def _task(widths: tuple[int, ...], data: Dataset, config: Config) -> tuple[sweep.Task, Callable[[Array], Params]]:
    """What is learnt, and fresh params from a key."""
    mlp = networks.MLP((*widths, 1), jnp.tanh)
    task = sweep.Task(
        network=networks.pure(mlp),
        data=data,
        loss=optax.squared_error,
        measures={"test_loss": lambda outputs, targets: ((outputs - targets) ** 2).mean()},
        batch_size=config.batch_size,
    )
    return task, lambda key: mlp.init(key, jnp.asarray(data.train_inputs[:1]))["params"]


def _train(task, initial, config: Config, advance, targets=None) -> Params:
    optimizer = sweep.decaying_adam(task, config.learning_rate, config.epochs)
    options = {"optimizer": optimizer, "epochs": config.epochs, "advance": advance, "targets": targets}
    return sweep.train_seeds(task, initial, config.seeds, **options)


def _fine_tuning(task, config: Config, advance) -> dict:
    """Fine-tuning starts at half the learning rate of training."""
    optimizer = sweep.decaying_adam(task, config.learning_rate / 2, config.fine_tuning_epochs)
    return {"optimizer": optimizer, "epochs": config.fine_tuning_epochs, "advance": advance}


def _sweep(task, params: Params, config: Config, advance, done) -> Iterator[list[sweep.Row]]:
    return sweep.run(
        task,
        params,
        methods=config.methods,
        sparsities=config.sparsities,
        metric="euclidean",
        calibration=config.calibration,
        nonlinear_calibration=config.nonlinear_calibration,
        done=done,
        **_fine_tuning(task, config, advance),
    )


def _small_networks(widths, data: dict[float, Dataset], config: Config, advance, done) -> Iterator[list[sweep.Row]]:
    """Dense networks of as many parameters as the pruned ones keep, trained from scratch, all noise levels at once."""
    targets = jnp.stack([jnp.asarray(level.train_targets) for level in data.values()])
    for sparsity in config.small_network_sparsities:
        if done(sparsity=sparsity):
            continue
        task, initial = _task(small_widths(widths, sparsity), next(iter(data.values())), config)
        params = _train(task, initial, config, advance, targets)
        measured = sweep.measure(task, params, sweep.SMALL, sparsity, sweep.TRAINED)
        seeds = [seed for _ in data for seed in range(config.seeds)]
        yield [row._replace(seed=seed) for seed, row in zip(seeds, measured, strict=True)]


def parameters(widths: tuple[int, ...]) -> tuple[int, int]:
    """How many weights and biases an MLP from 2 inputs over these hidden widths to 1 output has."""
    every = (2, *widths, 1)
    return sum(map(math.prod, itertools.pairwise(every))), sum(every[1:])


def small_widths(widths: tuple[int, ...], sparsity: float) -> tuple[int, ...]:
    """Equal hidden widths, as wide as the parameters allow that are left at a sparsity; at least 1."""
    weights, biases = parameters(widths)
    left = (1 - sparsity) * weights + biases
    width = 1
    while sum(parameters((width + 1,) * len(widths))) <= left:
        width += 1
    return (width,) * len(widths)


def _by_noise(config: Config) -> dict[str, report.Measure]:
    """A column for each noise level."""
    return {f"{noise:g}": LOSS._replace(words=f"error, a = {noise:g}") for noise in config.noise}


def _table(frame, layers: str, config: Config) -> Table:
    wide = frame.pivot_table(
        index=["method", "sparsity", "seed", "phase"], columns="noise", values="test_loss", sort=False
    ).reset_index()
    wide.columns = [name if isinstance(name, str) else f"{name:g}" for name in wide.columns]
    title = f"diffusion-sorption, MLP {layers}, tanh, mean squared test error, {config.seeds} seeds"
    return report.table(wide, _by_noise(config), title)


def _draw_losses(frame, config: Config) -> None:
    """A row of panels for each noise level, two columns for each architecture."""
    grid = [
        [
            panel
            for layers, chosen in of_noise.groupby("layers", sort=False)
            for panel in report.panels(chosen, f"{layers}, a = {noise:g}")
        ]
        for noise, of_noise in frame.groupby("noise", sort=False)
    ]
    title = f"diffusion-sorption, tanh, {config.seeds} seeds"
    report.figure(grid, "test_loss", LOSS, title, config.output / "loss.png")


def _draw_snapshots(task, params: Params, layers: str, noise: float, *, config: Config, advance) -> None:
    """u(x, t) at six times: noisy data, exact solution, and one network before and after fine-tuning."""
    first = jax.tree.map(lambda leaf: leaf[:1], params)
    inputs = jnp.asarray(task.data.train_inputs[: config.calibration])
    scores = jax.vmap(lambda p: score.elimination_compensation(task.network, p, inputs))(first)
    pruned = jax.vmap(prune.one_shot, in_axes=(0, 0, None))(first, scores, jnp.float32(config.snapshot_sparsity))
    lines = {"pruned": (pruned.params, "#D55E00")}
    if config.fine_tuning_epochs:
        tuned = sweep.fine_tune(task, pruned, **_fine_tuning(task, config, advance))
        lines["pruned and fine-tuned"] = (tuned, "#009E73")

    instants = np.linspace(0, diffusion_sorption.LAST_TIME, config.times + 1)[1:]
    exact = diffusion_sorption.solve(
        cells=config.cells, times=instants, initial_concentration=config.initial_concentration
    )
    x = (np.arange(config.cells) + 0.5) / config.cells
    canvas, axes = plt.subplots(2, 3, figsize=(12, 7), sharex=True, sharey=True, layout="constrained")
    chosen = np.unique(np.geomspace(1, config.times, 6).round().astype(int)) - 1
    for axis, index in zip(axes.ravel(), chosen, strict=False):
        time = instants[index] / diffusion_sorption.LAST_TIME
        here = np.isclose(task.data.train_inputs[:, 1], time)
        dots = task.data.train_inputs[here, 0], task.data.train_targets[here, 0]
        axis.plot(*(part[::4] for part in dots), "k.", markersize=3, label="noisy data (every fourth)")
        axis.plot(x, exact[index], color="#0072B2", linewidth=1.5, label="exact")
        points = jnp.asarray(np.stack([x, np.full_like(x, time)], -1), jnp.float32)
        for name, (network_params, colour) in lines.items():
            outputs = jax.vmap(task.network, in_axes=(0, None))(network_params, points)[0, :, 0]
            axis.plot(x, outputs, "--", color=colour, linewidth=2, label=name)
        axis.set_title(f"t = {instants[index]:.0f}")
    exact_range = np.ptp(exact)
    axes[0, 0].set_ylim(exact.min() - 0.2 * exact_range, exact.max() + 0.2 * exact_range)
    for axis in axes[-1]:
        axis.set_xlabel("x")
    for axis in axes[:, 0]:
        axis.set_ylabel("u(x, t)")
    canvas.suptitle(f"diffusion-sorption, MLP {layers}, a = {noise:g}, EC at sparsity {config.snapshot_sparsity:g}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    canvas.savefig(config.output / "snapshots.png", dpi=150)
    plt.close(canvas)


if __name__ == "__main__":
    runs.command(Config, main, __doc__)
