"""Pruning a residual convolutional network without labels: ``python -m experiments.convnet``.

It shows the test accuracy of a small residual network on handwritten digits, pruned in one shot, with its batch
statistics taken anew, with all biases moved, in stages with all survivors moved, and by gradual magnitude pruning,
which alone sees labels and trains. Half an hour on two cores, three minutes on the digits, one with --quick. It writes
results.csv, config.json, accuracy.png and loss.png, and prints the table; a gradient pass is one over the calibration
inputs.
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

    channels: tuple[int, ...] = (16, 32, 64, 64)  # Of each residual block; every change of width halves the image.
    norm: Literal["batch", "layer"] = "batch"  # Normalisation after each convolution.
    epochs: int | None = None  # Epochs of training. Default: 3, or 40 on fewer than 10,000 images.
    learning_rate: float = 2e-3  # Adam's, at the start; it falls to zero along a cosine.
    batch_size: int = 128  # Samples a training step.
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # Fractions of the weights to remove.
    costly_sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)  # The same for methods that repair or train.
    calibration: int = 2_000  # Training images, without labels, that scores and repairs see.
    stages: int = 6  # Stages of the staged methods.
    iterations: int = 3  # Steps of a repair in each stage.
    curvature: int = 250  # Calibration inputs that the curvature of a step is of.
    temperature: float = 2.0  # Of the Fisher metric that the repair of survivors minimises.
    gradual_epochs: int = 3  # Epochs of gradual pruning.
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
        stream = nn.Conv(self.channels[0], (3, 3), strides=2)(inputs.reshape(-1, side, side, 1))
        stream = nn.relu(normed()(stream))
        for channels in self.channels:
            strides = 1 if channels == stream.shape[-1] else 2
            branch = nn.relu(normed()(nn.Conv(channels, (3, 3), strides)(stream)))
            branch = normed()(nn.Conv(channels, (3, 3))(branch))
            stream = nn.Conv(channels, (1, 1), strides)(stream) if strides > 1 else stream
            stream = nn.relu(stream + branch)
        return nn.Dense(self.classes)(stream.mean((1, 2)))


def methods(
    module: ConvNet, variables: Params, data: Dataset, config: Config, seed: int
) -> dict[str, Callable[[float], tuple[Network, Any]]]:
    """By name: from a sparsity to a network and what is pruned."""
    network, params = networks.from_linen(module, variables=variables, train=False), variables["params"]
    inputs, labels = map(jnp.asarray, data[1:3])
    seen = inputs[: config.calibration]
    dense, sizes = network(params, seen), {"curvature_samples": config.curvature, "products": 10}

    def one_shot(sparsity, criterion):
        return network, prune.one_shot(params, criterion(network, params, seen), sparsity)

    def with_statistics(sparsity, criterion):
        """Batch statistics belong to the network: taken anew, they make another one."""
        pruned = prune.one_shot(params, criterion(network, params, seen), sparsity)
        anew = networks.batch_statistics(module, pruned.params, variables, seen, train=True)
        return networks.from_linen(module, variables=anew, train=False), pruned

    def all_biases(sparsity):
        pruned = prune.one_shot(params, ec(network, params, seen), sparsity)
        how = repair.Biases(iterations=config.stages * config.iterations, metric="fisher", **sizes)
        return network, pruned._replace(params=how(network, pruned.params, pruned.masks, seen, dense))

    def staged(sparsity):
        metric = metrics.Fisher(config.temperature)
        how = repair.Survivors(iterations=config.iterations, metric=metric, **sizes)
        options = {"stages": config.stages, "repair": how, "metric": "fisher"}
        return network, prune.staged(network, params, seen, sparsity, **options)

    def gradual(sparsity):
        options = {"epochs": config.gradual_epochs, "batch_size": config.batch_size, "key": jax.random.key(seed)}
        given = network, params, inputs, labels, sweep.cross_entropy, sparsity
        return network, train.gradually(*given, optimizer=adam(data, config, config.gradual_epochs), **options)

    ec = functools.partial(score.elimination_compensation, metric="fisher")
    damage = functools.partial(score.optimal_brain_damage, metric="fisher")
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
    config = replace(config, epochs=config.epochs or (3 if len(data.train_inputs) >= 10_000 else 40))
    module = ConvNet(config.channels, int(data.train_targets.max()) + 1, config.norm)
    folder = config.output or Path("results") / f"convnet-{config.norm}-{data.name.lower()}"
    with results.opened(folder, config, data) as rows, report.progress() as bar:
        table, left = sweep.Table(rows, bar, {"data": data.name, "norm": config.norm}), None
        for seed in range(config.seeds):
            passes = bar.track(range(config.epochs), description=f"training {seed + 1} of {config.seeds}")
            variables = results.trained(folder, f"dense-{seed}", train_on, module, data, config, seed, passes)
            network = networks.from_linen(module, variables=variables, train=False)
            compared = methods(module, variables, data, config, seed)
            every = {name: config.costly_sparsities if name in COSTLY else config.sparsities for name in compared}
            left = left or table.left(compared, every, config.seeds)

            task = sweep.Task(network, data, sweep.cross_entropy, sweep.CLASSIFIER_MEASURES)
            seen = [jnp.asarray(array[: config.calibration]) for array in data[1:3]]
            _, of_gradient = sweep.clocked(sweep.gradient_pass, network, variables["params"], *seen)
            keys = {"seed": seed, "seconds": of_gradient, "gradient_passes": 1.0}
            table.add(*sweep.one(task, variables["params"], sweep.DENSE, 0.0, sweep.TRAINED, **keys))
            compiled = set()
            for method, sparsity, _ in (case for case in left if case[2] == seed):
                call = compared[method]
                # To compile is a small part of what the costly ones take, so they run once.
                found, seconds = sweep.clocked(call, sparsity, compiled=method in (*COSTLY, *compiled))
                network, pruned = found
                compiled.add(method)
                keys = {"seed": seed, "seconds": seconds, "gradient_passes": seconds / of_gradient}
                judged = task._replace(network=network)
                table.add(*sweep.one(judged, pruned.params, method, sparsity, sweep.PRUNED, **keys))

    title = f"{data.name}, residual convnet of {config.channels} channels, {config.norm} norm, {config.seeds} seeds"
    for column, measure in sweep.CLASSIFIER_MEASURES.items():
        panels = report.panels(rows.frame(), column, measure)
        report.figure([panels], title, folder / f"{column.removeprefix('test_')}.png")
    note = f"results.csv, config.json, accuracy.png and loss.png are in {folder}/"
    report.console().print(report.table(rows.frame(), MEASURES, title), note)


def adam(data: Dataset, config: Config, epochs: int) -> optax.GradientTransformation:
    """Adam whose learning rate falls to zero over so many epochs along half a cosine."""
    steps = epochs * train.steps_per_epoch(len(data.train_inputs), config.batch_size)
    return optax.adam(optax.cosine_decay_schedule(config.learning_rate, steps))


def train_on(module: ConvNet, data: Dataset, config: Config, seed: int, passes: Iterable[int]) -> Params:
    """Trains in training mode, where batch statistics move; gives all variables."""
    inputs, labels = map(jnp.asarray, data[1:3])
    optimizer, (first, shuffle) = adam(data, config, config.epochs), jax.random.split(jax.random.key(seed))
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
