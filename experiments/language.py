"""Pruning a character language model without labels: ``python -m experiments.language``.

It shows the cross-entropy of a small GPT on Shakespeare, pruned in one shot, by SparseGPT, in stages with each repair,
and by gradual magnitude pruning, which alone sees labels and trains. It takes half an hour on two cores, with --quick a
minute. It writes results.csv, config.json and loss.png, and prints a table, and text by three of the networks.
"""

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from rich.table import Table

from ecjax import metrics, networks, prune, repair, score, surgeon, train
from experiments import flags, report, results, sweep
from experiments.datasets import Dataset, text

NATS = sweep.Measure("cross-entropy in nats", ".3f", lambda z, targets: sweep.cross_entropy(z, targets).mean())
OTHERS = {"bits": sweep.Measure("bits per character", ".3f"), "perplexity": sweep.Measure("perplexity", ".2f")}
SHOWN = ("SparseGPT", sweep.STAGED)  # whose text is printed beside that of the dense network
COSTLY = ("EC, staged, biases", sweep.STAGED, "magnitude + survivors", sweep.GRADUAL)


@dataclass(frozen=True)
class Config:
    """Train a character GPT, prune its dense kernels by methods from magnitude to staged survivors, and compare."""

    text: Path | None = None  # File of text, or gzipped. Default: $ECJAX_TEXT, tiny_shakespeare or Python's own help.
    characters: int | None = None  # How many characters of the text to take. Default: all.
    layers: int = 3  # Blocks of attention and a hidden layer.
    width: int = 128  # Of the residual stream; the hidden layers are four times as wide.
    heads: int = 4  # Of each attention.
    positions: int = 64  # Characters that a prediction sees at most.
    epochs: int = 5  # Passes over the text in training.
    learning_rate: float = 4e-3  # Adam's, at its highest; it falls to zero along a cosine.
    batch_size: int = 64  # Sequences a training step.
    sparsities: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # Fractions to remove of the dense kernels.
    costly_sparsities: tuple[float, ...] = (0.7, 0.8, 0.9)  # The same for methods that take a hundred gradient passes.
    calibration: int = 512  # Calibration inputs, sequences of the training text.
    stages: int = 6  # Stages of the staged methods.
    samples: float = 0.25  # Part of the calibration inputs that the stages before the last see.
    iterations: int = 2  # Steps of a repair in each stage but the last.
    last_iterations: int = 8  # Steps after the last stage.
    products: int = 10  # Products with the curvature in each step of a repair.
    curvature: int = 96  # Calibration inputs that the curvature is of.
    temperature: float = 4.0  # Of the Fisher metric of all criteria, and of survivors.
    gradual_epochs: int = 3  # Passes over the text of gradual pruning: about as many gradients as staged survivors see.
    gradual_learning_rate: float = 5e-3  # Of gradual pruning.
    seeds: int = 1  # How many samples of calibration inputs to average over.
    keep_stages: bool = False  # A staged run that was stopped goes on after its last stage; seconds count from there.
    validation: bool = False  # Measure on the validation part of the text instead, to choose settings by.
    quick: bool = False  # A network of one narrow block on a part of the text, and few calibration inputs.
    output: Path | None = None  # Folder for the results. Default: results/language- and the name of the text.


class GPT(nn.Module):
    """A transformer that predicts each character from those before it."""

    characters: int
    layers: int
    width: int
    heads: int

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """The logits of the next character, of shape (samples, positions, characters)."""
        places = jnp.arange(tokens.shape[1])
        stream = nn.Embed(self.characters, self.width)(tokens) + nn.Embed(len(places), self.width)(places)
        for _ in range(self.layers):
            attention = nn.MultiHeadDotProductAttention(self.heads)
            stream += attention(nn.LayerNorm()(stream), mask=nn.make_causal_mask(tokens))
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(stream)))
            stream += nn.Dense(self.width)(hidden)
        return nn.Dense(self.characters)(nn.LayerNorm()(stream))


class Seen(NamedTuple):
    """What a method sees of one seed: sequences, and a key."""

    inputs: Array
    key: Array


