"""What scoring and pruning cost, in plain gradient passes over the same samples: ``python -m experiments.benchmark``.

MLPs of growing width, depth, number of samples and number of outputs are scored by elimination-compensation, by optimal
brain damage, and by the ways to write EC that this library exists to avoid; one of them is pruned in stages and by the
brain surgeons. Then, for networks of 1,000 outputs, how well a few probes rank the weights. It takes a quarter of an
hour on two cores. It writes results.csv, probes.csv, config.json and benchmark.png, and prints the tables.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
import pandas as pd
from jax import Array, lax
from rich.table import Table

from ecjax import networks, prune, score, surgeon
from ecjax.networks import Network, Params
from experiments import cost, probes, report, results

GRADIENT, JACOBIANS, DEFINITION = "gradient pass", "per-sample Jacobians", "EC by definition"
AXES = {"width": "width of the layers", "depth": "layers", "samples": "samples", "outputs": "outputs K"}
# Okabe and Ito's palette, told apart by the colour-blind; the markers say the same again.
COLOURS = ("#999999", "#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
MARKERS = "vsoD^PX<>"
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@dataclass(frozen=True)
class Config:
    """Time scoring and pruning against a plain gradient pass over the same samples, and measure their memory."""

    base: tuple[int, ...] = (784, 300, 100, 10)
    """Widths of the network, inputs first, whose samples and outputs grow, and that is pruned."""
    base_samples: int = 10_000  # Calibration samples wherever they don't grow.
    widths: tuple[int, ...] = (100, 300, 1000, 2048, 4096)
    """Widths of all but the last layer of a network of four layers and ten outputs."""
    depths: tuple[int, ...] = (2, 4, 6, 8)  # Layers of a network of width 512.
    samples: tuple[int, ...] = (1_000, 10_000, 60_000)  # Calibration samples.
    outputs: tuple[int, ...] = (1, 10, 100, 1000)  # Outputs K.
    probes: tuple[int, ...] = (1, 4, 16, 64)
    """Probes whose ranking is compared with the exact one, for networks of 1,000 outputs."""
    stages: int = 10  # Stages of staged pruning.
    gradients: int = 500  # Per-sample gradients that the brain surgeons see.
    rounds: int = 9  # How many times each call runs at most, by turns with a gradient pass.
    seconds: float = 5.0  # A call that has run for so long, the gradient passes included, is not run again.
    quick: bool = False  # Three networks, few samples, one stage: under a minute.
    output: Path = Path("results/benchmark")  # Folder for the results.


class Case(NamedTuple):
    """A network and its samples: where along which axis, all widths with the inputs first, and how many samples."""

    axis: str
    value: int
    widths: tuple[int, ...]
    samples: int


class Method(NamedTuple):
    """What is timed: a call, its multiply-adds for a sample, and how many samples it can bear, if not all."""

    name: str
    call: Callable[[Network, Params, Array, Array], Any]
    multiply_adds: float
    samples: int | None = None


def main(config: Config) -> None:
    """Runs the benchmark from networks to figure."""
    counts = ("base_samples", "stages", "gradients", "rounds")
    lists = ("widths", "depths", "samples", "outputs", "probes")
    report.require_flags(config, fractions=(), counts=counts, distinct=lists)
    surrogate = {"concentrations": 16, "epochs": 200}
    if config.quick:
        small = {"widths": (100,), "depths": (), "samples": (5000,), "outputs": (), "probes": (1,)}
        config = replace(config, base_samples=2000, stages=1, gradients=50, rounds=3, seconds=0.2, **small)
        surrogate = {"concentrations": 4, "epochs": 20}
    planned = [
        (case, method)
        for case in cases(config)
        for method in (pruning(config) if case.axis == "pruning" else scoring(case.widths, config.probes))
    ]
    with results.opened(config.output, config) as rows, report.progress() as bar:
        step = bar.add_task("", total=len(planned), completed=len(rows))
        for case, method in planned:
            keys = {"axis": case.axis, "value": case.value, "layers": "-".join(map(str, case.widths))}
            keys |= {"samples": case.samples, "method": method.name}
            if not rows.has(**keys):
                bar.update(step, description=f"{case.axis} {case.value:,}: {method.name}")
                rows.add([keys | measured(case, method, config.rounds, config.seconds)])
                bar.advance(step)
        ranked = results.Rows(config.output / "probes.csv")
        # The outputs of a fresh network have little in common, those of a surrogate much.
        wide = {
            "fresh, random inputs": lambda: problem((*config.base[:-1], 1000), min(config.base_samples, 2048))[:3],
            "surrogate, trained": lambda: probes.surrogate(**surrogate),
        }
        for name, made in wide.items():
            missing = [number for number in config.probes if not ranked.has(network=name, probes=number)]
            bar.update(step, description=f"probes: {name}")
            for row in probes.agreements(*made(), missing) if missing else ():
                ranked.add([{"network": name} | row])
    figure(rows.frame(), ranked.frame(), config.output / "benchmark.png")
    console = report.console()
    for table in tables(rows.frame(), ranked.frame()):
        console.print(table)
    console.print(f"results.csv, probes.csv, config.json and benchmark.png are in {config.output}/")


def cases(config: Config) -> list[Case]:
    """Every network and number of samples to be scored, and the one that is pruned."""
    hidden, samples = config.base[:-1], config.base_samples
    return [
        *(Case("samples", count, config.base, count) for count in config.samples),
        *(Case("outputs", outputs, (*hidden, outputs), samples) for outputs in config.outputs),
        *(Case("width", width, (width,) * 4 + (10,), samples) for width in config.widths),
        *(Case("depth", depth, (512,) * depth + (10,), samples) for depth in config.depths),
        Case("pruning", 0, config.base, samples),
    ]


def scoring(widths: tuple[int, ...], numbers_of_probes: tuple[int, ...]) -> list[Method]:
    """What is timed on a network of these widths; the slow ways only where they are bearable."""
    # The multiply-adds of a sample's outputs, and of a pass back to the first layer's neurons.
    forward, back = (sum(map(math.prod, itertools.pairwise(some))) for some in (widths, widths[1:]))
    outputs, of_jacobian = widths[-1], widths[-1] * forward
    ec, exact = score.elimination_compensation, 3 * forward + outputs * back
    found = [
        Method("forward pass", _of(jax.jit(lambda network, *given: network(*given), static_argnums=0)), forward),
        Method(GRADIENT, gradient_pass, 2 * forward + back),
        Method("optimal brain damage", _of(score.optimal_brain_damage), exact),
        Method("EC", _of(ec), exact),
        Method("EC (Fisher)", _of(ec, metric="fisher"), exact),
    ]
    for number in numbers_of_probes if outputs >= 1000 else (1,):
        call = _of(ec, probes=number, key=jax.random.key(3))
        found.append(Method(f"EC, {number} probe{'s' * (number > 1)}", call, 3 * forward + number * back))
    if of_jacobian < 3e8:
        call, few = _of(jacobian_scores, at_once=max(int(3e7 // of_jacobian), 1)), max(int(2e8 // of_jacobian), 2)
        found.append(Method(JACOBIANS, call, forward + of_jacobian + outputs * back, few))
    if forward < 4e4:
        call, few = _of(score.elimination_compensation_by_definition), max(int(1e10 // forward**2), 1)
        found.append(Method(DEFINITION, call, forward**2, few))
    return found


def pruning(config: Config) -> list[Method]:
    """Pruning to a tenth of the weights, from scores to repaired params, and a gradient pass to compare with."""

    def one_shot(network, params, inputs, _):
        scores = score.elimination_compensation(network, params, inputs, metric="fisher")
        return prune.one_shot(params, scores, 0.9)

    def gradients(network, params, inputs, labels):
        few = slice(config.gradients)
        return surgeon.loss_gradients(network, params, inputs[few], labels[few], cross_entropy)

    def woodfisher(network, params, *samples):
        rows = gradients(network, params, *samples)
        masks = prune.one_shot(params, surgeon.brain_surgeon_saliency(params, rows), 0.9).masks
        return surgeon.brain_surgeon_update(params, masks, rows)

    def combinatorial(network, params, *samples):
        rows = gradients(network, params, *samples)
        masks = surgeon.combinatorial_selection(params, rows, 0.9, start="magnitude", key=jax.random.key(0))
        return surgeon.combinatorial_update(params, masks, rows)

    calls = {"EC, one shot": one_shot}
    for repair in prune.REPAIRS:
        staged = _of(prune.staged, sparsity=0.9, stages=config.stages, repair=repair, metric="fisher")
        calls[f"EC, {config.stages} stages{f', {repair}' if repair else ''}"] = staged
    calls[f"WoodFisher, {config.gradients} gradients"] = woodfisher
    calls[f"CBS-S + CBS-U, {config.gradients} gradients"] = combinatorial
    reference = [method for method in scoring(config.base, ()) if method.name == GRADIENT]
    return reference + [Method(name, call, math.nan) for name, call in calls.items()]  # they stop when they are done


def _of(call: Callable, **options: Any) -> Callable:
    """A call that needs no labels, as one that gets them."""
    return lambda network, params, inputs, _: call(network, params, inputs, **options)


@functools.partial(jax.jit, static_argnums=0)
def gradient_pass(network: Network, params: Params, inputs: Array, labels: Array) -> Params:
    """What everything is measured in: the gradient of a mean loss with respect to all params."""
    return jax.grad(lambda params: cross_entropy(network(params, inputs), labels).mean())(params)


@functools.partial(jax.jit, static_argnums=0, static_argnames="at_once")
def jacobian_scores(network: Network, params: Params, inputs: Array, *, at_once: int) -> score.Scores:
    """EC of an MLP the usual way: every output's gradient with respect to every weight, for every sample.

    ``Δb* = W Σ E[∂y/∂W ∂y/∂b] / Σ E[(∂y/∂b)²]`` and ``I = Σ E[(∂y/∂W W − ∂y/∂b Δb*)²]``, so many samples at once.
    """

    def of_sample(x):
        jacobian = jax.jacrev(lambda params: network(params, x[None])[0])(params)
        pairs = {name: (layer["kernel"], layer["bias"][:, None]) for name, layer in jacobian.items()}
        return {name: ((w**2).sum(0), (w * b).sum(0), (b**2).sum(0)) for name, (w, b) in pairs.items()}

    def add(total, batch):
        return jax.tree.map(lambda t, s: t + s.sum(0), total, jax.vmap(of_sample)(batch)), None

    whole = len(inputs) // at_once * at_once
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), jax.eval_shape(of_sample, inputs[0]))
    total, _ = lax.scan(add, zeros, inputs[:whole].reshape(-1, at_once, *inputs.shape[1:]))
    if whole < len(inputs):
        total, _ = add(total, inputs[whole:])
    importance, shift = {}, {}
    for name, (square, cross, bias_square) in total.items():
        kernel, mean = params[name]["kernel"], cross / jnp.where(bias_square > 0, bias_square, 1)
        shift[name] = {"kernel": kernel * mean}
        importance[name] = {"kernel": kernel**2 * (square - cross * mean) / len(inputs)}
    return score.Scores(importance, shift)


@functools.lru_cache(maxsize=1)
def problem(widths: tuple[int, ...], samples: int) -> tuple[Network, Params, Array, Array]:
    """A fresh network with random inputs and labels: costs do not depend on the values."""
    inputs = jax.random.uniform(jax.random.key(0), (samples, widths[0]))
    labels = jax.random.randint(jax.random.key(1), (samples,), 0, widths[-1])
    mlp = networks.MLP(widths[1:])
    return _pure(mlp), mlp.init(jax.random.key(2), inputs[:1])["params"], inputs, labels


_pure = functools.cache(networks.pure)  # once for each network, as what is compiled belongs to it


def measured(case: Case, method: Method, rounds: int, seconds: float) -> dict[str, float]:
    """What a method costs in a case; what ran on a part of the samples is scaled up to all."""
    network, *given = problem(case.widths, case.samples)
    part = min(method.samples or case.samples, case.samples)
    some = given[0], *(array[:part] for array in given[1:])
    gradient = functools.partial(gradient_pass, network, *given)
    call = gradient if method.name == GRADIENT else functools.partial(method.call, network, *some)
    taken, of_gradient, process_bytes = cost.by_turns(call, gradient, rounds=rounds, seconds=seconds)
    uncounted = math.isnan(method.multiply_adds)
    return {
        "seconds": taken * case.samples / part,
        "gradient_passes": taken * case.samples / part / of_gradient,
        "multiply_adds": method.multiply_adds * case.samples,
        "compiler_bytes": math.nan
        if uncounted
        else cost.compiler_bytes(functools.partial(method.call, network), *some),
        "process_bytes": process_bytes,
    }


def tables(frame: pd.DataFrame, ranking: pd.DataFrame) -> Iterator[Table]:
    """A table for each network, and one of every number of probes."""
    for (axis, value), chosen in frame.groupby(["axis", "value"], sort=False):
        layers, samples = chosen.iloc[0][["layers", "samples"]]
        what = "pruning to 0.9" if axis == "pruning" else f"{axis} {value:,}"
        of_gradient = chosen.loc[chosen["method"] == GRADIENT, "multiply_adds"].item()
        columns = {
            "one call": (chosen["method"].str.ljust(32), "{}"),
            "median (ms)": (1e3 * chosen["seconds"], "{:,.1f}"),
            "gradient passes": (chosen["gradient_passes"], "{:,.2f}"),
            "multiply-adds\nin gradient passes": (chosen["multiply_adds"] / of_gradient, "{:,.2f}"),
            "XLA (MB)": (chosen["compiler_bytes"] / 1e6, "{:,.0f}"),
            "process (MB)": (chosen["process_bytes"] / 1e6, "{:,.0f}"),
        }
        yield _table(f"{what}: MLP {layers}, {samples:,} samples, {jax.devices()[0].device_kind}", columns)
    if len(ranking):
        formats = {"network": "{}", "probes": "{:d}", "spearman": "{:.4f}", "overlap": "{:.3f}"}
        title = "probes against the exact ranking, networks of 1,000 outputs, mean of three keys"
        yield _table(title, {name: (ranking[name], text) for name, text in formats.items()})


def _table(title: str, columns: dict[str, tuple[pd.Series, str]]) -> Table:
    table = Table(title=title)
    for name, (_, text) in columns.items():
        table.add_column(name, justify="left" if text == "{}" else "right")
    for row in zip(*(column.map(text.format, "ignore").fillna("") for column, text in columns.values()), strict=True):
        table.add_row(*row)
    return table


def figure(frame: pd.DataFrame, ranking: pd.DataFrame, path: Path) -> None:
    """Times in gradient passes along each axis, memory against samples, and what probes are worth."""
    frame = frame[frame["axis"] != "pruning"].assign(megabytes=frame["compiler_bytes"] / 1e6)
    styles = dict(zip(frame["method"].unique(), zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS)), strict=False))
    shown = [(axis, "gradient_passes", "time (gradient passes)") for axis in AXES]
    shown.append(("samples", "megabytes", "memory of one call by XLA (MB)"))
    canvas, axes = plt.subplots(3, 2, figsize=(10, 12), layout="constrained")
    for panel, (axis, column, label) in zip(axes.flat, shown, strict=False):
        for method, chosen in frame[frame["axis"] == axis].groupby("method", sort=False):
            partly = method in (JACOBIANS, DEFINITION)
            if partly and column == "megabytes":
                continue
            colour, marker = styles[method]
            style = {"color": colour, "marker": marker, "mfc": "none", "linestyle": ":" if partly else "-"}
            name = f"{method} (part of the samples)" if partly else method
            panel.plot(chosen["value"], chosen[column], label=name, **style)
        panel.set(xlabel=AXES[axis], ylabel=label, yscale="log", xscale="linear" if axis == "depth" else "log")
    named = {name: line for panel in axes.flat for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    canvas.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False)
    if len(ranking):
        last = axes.flat[-1]
        for (name, chosen), colour in zip(ranking.groupby("network", sort=False), COLOURS[2:], strict=False):
            last.plot(chosen["probes"], chosen["spearman"], "o-", color=colour, label=f"{name}: Spearman")
            last.plot(
                chosen["probes"], chosen["overlap"], "s--", color=colour, label=f"{name}: same weights kept at 0.9"
            )
        last.set(xscale="log", xlabel="probes, K = 1,000", ylabel="agreement with the exact ranking")
        last.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    for panel in axes.flat:
        panel.set_visible(panel.has_data())
        panel.grid(which="both", alpha=0.2)
    canvas.savefig(path, dpi=150)
    plt.close(canvas)


if __name__ == "__main__":
    results.command(Config, main, __doc__)
