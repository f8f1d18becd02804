"""What scoring and pruning cost, in plain gradient passes over the same samples: ``python -m experiments.benchmark``.

MLPs of growing width, depth, number of samples and number of outputs are scored by elimination-compensation, by optimal
brain damage, and by the ways to write EC that this library exists to avoid; one of them is pruned in stages and by the
brain surgeons. Then, for networks of 1,000 outputs, how well a few probes rank the weights.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pandas as pd
from jax import Array, lax

from ecjax import networks, prune, score, surgeon
from ecjax.networks import Network, Params
from experiments import benchmark_report, cost, probes, report, runs
from experiments.benchmark_report import DEFINITION, GRADIENT, JACOBIANS
from experiments.cost import Candidate, Cost

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@dataclass(frozen=True)
class Config:
    """Time scoring and pruning against a plain gradient pass over the same samples, and measure their memory.

    Writes results.csv, probes.csv, config.json and benchmark.png, and prints the tables.
    """

    base: tuple[int, ...] = (784, 300, 100, 10)
    """Widths of the network, inputs first, whose samples and outputs grow, and that is pruned."""
    base_samples: int = 10_000
    """Calibration samples wherever they don't grow."""
    widths: tuple[int, ...] = (100, 300, 1000, 2048, 4096)
    """Widths of all but the last layer of a network of four layers and ten outputs."""
    depths: tuple[int, ...] = (2, 4, 6, 8)
    """Layers of a network of width 512."""
    samples: tuple[int, ...] = (1_000, 10_000, 60_000)
    """Calibration samples."""
    outputs: tuple[int, ...] = (1, 10, 100, 1000)
    """Outputs K."""
    probes: tuple[int, ...] = (1, 4, 16, 64)
    """Probes whose ranking is compared with the exact one, for networks of 1,000 outputs."""
    stages: int = 10
    """Stages of staged pruning."""
    gradients: int = 500
    """Per-sample gradients that the brain surgeons see."""
    rounds: int = 9
    """How many times each candidate runs at most."""
    seconds: float = 5.0
    """A candidate that has run for so long in all is not run again."""
    quick: bool = False
    """Three networks, few samples, one stage: under a minute."""
    output: Path = Path("results/benchmark")
    """Folder for the results."""


class Case(NamedTuple):
    """A network and its samples: where along which axis, all widths with the inputs first, and how many samples."""

    axis: str
    value: int
    widths: tuple[int, ...]
    samples: int


def main(config: Config) -> None:
    """Runs the benchmark from networks to figure."""
    counts = ("base_samples", "stages", "gradients", "rounds")
    lists = ("widths", "depths", "samples", "outputs", "probes")
    report.require_flags(config, fractions=(), counts=counts, distinct=lists)
    if config.quick:
        small = {"widths": (100,), "depths": (), "samples": (5000,), "outputs": (), "probes": (1,)}
        config = replace(config, base_samples=2000, stages=1, gradients=50, rounds=3, seconds=0.2, **small)
    plan = [[_keys(case, name) for name in _methods(case, config)] for case in cases(config)]
    with runs.opened(config.output, config, plan, dict.fromkeys(Cost._fields, float)) as rows, report.progress() as bar:
        step = bar.add_task("", total=rows.planned(), completed=rows.count())

        def describe(words: str) -> None:
            bar.update(step, description=words)

        for case in cases(config):
            if not rows.has(axis=case.axis, value=case.value):
                rows.add(_measured(case, config, describe))
            bar.update(step, completed=rows.count())
        frame, ranking = rows.frame(), pd.DataFrame(columns=probes.COLUMNS)
        if config.probes:
            ranking = probes.ranking(config.output / "probes.csv", config.probes, _of_many_outputs(config), describe)
    benchmark_report.figure(frame, ranking, config.output / "benchmark.png")
    console = report.console()
    for table in (*benchmark_report.tables(frame), probes.table(ranking)):
        console.print(table)
    console.print(f"results.csv, probes.csv, config.json and benchmark.png are in {config.output}/")


def cases(config: Config) -> list[Case]:
    """Every network and number of samples to be scored, each once, and the one that is pruned."""
    hidden, samples = config.base[:-1], config.base_samples
    return [
        *(Case("samples", count, config.base, count) for count in config.samples),
        *(Case("outputs", outputs, (*hidden, outputs), samples) for outputs in config.outputs),
        *(Case("width", width, (width,) * 4 + (10,), samples) for width in config.widths),
        *(Case("depth", depth, (512,) * depth + (10,), samples) for depth in config.depths),
        Case("pruning", 0, config.base, samples),
    ]