def methods(task: sweep.Task, params: networks.Params, config: Config, folder: Path) -> sweep.Methods:
    """By name: from what is seen and a sparsity to the pruned network."""
    network, metric = task.network, metrics.Fisher(config.temperature)
    optimizer = sweep.decaying_adam(task, config.gradual_learning_rate, config.gradual_epochs)
    sizes = {"products": config.products, "curvature_samples": config.curvature}

    def one_shot(seen: Seen, sparsity: float, criterion, scope: str = "network") -> prune.Pruned:
        return prune.one_shot(params, criterion(network, params, seen.inputs), sparsity, scope=scope)

    def probed(seen: Seen, sparsity: float, criterion) -> prune.Pruned:
        drawn = functools.partial(criterion, metric=metric, probes=1, key=seen.key)
        return one_shot(seen, sparsity, drawn)

    def repaired(seen: Seen, sparsity: float) -> prune.Pruned:
        """One shot by magnitude, and then as many steps as all stages take together, on all inputs."""
        pruned, dense = one_shot(seen, sparsity, score.magnitude), network(params, seen.inputs)
        steps = config.iterations * (config.stages - 1) + config.last_iterations
        survivors = repair.Survivors(iterations=steps, metric=metric, **sizes)
        return pruned._replace(params=survivors(network, pruned.params, pruned.masks, seen.inputs, dense))

    def staged(seen: Seen, sparsity: float, repairing) -> prune.Pruned:
        criterion, steps = functools.partial(score.elimination_compensation, probes=1), config.last_iterations
        of_all = metric if repairing is repair.Survivors else None
        how = repairing(iterations=config.iterations, last_iterations=steps, metric=of_all, **sizes)
        place = f"{repairing.__name__}-{sparsity:g}-{jax.random.key_data(seen.key)[-1]}"
        kept = folder / "stages" / place if config.keep_stages else None
        options = {"stages": config.stages, "samples": config.samples, "criterion": criterion, "checkpoints": kept}
        return prune.staged(network, params, seen.inputs, sparsity, repair=how, metric=metric, key=seen.key, **options)

    def gradual(seen: Seen, sparsity: float) -> prune.Pruned:
        given = network, params, *map(jnp.asarray, task.data[1:3]), task.loss, sparsity
        options = {"epochs": config.gradual_epochs, "batch_size": config.batch_size, "key": seen.key}
        return train.gradually(*given, optimizer=optimizer, **options)

    return {
        "magnitude": functools.partial(one_shot, criterion=score.magnitude),
        "Wanda": functools.partial(one_shot, criterion=score.wanda, scope="neuron"),
        "optimal brain damage": functools.partial(probed, criterion=score.optimal_brain_damage),
        "EC": functools.partial(probed, criterion=score.elimination_compensation),
        "SparseGPT": lambda seen, sparsity: surgeon.sparse_gpt(network, params, seen.inputs, sparsity),
        "EC, staged, biases": functools.partial(staged, repairing=repair.Biases),
        sweep.STAGED: functools.partial(staged, repairing=repair.Survivors),
        "magnitude + survivors": repaired,
        sweep.GRADUAL: gradual,
    }


