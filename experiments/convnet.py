"""Pruning a residual convolutional network without labels: ``python -m experiments.convnet``.

It shows the test accuracy of a small residual network on handwritten digits, pruned in one shot, with its batch
statistics taken anew, with all biases moved, in stages with all survivors moved, and by gradual magnitude pruning,
which alone sees labels and trains. Half an hour to an hour on two cores, three minutes on the digits, one with --quick.
It writes results.csv, config.json, accuracy.png and loss.png, and prints the table; a gradient pass is one over the
calibration inputs, and scores take one random probe of the logits.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ecjax import metrics, networks, prune, repair, score, train
from ecjax.networks import Network, Params
from experiments import flags, report, results, sweep
from experiments.datasets import Dataset

COSTLY = ("EC, all biases", "EC, staged, survivors", "gradual magnitude, labels")
MEASURES = sweep.CLASSIFIER_MEASURES | {
    "seconds": sweep.Measure("seconds", ".1f"),
    "gradient_passes": sweep.Measure("gradient passes", ".0f"),
}


@dataclass(frozen=True)
class Config(flags.Digits):
    """Train a residual convnet on handwritten digits, prune it by several methods, and compare the test accuracies."""

    channels: tuple[int, ...] = (32, 64, 64)
    """Of each residual block; every change of width halves the image. A convolution of half the first comes before."""
    norm: Literal["batch", "layer"] = "batch"  # Normalisation after each convolution.
    epochs: int | None = None  # Epochs of training. Default: 5, or 40 on fewer than 10,000 images.
    learning_rate: float = 2e-3  # Adam's, at the start; it falls to zero along a cosine.
    batch_size: int = 128  # Samples a training step, and at a time in scores and repairs.
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # Fractions of the weights to remove.
    costly_sparsities: tuple[float, ...] = (0.9, 0.95)  # The same for methods that repair or train.
    calibration: int = 10_000  # Training images, without labels, that scores and repairs see.
    stages: int = 6  # Stages of the staged methods.
    iterations: int = 8  # Steps of a repair, in each stage.
    products: int = 15  # Products with the curvature in each step.
    curvature: int = 250  # Calibration inputs that the curvature of a step is of.
    temperature: float = 4.0  # Of the Fisher metric in stages.
    gradual_epochs: int = 8  # Epochs of gradual pruning: about as many gradients as the repairs in stages.
    quick: bool = False  # A narrow network, one seed, two sparsities.


class ConvNet(nn.Module):
    """Residual blocks of two convolutions, with a norm after each, and a dense layer on the means of the channels."""

    channels: tuple[int, ...]
    classes: int
    norm: str

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        """The logits of square images, which come as rows of pixels."""
        normed = nn.LayerNorm if self.norm == "layer" else functools.partial(nn.BatchNorm, not train, momentum=0.9)
        side = math.isqrt(inputs.shape[-1])
        stream = nn.Conv((self.channels[0] + 1) // 2, (3, 3), strides=2)(inputs.reshape(-1, side, side, 1))
        stream = nn.relu(normed()(stream))
        for channels in self.channels:
            strides = 1 if channels == stream.shape[-1] else 2
            branch = nn.relu(normed()(nn.Conv(channels, (3, 3), strides)(stream)))
            branch = normed()(nn.Conv(channels, (3, 3))(branch))
            stream = nn.Conv(channels, (1, 1), strides)(stream) if strides > 1 else stream
            stream = nn.relu(stream + branch)
        return nn.Dense(self.classes)(stream.mean((1, 2)))


def methods(
    task: sweep.Task, module: ConvNet, variables: Params, config: Config, seed: int
) -> dict[str, Callable[[float], tuple[Network, Any]]]:
    """By name: from a sparsity to a network and what is pruned."""
    network, params, (inputs, labels) = task.network, variables["params"], map(jnp.asarray, task.data[1:3])
    seen, key, at_a_time = inputs[: config.calibration], jax.random.key(seed), {"batch_size": config.batch_size}
    steps = {"iterations": config.iterations, "products": config.products, "curvature_samples": config.curvature}

    def one_shot(sparsity, criterion):
        return network, prune.one_shot(params, criterion(network, params, seen), sparsity)

    def with_statistics(sparsity, criterion):
        """Batch statistics belong to the network: taken anew, they make another one."""
        pruned = prune.one_shot(params, criterion(network, params, seen), sparsity)
        anew = networks.batch_statistics(module, pruned.params, variables, seen, train=True)
        return networks.from_linen(module, variables=anew, train=False), pruned

    def all_biases(sparsity):
        pruned = prune.one_shot(params, ec(network, params, seen), sparsity)
        how = repair.Biases(metric="fisher", **steps, **at_a_time)
        moved = how(network, pruned.params, pruned.masks, seen, network(params, seen))
        return network, pruned._replace(params=moved)

    def staged(sparsity):
        metric = metrics.Fisher(config.temperature)
        drawn = functools.partial(score.elimination_compensation, metric=metric, probes=1, **at_a_time)
        survivors = repair.Survivors(metric=metric, **steps, **at_a_time)
        options = {"stages": config.stages, "criterion": drawn, "repair": survivors, "key": key}
        return network, prune.staged(network, params, seen, sparsity, **options)

    def gradual(sparsity):
        optimizer = sweep.decaying_adam(task, config.learning_rate, config.gradual_epochs)
        options = {"optimizer": optimizer, "epochs": config.gradual_epochs, "key": key, **at_a_time}
        return network, train.gradually(network, params, inputs, labels, task.loss, sparsity, **options)

    how = {"metric": "fisher", "probes": 1, "key": key, **at_a_time}
    ec = functools.partial(score.elimination_compensation, **how)
    damage = functools.partial(score.optimal_brain_damage, **how)
    found = {
        "magnitude": functools.partial(one_shot, criterion=score.magnitude),
        "optimal brain damage": functools.partial(one_shot, criterion=damage),
        "EC": functools.partial(one_shot, criterion=ec),
        "EC, all biases": all_biases,
        "EC, staged, survivors": staged,
        "gradual magnitude, labels": gradual,
    }
    if config.norm == "batch":
        found |= {
            "magnitude, batch statistics": functools.partial(with_statistics, criterion=score.magnitude),
            "EC, batch statistics": functools.partial(with_statistics, criterion=ec),
        }
    return found


def main(config: Config) -> None:
    """Runs the experiment from data to figures."""
    flags.require(config, repeating=("channels",))
    data = config.load()
    if config.quick:
        small = {"channels": (8, 16), "epochs": 20, "stages": 2, "gradual_epochs": 1}
        config = replace(config, seeds=1, sparsities=(0.5, 0.8), costly_sparsities=(0.8,), **small)
    config = replace(config, epochs=config.epochs or (5 if len(data.train_inputs) >= 10_000 else 40))
    module = ConvNet(config.channels, int(data.train_targets.max()) + 1, config.norm)
    folder = config.output or Path("results") / f"convnet-{config.norm}-{data.name.lower()}"
    with results.opened(folder, config, data) as rows, report.progress() as bar:
        table, left = sweep.Table(rows, bar, {"data": data.name, "norm": config.norm}), None
        for seed in range(config.seeds):
            passes = bar.track(range(config.epochs), description=f"training {seed + 1} of {config.seeds}")
            variables = results.trained(folder, f"dense-{seed}", train_on, module, data, config, seed, passes)
            network = networks.from_linen(module, variables=variables, train=False)
            task = sweep.Task(network, data, sweep.cross_entropy, sweep.CLASSIFIER_MEASURES, config.batch_size)
            compared = methods(task, module, variables, config, seed)
            every = {name: config.costly_sparsities if name in COSTLY else config.sparsities for name in compared}
            left = left or table.left(compared, every, config.seeds)

            few = [jnp.asarray(array[: config.batch_size]) for array in data[1:3]]
            _, of_batch = sweep.clocked(sweep.gradient_pass, network, variables["params"], *few)
            of_gradient = of_batch * min(config.calibration, len(data.train_inputs)) / len(few[0])
            keys = {"seed": seed, "seconds": of_gradient, "gradient_passes": 1.0}
            table.add(*sweep.one(task, variables["params"], sweep.DENSE, 0.0, sweep.TRAINED, **keys))
            compiled = set()
            for method, sparsity, _ in (case for case in left if case[2] == seed):
                # To compile is a small part of what the costly ones take, so they run once.
                once = method in (*COSTLY, *compiled)
                (judged, pruned), seconds = sweep.clocked(compared[method], sparsity, compiled=once)
                compiled.add(method)
                keys = {"seed": seed, "seconds": seconds, "gradient_passes": seconds / of_gradient}
                judged = task._replace(network=judged)
                table.add(*sweep.one(judged, pruned.params, method, sparsity, sweep.PRUNED, **keys))

    title = f"{data.name}, residual convnet of {config.channels} channels, {config.norm} norm, {config.seeds} seeds"
    report.figures(rows.frame(), sweep.CLASSIFIER_MEASURES, title, folder)
    note = f"results.csv, config.json, accuracy.png and loss.png are in {folder}/"
    report.console().print(report.table(rows.frame(), MEASURES, title), note)


def train_on(module: ConvNet, data: Dataset, config: Config, seed: int, passes: Iterable[int]) -> Params:
    """Trains in training mode, where batch statistics move; gives all variables."""
    inputs, labels = map(jnp.asarray, data[1:3])
    task = sweep.Task(networks.from_linen(module, train=False), data, sweep.cross_entropy, {}, config.batch_size)
    optimizer = sweep.decaying_adam(task, config.learning_rate, config.epochs)
    first, shuffle = jax.random.split(jax.random.key(seed))
    variables = module.init(first, inputs[:1], train=False)
    state = optimizer.init(variables["params"])

    @jax.jit
    def step(variables, state, batch):
        def loss(params):
            given = {**variables, "params": params}, inputs[batch]
            logits, moved = module.apply(*given, train=True, mutable=["batch_stats"])
            return sweep.cross_entropy(logits, labels[batch]).mean(), moved

        slopes, moved = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(slopes, state)
        return {"params": optax.apply_updates(variables["params"], updates), **moved}, state

    batches = train.steps_per_epoch(len(inputs), config.batch_size)
    for epoch in passes:
        order = jax.random.permutation(jax.random.fold_in(shuffle, epoch), len(inputs))
        for batch in order[: batches * config.batch_size].reshape(batches, -1):
            variables, state = step(variables, state, batch)
    return variables


if __name__ == "__main__":
    results.command(Config, main, __doc__)
