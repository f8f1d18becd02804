"""Pruning a residual convolutional network without labels: ``python -m experiments.convnet``.

It shows the test accuracy of a small residual network on handwritten digits, pruned in one shot, with its batch
statistics taken anew, with all biases moved, in stages with all survivors moved, and by gradual magnitude pruning,
which alone sees labels and trains. It takes half an hour on two cores, three minutes on the digits, one with --quick.
It writes results.csv, config.json, accuracy.png and loss.png, and prints the table. Scores take one random probe.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ecjax import metrics, networks, prune, repair, score, train
from ecjax.networks import Network, Params
from experiments import flags, report, results, sweep
from experiments.datasets import Dataset

COSTLY = ("EC, all biases", sweep.STAGED, sweep.GRADUAL)


@dataclass(frozen=True)
class Config(flags.Digits):
    """Train a residual convnet on handwritten digits, prune it by several methods, and compare the test accuracies."""

    channels: tuple[int, ...] = (32, 64, 64)  # Of each residual block; every change of width halves the image.
    seeds: int = 1  # How many networks to train, prune and average over.
    norm: Literal["batch", "layer"] = "batch"  # Normalisation after each convolution.
    epochs: int | None = None  # Epochs of training. Default: 5, or 40 on fewer than 10,000 images.
    learning_rate: float = 2e-3  # Adam's, at the start; it falls to zero along a cosine.
    batch_size: int = 128  # Samples a training step, and at a time in scores and repairs.
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # Fractions of the weights to remove.
    costly_sparsities: tuple[float, ...] = (0.9, 0.95)  # The same for methods that repair or train.
    calibration: int = 10_000  # Training images, without labels, that scores and repairs see.
    stages: int = 6  # Stages of the staged methods.
    samples: float = 1.0  # Part of the calibration images that the stages before the last see.
    iterations: int = 8  # Steps of a repair, in each stage but the last.
    last_iterations: int = 8  # Steps after the last stage.
    products: int = 15  # Products with the curvature in each step.
    curvature: int = 250  # Calibration inputs that the curvature of a step is of.
    temperature: float = 4.0  # Of the Fisher metric in stages.
    gradual_epochs: int = 8  # Epochs of gradual pruning: about as many gradients as the repairs in stages.
    keep_stages: bool = False  # A staged run that was stopped goes on after its last stage; seconds count from there.
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


class Seen(NamedTuple):
    """What a method sees of one seed: the network with its batch statistics, all its variables, and a key."""

    network: Network
    variables: Params
    key: jax.Array


def methods(task: sweep.Task, module: ConvNet, config: Config, folder: Path) -> sweep.Methods:
    """By name: from what is seen and a sparsity to all variables of the pruned network."""
    inputs, batch = jnp.asarray(task.data.train_inputs[: config.calibration]), {"batch_size": config.batch_size}
    steps = {"iterations": config.iterations, "products": config.products, "curvature_samples": config.curvature}
    metric = metrics.Fisher(config.temperature)

    def scores(seen: Seen, criterion) -> score.Scores:
        how = {} if criterion is score.magnitude else {"metric": "fisher", "probes": 1, "key": seen.key, **batch}
        return criterion(seen.network, seen.variables["params"], inputs, **how)

    def whole(seen: Seen, pruned: prune.Pruned, **statistics) -> prune.Pruned:
        return pruned._replace(params={**seen.variables, **statistics, "params": pruned.params})

    def one_shot(seen: Seen, sparsity: float, criterion, anew: bool = False) -> prune.Pruned:
        pruned = prune.one_shot(seen.variables["params"], scores(seen, criterion), sparsity)
        given = module, pruned.params, seen.variables, inputs
        return whole(seen, pruned, **(networks.batch_statistics(*given, train=True) if anew else {}))

    def all_biases(seen: Seen, sparsity: float) -> prune.Pruned:
        params, how = seen.variables["params"], repair.Biases(metric="fisher", **steps, **batch)
        pruned = prune.one_shot(params, scores(seen, score.elimination_compensation), sparsity)
        moved = how(seen.network, pruned.params, pruned.masks, inputs, seen.network(params, inputs))
        return whole(seen, pruned._replace(params=moved))

    def staged(seen: Seen, sparsity: float) -> prune.Pruned:
        drawn = functools.partial(score.elimination_compensation, metric=metric, probes=1, **batch)
        survivors = repair.Survivors(metric=metric, last_iterations=config.last_iterations, **steps, **batch)
        options = {"criterion": drawn, "repair": survivors, "stages": config.stages, "samples": config.samples}
        given = seen.network, seen.variables["params"], inputs, sparsity
        kept = folder / "stages" / f"{sparsity:g}-{jax.random.key_data(seen.key)[-1]}" if config.keep_stages else None
        return whole(seen, prune.staged(*given, key=seen.key, checkpoints=kept, **options))

    def gradual(seen: Seen, sparsity: float) -> prune.Pruned:
        optimizer = sweep.decaying_adam(task, config.learning_rate, config.gradual_epochs)
        options = {"optimizer": optimizer, "epochs": config.gradual_epochs, "key": seen.key, **batch}
        given = seen.network, seen.variables["params"], *map(jnp.asarray, task.data[1:3]), task.loss, sparsity
        return whole(seen, train.gradually(*given, **options))

    criteria = {"magnitude": score.magnitude, "EC": score.elimination_compensation}
    criteria["optimal brain damage"] = score.optimal_brain_damage
    found = {name: functools.partial(one_shot, criterion=criterion) for name, criterion in criteria.items()}
    for name in ("magnitude", "EC") if config.norm == "batch" else ():
        found[f"{name}, batch statistics"] = functools.partial(found[name], anew=True)
    return found | {"EC, all biases": all_biases, sweep.STAGED: staged, sweep.GRADUAL: gradual}


def main(config: Config) -> None:
    """Runs the experiment from data to figures."""
    flags.require(config, repeating=("channels",))
    data = config.load()
    if config.quick:
        small = {"channels": (8, 16), "epochs": 20, "stages": 2, "gradual_epochs": 1}
        config = replace(config, seeds=1, sparsities=(0.5, 0.8), costly_sparsities=(0.8,), **small)
    config = replace(config, epochs=config.epochs or (5 if len(data.train_inputs) >= 10_000 else 40))
    module = ConvNet(config.channels, int(data.train_targets.max()) + 1, config.norm)
    network = functools.partial(module.apply, train=False)  # of all variables
    task = sweep.Task(network, data, sweep.cross_entropy, sweep.CLASSIFIER_MEASURES, config.batch_size)
    folder = config.output or Path("results") / f"convnet-{config.norm}-{data.name.lower()}"
    with results.opened(folder, config, data) as rows, report.progress() as bar:

        def trained(seed: int) -> Params:
            passes = bar.track(range(config.epochs), description=f"training {seed + 1} of {config.seeds}")
            return results.trained(folder, f"dense-{seed}", train_on, module, data, config, seed, passes)

        def seen(seed: int) -> Seen:
            variables = sweep.one_seed(stacked, seed)
            return Seen(networks.from_linen(module, variables=variables, train=False), variables, jax.random.key(seed))

        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(trained, range(config.seeds)))
        table = sweep.Table(rows, bar, {"data": data.name, "norm": config.norm})
        compared = methods(task, module, config, folder)
        levels = {name: config.costly_sparsities if name in COSTLY else config.sparsities for name in compared}
        left = table.left(compared, levels, config.seeds)
        first, few = seen(0), [jnp.asarray(array[: config.batch_size]) for array in data[1:3]]
        _, of_batch = sweep.clocked(sweep.gradient_pass, first.network, first.variables["params"], *few)
        gradient = of_batch * min(config.calibration, len(data.train_inputs)) / len(few[0])
        for found in sweep.timed(task, stacked, compared, left, seen, costly=COSTLY, gradient=gradient):
            table.add(*found)
    title = f"{data.name}, residual convnet of {config.channels} channels, {config.norm} norm, {config.seeds} seeds"
    report.end(folder, rows.frame(), sweep.CLASSIFIER_MEASURES, title, **sweep.PRICE)


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
