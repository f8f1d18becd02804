"""Pruning a neural surrogate of a partial differential equation: ``python -m experiments.diffusion_sorption``.

As in Figures 2 to 4 of the elimination-compensation paper (arXiv:2602.20467), it shows the test error of MLPs that
learnt the solution u(x, t) of the diffusion-sorption equation from noisy samples, were pruned by several criteria, and
were trained again; and of two that need no such training: networks that were small from the start, and networks pruned
in stages with a repair after each. It takes twenty minutes on two cores, with --quick under one. It writes results.csv,
config.json, loss.png and snapshots.png, and prints a table for each network.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from ecjax import networks, prune, score
from experiments import flags, report, results, sweep
from experiments.datasets import Dataset, diffusion_sorption, hold_out
from experiments.methods import METHODS, MethodName, criteria


@dataclass(frozen=True)
class Config:
    """Train surrogates of diffusion-sorption, prune them by several methods, fine-tune, and compare the test errors."""

    architectures: tuple[str, ...] = ("32-32-32", "64-64-64")  # Widths of the hidden layers (tanh) of each network.
    noise: tuple[float, ...] = (0.0, 0.005, 0.05)  # Noise levels a: the training targets are u + d with d ~ U(-a, a).
    seeds: int = 3  # How many networks to train, prune and average over.
    epochs: int = 300  # Epochs of training, for the small dense networks too.
    fine_tuning_epochs: int = 6  # Epochs of training after pruning; 0 skips that phase.
    learning_rate: float = 5e-3  # Adam's, at the start; it falls to zero along a cosine. Fine-tuning starts at half.
    batch_size: int = 256  # Samples a training step.
    methods: tuple[MethodName, ...] = tuple(name for name in METHODS if name != "ec-fisher")  # Criteria to compare.
    sparsities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    """Fractions of the weights to remove."""
    small_network_sparsities: tuple[float, ...] = (0.5, 0.7, 0.9, 0.95)  # Of which to train small dense networks, too.
    staged_sparsities: tuple[float, ...] = (0.5, 0.7, 0.9, 0.95)  # The same for pruning in stages.
    stages: int = 10  # Stages of it.
    calibration: int = 10_000  # How many training samples the criteria see.
    nonlinear_calibration: int = 500  # How many of these nonlinear-ec sees: its cost is weights times samples.
    snapshot_sparsity: float = 0.7  # Sparsity of the network in snapshots.png, pruned by elimination-compensation.
    cells: int = 256  # Cells of the solution in x.
    times: int = 101  # Times of the solution in (0, 500].
    initial_concentration: float = 0.1  # u(x, 0), in [0, 0.2].
    validation: bool = False  # Measure on a held-out sixth of the training points, noise and all, to choose settings.
    quick: bool = False  # One network of 32-32-32, one noise level, three sparsities: under a minute.
    output: Path = Path("results/diffusion-sorption")  # Folder for the results.


def main(config: Config) -> None:
    """Runs the experiment from the solution to the figures."""
    if config.quick:
        small = {"architectures": ("32-32-32",), "noise": (0.005,), "seeds": 1, "sparsities": (0.2, 0.4, 0.7)}
        config = replace(config, epochs=100, small_network_sparsities=(0.4, 0.7), staged_sparsities=(0.7,), **small)
    every_hidden = {f"2-{architecture}-1": _widths(architecture) for architecture in config.architectures}
    flags.require(config)
    grid = {"cells": config.cells, "times": config.times, "initial_concentration": config.initial_concentration}
    whole = {noise: diffusion_sorption.load(noise=noise, **grid) for noise in config.noise}
    data = {noise: hold_out(level) for noise, level in whole.items()} if config.validation else whole
    source, tuning, seeds = {"data": whole[config.noise[0]].name}, config.fine_tuning_epochs, range(config.seeds)
    with results.opened(config.output, config, data[config.noise[0]]) as rows, report.progress() as bar:
        for (layers, hidden), noise in itertools.product(every_hidden.items(), config.noise):
            where, name = source | {"layers": layers, "noise": noise}, f"{layers}, a = {noise:g}: "
            mlp, task = _task(hidden, data[noise], config)
            training = mlp, seeds, sweep.decaying_adam(task, config.learning_rate, config.epochs)
            training += (bar.track(range(config.epochs), description=f"{name}training"),)
            params = results.trained(config.output, f"{layers}-{noise:g}", sweep.train_seeds, task, *training)
            inputs, targets = (jnp.asarray(array[: config.calibration]) for array in data[noise][1:3])
            of_nonlinear = inputs[: config.nonlinear_calibration]
            compared = criteria(task.network, inputs, targets, of_nonlinear, task.loss, "euclidean")
            table = sweep.Table(rows, bar, where, name=name)
            last = sweep.FINE_TUNED if tuning else sweep.PRUNED
            left = table.left(config.methods, config.sparsities, config.seeds, last)
            optimizer = sweep.decaying_adam(task, config.learning_rate / 2, tuning)
            for found in sweep.one_shot(task, params, compared, left, optimizer, tuning):
                table.add(*found)
            for _, sparsity, seed in table.left([sweep.STAGED], config.staged_sparsities, config.seeds):
                dense = sweep.one_seed(params, seed)
                pruned = prune.staged(task.network, dense, inputs, sparsity, stages=config.stages)
                table.add(*sweep.one(task, pruned.params, sweep.STAGED, sparsity, sweep.PRUNED, seed=seed))
            for found in _small_dense(hidden, data[noise], config, table):
                table.add(*found)
        _draw_snapshots(task, params, optimizer, f"MLP {layers}, a = {noise:g}", config)

    tables, panels = [], {noise: [] for noise in config.noise}
    for layers in every_hidden:
        frame, keys = rows.frame().query("layers == @layers"), ["method", "sparsity", "seed", "phase"]
        wide = frame.pivot_table(index=keys, columns="noise", values="test_loss", sort=False).reset_index()
        title = f"{source['data']}, MLP {layers}, tanh, mean squared test error, {config.seeds} seeds"
        measures = {noise: sweep.ERROR._replace(words=f"error, a = {noise:g}") for noise in config.noise}
        tables.append(report.table(wide, measures, title))
        for noise, row in panels.items():
            chosen, title = frame[frame["noise"] == noise], f"{layers}, a = {noise:g}\n{{phase}}"
            row += report.panels(chosen, "test_loss", sweep.ERROR, title)
    report.figure(list(panels.values()), f"diffusion-sorption, tanh, {config.seeds} seeds", config.output / "loss.png")
    report.console().print(*tables, f"results.csv, config.json, loss.png and snapshots.png are in {config.output}/")


def _widths(architecture: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", architecture):
        raise SystemExit(f"--architectures are widths of hidden layers like 64-64-64, got {architecture!r}")
    return tuple(map(int, architecture.split("-")))


def _task(hidden: tuple[int, ...], data: Dataset, config: Config) -> tuple[networks.MLP, sweep.Task]:
    mlp, measures = networks.MLP((*hidden, 1), jnp.tanh), {"test_loss": sweep.ERROR}
    return mlp, sweep.Task(networks.from_linen(mlp), data, optax.squared_error, measures, config.batch_size)


def _small_dense(hidden: tuple[int, ...], data: Dataset, config: Config, table: sweep.Table) -> Iterator[sweep.Found]:
    """Yields what is found for networks that were small from the start; what is there is left out."""
    for sparsity in config.small_network_sparsities:
        if table.rows.count(**table.shared, method=sweep.SMALL, sparsity=sparsity) < config.seeds:
            mlp, task = _task(small_widths(hidden, sparsity), data, config)
            passes = table.bar.track(range(config.epochs), description=f"{table.name}small dense, {sparsity:g}")
            optimizer = sweep.decaying_adam(task, config.learning_rate, config.epochs)
            params = sweep.train_seeds(task, mlp, range(config.seeds), optimizer, passes)
            yield from sweep.unpruned(task, params, sweep.SMALL, sparsity)


def small_widths(widths: tuple[int, ...], sparsity: float) -> tuple[int, ...]:
    """Equal hidden widths, as wide as the parameters allow that are left at a sparsity; at least 1."""

    def parameters(widths: tuple[int, ...], kept: float = 1.0) -> float:
        every = (2, *widths, 1)
        return kept * sum(map(math.prod, itertools.pairwise(every))) + sum(every[1:])

    left = parameters(widths, 1 - sparsity)
    fitting = [width for width in range(1, max(widths) + 1) if parameters((width,) * len(widths)) <= left]
    return (max(fitting, default=1),) * len(widths)


def _draw_snapshots(task: sweep.Task, params: networks.Params, optimizer, title: str, config: Config) -> None:
    """u(x, t) at six times: noisy data, exact solution, and one network before and after fine-tuning."""
    first = sweep.one_seed(params, 0)
    scores = score.elimination_compensation(task.network, first, task.data.train_inputs[: config.calibration])
    pruned = prune.one_shot(first, scores, config.snapshot_sparsity)
    lines = {"pruned": (pruned.params, "#D55E00")}
    if config.fine_tuning_epochs:
        stacked = jax.tree.map(lambda leaf: leaf[None], pruned)
        tuned = sweep.fine_tune(task, stacked, optimizer, config.fine_tuning_epochs)
        lines["pruned and fine-tuned"] = (sweep.one_seed(tuned, 0), "#009E73")
    x, instants, exact = diffusion_sorption.grid(config.cells, config.times, config.initial_concentration)
    canvas, axes = plt.subplots(2, 3, figsize=(11, 6.5), sharex=True, sharey=True, layout="constrained")
    chosen = np.unique(np.geomspace(1, config.times, 6).round().astype(int)) - 1
    for axis, index in zip(axes.ravel(), chosen, strict=False):
        time = instants[index] / diffusion_sorption.LAST_TIME
        fourth = np.flatnonzero(np.isclose(task.data.train_inputs[:, 1], time))[::4]
        dots = task.data.train_inputs[fourth, 0], task.data.train_targets[fourth, 0]
        axis.plot(*dots, "k.", markersize=3, label="noisy data (every fourth)")
        axis.plot(x, exact[index], color="#0072B2", linewidth=1.5, label="exact")
        points = jnp.asarray(np.stack([x, np.full_like(x, time)], -1), jnp.float32)
        for name, (network_params, colour) in lines.items():
            axis.plot(x, task.network(network_params, points)[:, 0], "--", color=colour, linewidth=2, label=name)
        axis.set_title(f"t = {instants[index]:.0f}")
    axes[0, 0].set_ylim(exact.min() - 0.2 * np.ptp(exact), exact.max() + 0.2 * np.ptp(exact))
    plt.setp(axes[-1], xlabel="x")
    plt.setp(axes[:, 0], ylabel="u(x, t)")
    canvas.suptitle(f"diffusion-sorption, {title}, EC at sparsity {config.snapshot_sparsity:g}")
    report.save(canvas, config.output / "snapshots.png")


if __name__ == "__main__":
    results.command(Config, main, __doc__)