def _methods(case: Case, config: Config) -> list[str]:
    """The names of what is measured in a case."""
    if case.axis == "pruning":
        return [GRADIENT, *_pruning_methods(config)]
    slow = {JACOBIANS: _has_jacobians(case), DEFINITION: _has_definition(case)}
    fast = ["forward pass", GRADIENT, "optimal brain damage", "EC", "EC (Fisher)", *_probed(case, config)]
    return fast + [name for name, bearable in slow.items() if bearable]


def _measured(case: Case, config: Config, describe: Callable[[str], None]) -> list[dict]:
    """The rows of one case."""
    candidates = (pruning if case.axis == "pruning" else scoring)(case, config)
    keys = {name: _keys(case, name) for name in candidates}
    of = f"{case.axis} {case.value:,}" if case.value else case.axis
    options = {"rounds": config.rounds, "seconds": config.seconds}
    found = cost.measure(candidates, advance=lambda name: describe(f"{of}: {name}"), **options)
    return [keys[name] | costs._asdict() for name, costs in found.items()]


def _keys(case: Case, method: str) -> dict:
    layers = "-".join(map(str, case.widths))
    return {"axis": case.axis, "value": case.value, "layers": layers, "samples": case.samples, "method": method}


class Problem(NamedTuple):
    """A fresh network with random inputs and labels: costs do not depend on the values."""

    network: Network
    params: Params
    inputs: Array
    labels: Array


@functools.cache
def _network(features: tuple[int, ...]) -> tuple[networks.MLP, Network]:
    mlp = networks.MLP(features)
    return mlp, networks.pure(mlp)


def problem(widths: tuple[int, ...], samples: int) -> Problem:
    """What is scored, pruned and differentiated, by all widths with the inputs first."""
    mlp, network = _network(widths[1:])
    inputs = jax.random.uniform(jax.random.key(0), (samples, widths[0]))
    labels = jax.random.randint(jax.random.key(1), (samples,), 0, widths[-1])
    return Problem(network, mlp.init(jax.random.key(2), inputs[:1])["params"], inputs, labels)


def gradient_pass(widths: tuple[int, ...], given: Problem) -> Candidate:
    """What everything is measured in: the gradient of a mean loss with respect to all params."""

    def loss(params, inputs, labels):
        return cross_entropy(given.network(params, inputs), labels).mean()

    return Candidate(jax.jit(jax.grad(loss)), given[1:], cost.gradient_pass(widths, len(given.inputs)))


def scoring(case: Case, config: Config) -> dict[str, Candidate]:
    """What is timed in a case, by name."""
    made = problem(case.widths, case.samples)
    network, params, inputs, _ = made
    given = params, inputs
    criterion = functools.partial(score.elimination_compensation, network)
    outputs = case.widths[-1]
    exact = cost.moments(case.widths, case.samples, outputs)
    found = {
        "forward pass": Candidate(jax.jit(network), given, cost.forward_pass(case.widths, case.samples)),
        GRADIENT: gradient_pass(case.widths, made),
        "optimal brain damage": Candidate(functools.partial(score.optimal_brain_damage, network), given, exact),
        "EC": Candidate(criterion, given, exact),
        "EC (Fisher)": Candidate(functools.partial(criterion, metric="fisher"), given, exact),
    }
    for name, number in _probed(case, config).items():
        call = functools.partial(criterion, probes=number, key=jax.random.key(3))
        found[name] = Candidate(call, given, cost.moments(case.widths, case.samples, number))
    if _has_jacobians(case):
        found[JACOBIANS] = _jacobians(case, network, params, inputs)
    if _has_definition(case):
        found[DEFINITION] = _definition(case, network, params, inputs)
    return found


def _probed(case: Case, config: Config) -> dict[str, int]:
    """How many probes are timed, by name: one, and where K is large all numbers."""
    numbers = config.probes if case.widths[-1] >= 1000 else (1,)
    return {f"EC, {number} probe{'s' * (number > 1)}": number for number in numbers}


def _has_jacobians(case: Case) -> bool:
    """Whether the Jacobian of one sample, outputs × weights, is bearable: a gigabyte."""
    return case.widths[-1] * cost.weights(case.widths) < 3e8


