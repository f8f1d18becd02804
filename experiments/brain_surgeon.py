"""The brain surgeons on a modest network of digits: ``python -m experiments.brain_surgeon``.

As in the one-shot tables of the combinatorial brain surgeon (arXiv:2203.04466), it shows the accuracy of an MLP
784-40-20-10 without biases that plain SGD trained until 94 % of held-out training images were right, and that is
pruned without any training after. It takes a quarter of an hour on two cores, on the digits under one minute.
It writes results.csv, config.json, accuracy.png and loss.png, and prints the table with the seconds of each method.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ecjax import networks, prune, score, surgeon, train
from experiments import flags, report, results, sweep
from experiments.datasets import hold_out


@dataclass(frozen=True)
class Config(flags.Digits):
    """Prune one modest network by magnitude, WoodFisher, the combinatorial brain surgeon and EC, and compare."""

    widths: tuple[int, ...] = (40, 20)  # Widths of the hidden layers (ReLU, no biases).
    target_accuracy: float = 0.94  # Plain SGD stops at the first epoch that reaches it on held-out training images.
    learning_rate: float = 0.05  # Of plain SGD.
    batch_size: int = 128  # Samples a training step.
    seeds: int = 5  # How many samples of gradients to average over.
    gradients: int = 2000  # Per-sample gradients in each; at most as many as half of the training images.
    sparsities: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)  # Fractions of the weights to remove.
    damping: float = 0.01  # λ of the empirical Fisher, the library's; the smaller, the more the quadratic is trusted.
    draws: int = 100  # Draws of randomised magnitude pruning, where the combinatorial selection starts.


class Seen(NamedTuple):
    """What a method sees of one seed: a sample of images, their gradients, and a key."""

    inputs: jax.Array
    gradients: networks.Kernels
    key: jax.Array


def methods(network: networks.Network, params: networks.Params, config: Config) -> sweep.Methods:
    """By name: from what is seen and a sparsity to the pruned network."""
    damping = {"damping": config.damping}

    def one_shot(seen: Seen, sparsity: float, criterion=score.magnitude, **options) -> prune.Pruned:
        return prune.one_shot(params, criterion(network, params, seen.inputs, **options), sparsity)

    def saliency(seen: Seen, sparsity: float) -> prune.Pruned:
        scores = surgeon.brain_surgeon_saliency_from_gradients(params, seen.gradients, **damping)
        return prune.one_shot(params, scores, sparsity)

    def selection(seen: Seen, sparsity: float, start: str = "magnitude") -> prune.Pruned:
        options = damping | {"start": start, "draws": config.draws, "key": seen.key}
        masks = surgeon.combinatorial_selection(params, seen.gradients, sparsity, **options)
        return prune.Pruned(prune.apply_masks(params, masks), masks)

    def updated(seen: Seen, sparsity: float, select, update=surgeon.combinatorial_update) -> prune.Pruned:
        masks = select(seen, sparsity).masks
        return prune.Pruned(update(params, masks, seen.gradients, **damping), masks)

    return {
        "magnitude": one_shot,
        "magnitude + CBS-U": functools.partial(updated, select=one_shot),
        "WoodFisher": functools.partial(updated, select=saliency, update=surgeon.brain_surgeon_update),
        "CBS-S (magnitude)": selection,
        "CBS-S (RMP)": functools.partial(selection, start="rmp"),
        "CBS-S + CBS-U": functools.partial(updated, select=selection),
        "EC (Fisher)": functools.partial(one_shot, criterion=score.elimination_compensation, metric="fisher"),
    }


def main(config: Config) -> None:
    """Runs the experiment from data to figures and table."""
    flags.require(config, repeating=("widths",))
    data = config.load()
    features, layers = flags.widths(data, config.widths)
    mlp, network = networks.MLP(features, use_bias=False), networks.from_linen(networks.MLP(features))
    task = sweep.Task(network, data, sweep.cross_entropy, sweep.CLASSIFIER_MEASURES, config.batch_size)
    folder = config.output or Path("results") / f"brain-surgeon-{data.name.lower()}"
    with results.opened(folder, config, data, layers=layers) as rows, report.progress() as bar:
        dense = results.trained(folder, layers, train_to_target, task, mlp, config)
        # Biases of zero, which only elimination-compensation moves.
        params = {name: layer | {"bias": jnp.zeros(layer["kernel"].shape[-1])} for name, layer in dense.items()}
        inputs, labels = jnp.asarray(data.train_inputs), jnp.asarray(data.train_targets)

        def seen(seed: int) -> Seen:
            key = jax.random.key(seed)
            samples = min(config.gradients, len(inputs) // 2)  # of few samples, half: or all seeds were the same
            chosen = jax.random.choice(key, len(inputs), (samples,), replace=False)
            few = inputs[chosen]
            gradients = surgeon.loss_gradients(network, params, few, labels[chosen], sweep.cross_entropy)
            return Seen(few, jax.block_until_ready(gradients), key)

        compared, stacked = methods(network, params, config), jax.tree.map(lambda leaf: leaf[None], params)
        table = sweep.Table(rows, bar, {"data": data.name})
        left = table.left(compared, config.sparsities, config.seeds)
        for found in sweep.timed(task, stacked, compared, left, seen):
            table.add(*found)
    title = f"{data.name}, MLP {layers} without biases, {config.seeds} samples of gradients"
    report.end(folder, rows.frame(), sweep.CLASSIFIER_MEASURES, title, **sweep.SECONDS)


def train_to_target(task: sweep.Task, mlp: networks.MLP, config: Config) -> networks.Params:
    """Plain SGD until an epoch reaches the target on held-out training images, 200 epochs at the most."""
    data, optimizer, network = hold_out(task.data), optax.sgd(config.learning_rate), networks.from_linen(mlp)
    inputs, targets = jnp.asarray(data.train_inputs), jnp.asarray(data.train_targets)
    state = train.start(mlp.init(jax.random.key(0), inputs[:1])["params"], optimizer, jax.random.key(1))
    options = {"optimizer": optimizer, "batch_size": config.batch_size}
    for _ in range(200):
        state, _ = train.epoch(network, state, inputs, targets, task.loss, **options)
        reached = float((network(state.params, data.test_inputs).argmax(-1) == data.test_targets).mean())
        if reached >= config.target_accuracy:
            return state.params
    raise SystemExit(f"200 epochs of SGD reached {reached:.2%}; lower --target-accuracy or raise --learning-rate")


if __name__ == "__main__":
    results.command(Config, main, __doc__)