def main(config: Config) -> None:
    """Runs the experiment from text to table, figure and text again."""
    flags.require(config)
    if config.quick:
        small = {"layers": 1, "width": 32, "heads": 2, "epochs": 4, "characters": 200_000, "gradual_epochs": 1}
        small |= {"calibration": 64, "stages": 2, "curvature": 32, "costly_sparsities": (0.8,)}
        config = replace(config, sparsities=(0.5, 0.8), **small)
    read, data = load(config)
    module = GPT(len(read.alphabet), config.layers, config.width, config.heads)
    network, near = networks.from_linen(module), min(config.costly_sparsities, key=lambda sparsity: abs(sparsity - 0.8))
    task = sweep.Task(network, data, sweep.cross_entropy, {"test_loss": NATS}, config.batch_size)
    folder = config.output or Path("results") / f"language-{data.name}"
    with results.opened(folder, config, data) as rows, report.progress() as bar:
        passes = bar.track(range(config.epochs), description="training")
        params = results.trained(folder, "dense", train_on, task, module, read.train, config, passes)
        table, compared = sweep.Table(rows, bar, {"data": data.name}), methods(task, params, config, folder)
        levels = {method: config.costly_sparsities if method in COSTLY else config.sparsities for method in compared}
        seeds = dict.fromkeys(compared, config.seeds) | {sweep.GRADUAL: 1}  # which sees all the text, not a sample
        left, seen = table.left(compared, levels, seeds), functools.partial(calibration, data, config)
        _, gradient = sweep.clocked(sweep.gradient_pass, network, params, *[seen(0).inputs] * 2)  # whatever the targets
        stacked, shown = jax.tree.map(lambda leaf: leaf[None], params), {sweep.DENSE: params}
        for found, pruned in sweep.timed(task, stacked, compared, left, seen, costly=COSTLY, gradient=gradient):
            table.add(found, pruned)
            method, sparsity, seed = (found[0][name] for name in ("method", "sparsity", "seed"))
            if method in SHOWN and (sparsity, seed) == (near, 0):  # its text is shown below
                results.trained(folder, f"{method}, {near:g}", lambda params: params, pruned)
        for method in (name for name in SHOWN if name in compared):
            name, call = f"{method}, {near:g}", compared[method]
            shown[name] = results.trained(folder, name, lambda call=call: call(seen(0), near).params)
    title = f"{data.name}, GPT of {config.layers} layers of width {config.width}, {config.seeds} samples of inputs"
    frame = rows.frame().assign(perplexity=lambda f: np.exp(f["test_loss"]), bits=lambda f: f["test_loss"] / np.log(2))
    beside = side_by_side(task.network, shown, read, config.positions)
    report.end(folder, frame, {"test_loss": NATS}, title, beside, **OTHERS, **sweep.PRICE)


def load(config: Config) -> tuple[text.Text, Dataset]:
    """The text and its sequences; a file that is none ends the program with its one-line message."""
    try:
        read = text.load(config.text, config.characters)
        name, held_out = (f"{read.name}-validation", read.validation) if config.validation else (read.name, read.test)
        arrays = (text.sequences(part, config.positions) for part in (read.train, held_out))
        return read, Dataset(name, *itertools.chain(*arrays))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


def calibration(data: Dataset, config: Config, seed: int) -> Seen:
    """A sample of the training sequences."""
    key, inputs = jax.random.key(seed), jnp.asarray(data.train_inputs)
    chosen = jax.random.choice(key, len(inputs), (min(config.calibration, len(inputs)),), replace=False)
    return Seen(inputs[chosen], key)


def train_on(
    task: sweep.Task, module: GPT, codes: np.ndarray, config: Config, passes: Iterable[int], seed: int = 0
) -> networks.Params:
    """Adam on sequences that each pass cuts at other places."""
    steps = config.epochs * train.steps_per_epoch(len(task.data.train_inputs), config.batch_size)
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, min(100, steps // 10), steps)
    optimizer = optax.adam(rate)
    first, shuffle = jax.random.key(2 * seed), jax.random.key(2 * seed + 1)
    params = module.init(first, task.data.train_inputs[:1])["params"]
    state, how = train.start(params, optimizer, shuffle), {"batch_size": config.batch_size}
    for number in passes:
        inputs, targets = map(jnp.asarray, text.sequences(codes, config.positions, 37 * number % config.positions))
        state, _ = train.epoch(task.network, state, inputs, targets, task.loss, optimizer=optimizer, **how)
        jax.block_until_ready(state)
    return state.params


def side_by_side(network: networks.Network, shown: dict[str, networks.Params], read: text.Text, length: int) -> Table:
    """What networks write after the same beginning, drawn with the same key."""
    prompt = jnp.asarray(read.validation[:length])

    @jax.jit
    def written(params: networks.Params) -> Array:
        def step(window, key):
            character = jax.random.categorical(key, network(params, window[None])[0, -1] / 0.8)
            return jnp.append(window[1:], character), character

        return lax.scan(step, prompt, jax.random.split(jax.random.key(0), 400))[1]

    table = Table(*shown, title="text that the networks write, at a temperature of 0.8", padding=(0, 2))
    table.add_row(*("".join(read.alphabet[code] for code in written(params)) for params in shown.values()))
    return table


if __name__ == "__main__":
    results.command(Config, main, __doc__)