def _jacobians(case: Case, network: Network, params: Params, inputs: Array) -> Candidate:
    """EC as it is usually written, on as few samples as bearable."""
    numbers = case.widths[-1] * cost.weights(case.widths)
    few = min(case.samples, max(int(2e8 // numbers), 2))
    call = jax.jit(functools.partial(jacobian_scores, network, at_once=max(int(3e7 // numbers), 1)))
    return Candidate(call, (params, inputs[:few]), cost.jacobians(case.widths, few), case.samples / few)


def _has_definition(case: Case) -> bool:
    """Whether a forward pass for every weight is bearable."""
    return cost.weights(case.widths) < 4e4


def _definition(case: Case, network: Network, params: Params, inputs: Array) -> Candidate:
    """EC by its definition, on as few samples as bearable."""
    few = min(case.samples, max(int(1e10 // cost.weights(case.widths) ** 2), 1))
    call = functools.partial(score.elimination_compensation_by_definition, network)
    return Candidate(call, (params, inputs[:few]), cost.definition(case.widths, few), case.samples / few)


def _of_many_outputs(config: Config) -> dict[str, Callable[[], probes.Given]]:
    """Two networks of 1,000 outputs: an untrained one, whose outputs have little in common, and a surrogate."""
    learnt = {"concentrations": 4, "epochs": 20} if config.quick else {"concentrations": 16, "epochs": 200}
    samples = min(config.base_samples, 2048)
    return {
        "fresh, random inputs": lambda: probes.Given(*problem((*config.base[:-1], 1000), samples)[:3]),
        "surrogate, trained": functools.partial(probes.surrogate, **learnt),
    }


def jacobian_scores(network: Network, params: Params, inputs: Array, *, at_once: int) -> score.Scores:
    """EC the usual way: every output's gradient with respect to every weight, for every sample.

    ``Δb* = W Σ E[∂y/∂W ∂y/∂b] / Σ E[(∂y/∂b)²]`` and ``I = Σ E[(∂y/∂W W − ∂y/∂b Δb*)²]``, so many samples at once.
    """

    def of_sample(x):
        jacobian = networks.by_path(jax.jacrev(lambda params: network(params, x[None])[0])(params))
        by_weight = {path: jacobian[path] for path in networks.by_path(networks.kernels(params))}
        by_bias = {path: jacobian[networks.bias_path(path)][:, None] for path in by_weight}
        return {
            path: ((g**2).sum(0), (g * by_bias[path]).sum(0), (by_bias[path] ** 2).sum(0))
            for path, g in by_weight.items()
        }

    def add(total, batch):
        return jax.tree.map(lambda t, s: t + s.sum(0), total, jax.vmap(of_sample)(batch)), None

    whole = len(inputs) // at_once * at_once
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), jax.eval_shape(of_sample, inputs[0]))
    total, _ = lax.scan(add, zeros, inputs[:whole].reshape(-1, at_once, *inputs.shape[1:]))
    if whole < len(inputs):
        total, _ = add(total, inputs[whole:])
    kernels = networks.by_path(networks.kernels(params))
    importance, shift = {}, {}
    for path, (square, cross, bias_square) in total.items():
        mean = cross / jnp.where(bias_square > 0, bias_square, 1)
        shift[path] = kernels[path] * mean
        importance[path] = kernels[path] ** 2 * (square - cross * mean) / len(inputs)
    of_kernels = networks.kernels(params)
    return score.Scores(networks.replace(of_kernels, importance), networks.replace(of_kernels, shift))


def pruning(case: Case, config: Config) -> dict[str, Candidate]:
    """Pruning to a tenth of the weights, from scores to repaired params, by name."""
    made = problem(case.widths, case.samples)
    network, params, inputs, labels = made

    def one_shot(params, inputs):
        scores = score.elimination_compensation(network, params, inputs, metric="fisher")
        return prune.one_shot(params, scores, 0.9)

    def staged(params, inputs, repair):
        return prune.staged(network, params, inputs, 0.9, stages=config.stages, repair=repair, metric="fisher")

    def gradients(params, inputs, labels):
        few = slice(config.gradients)
        return surgeon.loss_gradients(network, params, inputs[few], labels[few], cross_entropy)

    def woodfisher(params, inputs, labels):
        rows = gradients(params, inputs, labels)
        masks = prune.one_shot(params, surgeon.brain_surgeon_saliency(params, rows), 0.9).masks
        return surgeon.brain_surgeon_update(params, masks, rows)

    def combinatorial(params, inputs, labels):
        rows = gradients(params, inputs, labels)
        masks = surgeon.combinatorial_selection(params, rows, 0.9, start="magnitude", key=jax.random.key(0))
        return surgeon.combinatorial_update(params, masks, rows)

    without_labels = [one_shot, *(functools.partial(staged, repair=repair) for repair in prune.REPAIRS)]
    given = [(call, (params, inputs)) for call in without_labels]
    given += [(call, (params, inputs, labels)) for call in (woodfisher, combinatorial)]
    unknown = float("nan")  # they stop when they are done
    found = {
        name: Candidate(call, arguments, unknown, traceable=False)
        for name, (call, arguments) in zip(_pruning_methods(config), given, strict=True)
    }
    return {GRADIENT: gradient_pass(case.widths, made)} | found


def _pruning_methods(config: Config) -> list[str]:
    staged = [f"EC, {config.stages} stages{f', {repair}' if repair else ''}" for repair in prune.REPAIRS]
    surgeons = [f"{name}, {config.gradients} gradients" for name in ("WoodFisher", "CBS-S + CBS-U")]
    return ["EC, one shot", *staged, *surgeons]


if __name__ == "__main__":
    runs.command(Config, main, __doc__)
