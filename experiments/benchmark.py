"""What scoring and pruning cost, in plain gradient passes over the same samples: ``python -m experiments.benchmark``.

MLPs of growing width, depth, number of samples and number of outputs are scored by elimination-compensation, by optimal
brain damage, and by the ways to write EC that this library exists to avoid; one of them is pruned in stages and by the
brain surgeons. A character transformer, a convnet and 24 scanned, rematerialised layers are scored with one probe.
Then, for networks of 1,000 outputs, how well a few probes rank the weights, and how long it takes to choose what goes.
It takes up to half an hour on two cores. It writes results.csv, probes.csv, selection.csv, config.json and
benchmark.png, and prints the tables.
"""

import contextlib
import ctypes
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pandas as pd
from jax.flatten_util import ravel_pytree
from rich.table import Table

from ecjax import networks, prune, repair, score, surgeon, train
from ecjax.networks import Network, Params
from experiments import flags, layered, report, results, sweep
from experiments.datasets import diffusion_sorption

GRADIENT, JACOBIANS, DEFINITION = "gradient pass", "per-sample Jacobians", "EC by definition"
AXES = {"width": "width of the layers", "depth": "layers", "samples": "samples", "outputs": "outputs K"}


@dataclass(frozen=True)
class Config:
    """Time scoring and pruning against a plain gradient pass over the same samples, and measure their memory."""

    base: tuple[int, ...] = (784, 300, 100, 10)  # Widths of the network that is pruned, inputs first.
    base_samples: int = 10_000  # Calibration samples wherever they don't grow.
    widths: tuple[int, ...] = (100, 300, 1000, 2048, 4096)  # Widths of four layers, the last with ten outputs.
    depths: tuple[int, ...] = (2, 4, 6, 8)  # Layers of a network of width 512.
    samples: tuple[int, ...] = (1_000, 10_000, 60_000)  # Calibration samples of the base network.
    outputs: tuple[int, ...] = (1, 10, 100, 1000)  # Outputs K of the base network.
    architectures: tuple[layered.Name, ...] = tuple(layered.NETWORKS)  # No MLPs; they are scored with one probe.
    architecture_samples: int = 512  # Calibration samples of the networks that are no MLPs.
    architecture_batch: int = 64  # Samples at a time there, in scores and gradient passes alike.
    probes: tuple[int, ...] = (1, 4, 16, 64)  # Probes to compare with the exact ranking, for 1,000 outputs.
    selected: tuple[int, ...] = (266_200, 5_000_000, 50_000_000)  # Weights of which the 0.9 smallest are chosen.
    stages: int = 10  # Stages of staged pruning.
    gradients: int = 500  # Per-sample gradients that the brain surgeons see.
    rounds: int = 9  # How many times each call runs at most, by turns with a gradient pass.
    seconds: float = 5.0  # A call that has run for so long, the gradient passes included, is not run again.
    quick: bool = False  # Three networks, few samples, one stage: three minutes.
    output: Path = Path("results/benchmark")  # Folder for the results.


class Method(NamedTuple):
    """What is timed: a call, its multiply-adds for a sample if known, and on how many samples it runs at most."""

    name: str
    call: Callable[[Network, Params, jax.Array], Any]
    multiply_adds: float = math.nan
    samples: float = math.inf
    programs: int = 1  # how many are compiled for it; the compiler's account of memory is of one


def main(config: Config) -> None:
    """Runs the benchmark from networks to figure."""
    flags.require(config, repeating=("base",))
    if config.quick:
        small = {"widths": (100,), "depths": (), "samples": (5000,), "outputs": (), "probes": (1,)}
        small |= {"architecture_samples": 16, "architecture_batch": 8, "selected": (266_200,)}
        config = replace(config, base_samples=2000, stages=1, gradients=50, rounds=3, seconds=0.2, **small)
    planned = [(case, methods) for case in cases(config) for methods in [methods_of(case, config)]]
    planned = [(case, method, gradient_of(methods)) for case, methods in planned for method in methods]
    with results.opened(config.output, config) as rows, report.progress() as bar:
        step = bar.add_task("", total=len(planned), completed=rows.count())
        for (axis, value, network, samples), method, gradient in planned:
            layers = network if axis == "network" else "-".join(map(str, network))
            keys = {"axis": axis, "value": value, "layers": layers, "samples": samples}
            if not rows.count(**keys, method=method.name):
                bar.update(step, description=f"{axis} {value:,}: {method.name}")
                given = layered.problem(network, samples) if axis == "network" else problem(network, samples)
                found = measured(method, gradient, given, config.rounds, config.seconds)
                rows.add(keys | {"method": method.name} | found)
                bar.advance(step)
        ranked = results.Rows(config.output / "probes.csv")
        # The outputs of a fresh network have little in common, those of a surrogate much.
        wide = {
            "fresh, random inputs": lambda: problem((*config.base[:-1], 1000), min(config.base_samples, 2048)),
            "surrogate, trained": lambda: surrogate(*((4, 20) if config.quick else (16, 200))),
        }
        for name, made in wide.items():
            missing = [number for number in config.probes if not ranked.count(network=name, probes=number)]
            bar.update(step, description=f"probes: {name}")
            for row in agreements(*made(), missing) if missing else ():
                ranked.add({"network": name} | row)
        chosen = results.Rows(config.output / "selection.csv")
        for weights in config.selected:
            if not chosen.count(weights=weights):
                bar.update(step, description=f"selection of {weights:,}")
                chosen.add({"weights": weights} | selection(weights, config.rounds, config.seconds))
    figure(rows.frame(), ranked.frame(), config.output / "benchmark.png")
    where = f"results.csv, probes.csv, selection.csv, config.json and benchmark.png are in {config.output}/"
    report.console().print(*tables(rows.frame(), ranked.frame()), selection_table(chosen.frame()), where)


def cases(config: Config) -> Iterator[tuple[str, int, tuple[int, ...] | str, int]]:
    """Where along which axis, widths and samples: every network to be scored, and the one that is pruned."""
    hidden, samples = config.base[:-1], config.base_samples
    yield from (("samples", count, config.base, count) for count in config.samples)
    yield from (("outputs", outputs, (*hidden, outputs), samples) for outputs in config.outputs)
    yield from (("width", width, (width,) * 4 + (10,), samples) for width in config.widths)
    yield from (("depth", depth, (512,) * depth + (10,), samples) for depth in config.depths)
    yield from (
        ("network", number, name, config.architecture_samples) for number, name in enumerate(config.architectures)
    )
    yield "pruning", 0, config.base, samples


def methods_of(case: tuple[str, int, tuple[int, ...] | str, int], config: Config) -> list[Method]:
    """What is timed on a network."""
    axis, _, network, _ = case
    if axis == "network":
        return probed(config.architecture_batch)
    return pruning(config) if axis == "pruning" else scoring(network, config.probes)


def gradient_of(methods: list[Method]) -> Method:
    """The gradient pass among them, in which the others are measured."""
    return next(method for method in methods if method.name == GRADIENT)


def scoring(widths: tuple[int, ...], numbers_of_probes: tuple[int, ...]) -> list[Method]:
    """What is timed on a network of these widths; the slow ways only where they are bearable."""
    # The multiply-adds of a sample's outputs, and of a pass back to the first layer's neurons.
    forward, back = (sum(map(math.prod, itertools.pairwise(some))) for some in (widths, widths[1:]))
    of_jacobian, back_from_all = widths[-1] * forward, widths[-1] * back
    ec, exact = score.elimination_compensation, 3 * forward + back_from_all
    found = [
        Method("forward pass", jax.jit(lambda network, *given: network(*given), static_argnums=0), forward),
        Method(GRADIENT, gradient_pass, 2 * forward + back),
        Method("optimal brain damage", score.optimal_brain_damage, exact),
        Method("EC", ec, exact),
    ]
    if widths[-1] > 1:  # the softmax of one logit is 1 whatever it is
        found.append(Method("EC (Fisher)", functools.partial(ec, metric="fisher"), exact))
    for number in numbers_of_probes if widths[-1] >= 1000 else (1,):
        call = functools.partial(ec, probes=number, key=jax.random.key(3))
        found.append(Method(f"EC, {number} probe{'s' * (number > 1)}", call, 3 * forward + number * back))
    if of_jacobian < 3e8:
        call = functools.partial(jacobian_scores, at_once=max(int(3e7 // of_jacobian), 1))
        few = max(int(2e8 // of_jacobian), 2)
        found.append(Method(JACOBIANS, call, forward + of_jacobian + back_from_all, few))
    if forward < 4e4:
        few = max(int(1e10 // forward**2), 1)
        found.append(Method(DEFINITION, score.elimination_compensation_by_definition, forward**2, few))
    return found


def pruning(config: Config) -> list[Method]:
    """Pruning to a tenth of the weights, from scores to repaired params, and a gradient pass to compare with."""

    def one_shot(network, params, inputs):
        scores = score.elimination_compensation(network, params, inputs, metric="fisher")
        return prune.one_shot(params, scores, 0.9)

    def brain_surgeon(network, params, inputs, *, combinatorial):
        few = inputs[: config.gradients]
        labels = jnp.arange(len(few)) % config.base[-1]
        rows = surgeon.loss_gradients(network, params, few, labels, sweep.cross_entropy)
        if combinatorial:
            masks = surgeon.combinatorial_selection(params, rows, 0.9, start="magnitude", key=jax.random.key(0))
            return surgeon.combinatorial_update(params, masks, rows)
        masks = prune.one_shot(params, surgeon.brain_surgeon_saliency_from_gradients(params, rows), 0.9).masks
        return surgeon.brain_surgeon_update(params, masks, rows)

    found = [gradient_of(scoring(config.base, ())), Method("EC, one shot", one_shot, programs=2)]
    for how in (None, *repair.REPAIRS):
        call = functools.partial(prune.staged, sparsity=0.9, stages=config.stages, repair=how, metric="fisher")
        found.append(Method(f"EC, {config.stages} stages{f', {how}' if how else ''}", call, programs=2))
    for name, combinatorial in {"WoodFisher": False, "CBS-S + CBS-U": True}.items():
        call = functools.partial(brain_surgeon, combinatorial=combinatorial)
        found.append(Method(f"{name}, {config.gradients} gradients", call, programs=2))
    return found


def probed(batch: int) -> list[Method]:
    """What is timed on networks whose kernels see several rows of a sample: as many samples at a time in each."""
    found, options = [Method(GRADIENT, gradient_pass, samples=batch)], {"metric": "fisher", "batch_size": batch}
    for name, criterion in {"EC": score.elimination_compensation, "OBD": score.optimal_brain_damage}.items():
        call = functools.partial(criterion, **options, probes=1, key=jax.random.key(3))
        found.append(Method(f"{name} (Fisher), 1 probe", call))
    return found


def gradient_pass(network: Network, params: Params, inputs: jax.Array) -> Params:
    """What everything is measured in: the gradient of a mean loss with respect to all params."""
    shape = jax.eval_shape(network, params, inputs).shape
    labels = jnp.arange(math.prod(shape[:-1])).reshape(shape[:-1]) % shape[-1]  # each class in turn
    return sweep.gradient_pass(network, params, inputs, labels)


@functools.partial(jax.jit, static_argnums=0, static_argnames="at_once")
def jacobian_scores(network: Network, params: Params, inputs: jax.Array, *, at_once: int) -> score.Scores:
    """EC of an MLP the usual way: every output's gradient with respect to every weight, for every sample.

    ``Δb* = W Σ E[∂y/∂W ∂y/∂b] / Σ E[(∂y/∂b)²]`` and ``I = Σ E[(∂y/∂W W − ∂y/∂b Δb*)²]``, so many samples at once.
    """

    def of_sample(x):
        jacobian = jax.jacrev(lambda params: network(params, x[None])[0])(params)
        pairs = {name: (layer["kernel"], layer["bias"][:, None]) for name, layer in jacobian.items()}
        return {name: ((w**2).sum(0), (w * b).sum(0), (b**2).sum(0)) for name, (w, b) in pairs.items()}

    def add(total, batch):
        return jax.tree.map(lambda t, s: t + s.sum(0), total, jax.vmap(of_sample)(batch)), None

    rest = len(inputs) % at_once
    total = jax.tree.map(lambda s: s.sum(0), jax.vmap(of_sample)(inputs[:rest]))  # of none: zeros
    total, _ = jax.lax.scan(add, total, inputs[rest:].reshape(-1, at_once, *inputs.shape[1:]))
    importance, shift = {}, {}
    for name, (square, cross, bias_square) in total.items():
        kernel, mean = params[name]["kernel"], cross / jnp.where(bias_square > 0, bias_square, 1)
        shift[name] = {"kernel": kernel * mean}
        importance[name] = {"kernel": kernel**2 * (square - cross * mean) / len(inputs)}
    return score.Scores(importance, shift)


@functools.lru_cache(maxsize=1)
def problem(widths: tuple[int, ...], samples: int) -> tuple[Network, Params, jax.Array]:
    """A fresh network with random inputs: costs do not depend on the values."""
    inputs = jax.random.uniform(jax.random.key(0), (samples, widths[0]))
    mlp = networks.MLP(widths[1:])
    return networks.from_linen(mlp), mlp.init(jax.random.key(2), inputs[:1])["params"], inputs


def measured(
    method: Method, gradient: Method, given: tuple[Network, Params, jax.Array], rounds: int, seconds: float
) -> dict[str, float]:
    """What a method costs; what ran on a part of the samples is scaled up to all."""
    network, params, inputs = given
    parts = [inputs[: min(some.samples, len(inputs))] for some in (method, gradient)]
    scale, of_reference = (len(inputs) / len(part) for part in parts)
    reference = functools.partial(gradient.call, network, params, parts[1])
    call = reference if method is gradient else functools.partial(method.call, network, params, parts[0])
    taken, of_gradient, process_bytes = by_turns(call, reference, rounds=rounds, seconds=seconds)
    memory = None
    if method.programs == 1:
        compiled = jax.jit(functools.partial(method.call, network)).lower(params, parts[0]).compile()
        memory = compiled.memory_analysis()  # None where XLA gives no account
    return {
        "seconds": taken * scale,
        "gradient_passes": taken * scale / (of_gradient * of_reference),
        "multiply_adds": method.multiply_adds * len(inputs),
        "compiler_bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes if memory else math.nan,
        "process_bytes": process_bytes,
    }


def by_turns(call: Callable, reference: Callable, *, rounds: int, seconds: float) -> tuple[float, float, float]:
    """The median seconds of two calls, and by how many bytes the first raises the resident memory of the process.

    They take turns, so that a slow moment of the machine hits both, after a first time for the compiler.
    """
    times = []
    _seconds(call), _seconds(reference)
    while not times or (len(times) < rounds and np.sum(times) < seconds):
        before = math.nan if times else _peak_bytes(reset=True)
        taken = _seconds(call)
        memory = memory if times else _peak_bytes() - before
        times.append((taken, taken if reference is call else _seconds(reference)))
    return *np.median(times, axis=0).tolist(), memory


def _seconds(call: Callable) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _peak_bytes(*, reset: bool = False) -> float:
    """The peak of the resident memory, which a reset sets to what is in use now; NaN where Linux is not."""
    with contextlib.suppress(OSError, AttributeError):
        if reset:
            ctypes.CDLL(None).malloc_trim(0)  # or what an earlier call has freed would be there already
            Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return math.nan


def agreements(network: Network, params: Params, inputs: jax.Array, numbers: Sequence[int]) -> Iterator[sweep.Row]:
    """How the ranking by so many probes agrees with the exact one, a row for each number: the mean of three keys."""
    exact = score.elimination_compensation(network, params, inputs)
    for probes in numbers:
        draw = functools.partial(score.elimination_compensation, network, params, inputs, probes=probes)
        found = [agreement(params, exact, draw(key=jax.random.key(seed))) for seed in range(3)]
        yield {"probes": probes} | dict(zip(("spearman", "overlap"), np.mean(found, axis=0).tolist(), strict=True))


def agreement(params: Params, exact: score.Scores, found: score.Scores) -> tuple[float, float]:
    """Spearman's rank correlation of two importances, and the share of the weights kept at 0.9 that both keep."""
    importance, other = (pd.Series(ravel_pytree(scores.importance)[0]) for scores in (exact, found))
    kept, also = (ravel_pytree(prune.one_shot(params, scores, 0.9).masks)[0] for scores in (exact, found))
    return importance.corr(other, method="spearman"), float((kept & also).sum() / kept.sum())


def surrogate(concentrations: int, epochs: int) -> tuple[Network, Params, jax.Array]:
    """A network that has learnt, from a place and the concentration at first, that at 1,000 times."""
    first = np.linspace(0, 0.2, concentrations)
    places, _, solutions = zip(*(diffusion_sorption.grid(64, 1000, u) for u in first), strict=True)
    x, start = np.meshgrid(places[0], first / 0.2)
    inputs = np.stack([x, start], -1).reshape(-1, 2).astype(np.float32)
    targets = np.concatenate([solution.T for solution in solutions]).astype(np.float32)
    mlp = networks.MLP((64, 64, 1000), jnp.tanh)
    network, params = networks.from_linen(mlp), mlp.init(jax.random.key(0), inputs[:1])["params"]
    fit = {"loss": optax.squared_error, "optimizer": optax.adam(1e-3), "key": jax.random.key(1), "batch_size": 64}
    return network, train.fit(network, params, inputs, targets, epochs=epochs, **fit).params, jnp.asarray(inputs)


def selection(weights: int, rounds: int, seconds: float) -> dict[str, float]:
    """The seconds that it takes to find the smallest nine tenths of random numbers, by counting and by a sort."""
    values, count = jax.random.normal(jax.random.key(0), (weights,)), round(0.9 * weights)

    @jax.jit
    def by_argsort(values):
        return jnp.zeros(weights, bool).at[jnp.argsort(values, stable=True)].set(jnp.arange(weights) < count)

    call, reference = functools.partial(prune.smallest, values, count), functools.partial(by_argsort, values)
    if (call() != reference()).any():
        raise ArithmeticError(f"other weights by counting than by argsort, of {weights}")
    counted, sorted_, _ = by_turns(call, reference, rounds=rounds, seconds=seconds)
    return {"counting": counted, "argsort": sorted_}


def selection_table(frame: pd.DataFrame) -> Table:
    """What it takes to choose the weights that go."""
    shown = {
        "weights": frame["weights"],
        "by counting (ms)": 1e3 * frame["counting"],
        "by argsort (ms)": 1e3 * frame["argsort"],
        "ratio": frame["argsort"] / frame["counting"],
    }
    formats = dict(zip(shown, ("{:,}", "{:,.1f}", "{:,.1f}", "{:,.0f}"), strict=True))
    return report.plain("the nine tenths of the weights that are least", pd.DataFrame(shown), formats)


def tables(frame: pd.DataFrame, ranking: pd.DataFrame) -> Iterator[Table]:
    """A table for each network, and one of every number of probes."""
    for (axis, value), chosen in frame.groupby(["axis", "value"], sort=False):
        layers, samples = chosen.iloc[0][["layers", "samples"]]
        what = {"pruning": "pruning to 0.9: MLP", "network": "scores:"}.get(axis, f"{axis} {value:,}: MLP")
        of_gradient = chosen.loc[chosen["method"] == GRADIENT, "multiply_adds"].item()
        shown = {
            "one call": chosen["method"],
            "median (ms)": 1e3 * chosen["seconds"],
            "gradient passes": chosen["gradient_passes"],
            "multiply-adds\nin gradient passes": chosen["multiply_adds"] / of_gradient,
            "XLA (MB)": chosen["compiler_bytes"] / 1e6,
            "process (MB)": chosen["process_bytes"] / 1e6,
        }
        formats = ("{:32}", "{:,.1f}", "{:,.2f}", "{:,.2f}", "{:,.0f}", "{:,.0f}")
        title = f"{what} {layers}, {samples:,} samples, {jax.devices()[0].device_kind}"
        yield report.plain(title, pd.DataFrame(shown), dict(zip(shown, formats, strict=True)))
    if len(ranking):
        formats = {"network": "{}", "probes": "{}", "spearman": "{:.4f}", "overlap": "{:.3f}"}
        title = "probes against the exact ranking, networks of 1,000 outputs, mean of three keys"
        yield report.plain(title, ranking, formats)


def figure(frame: pd.DataFrame, ranking: pd.DataFrame, path: Path) -> None:
    """Times in gradient passes along each axis, memory against samples, and what probes are worth."""
    partly = frame["method"].isin([JACOBIANS, DEFINITION])
    frame = frame.assign(megabytes=frame["compiler_bytes"].mask(partly) / 1e6)
    frame["method"] += np.where(partly, " (part of the samples)", "")
    methods = frame.loc[frame["axis"].isin(AXES) & ~frame["method"].str.endswith("probes"), "method"].unique()
    lines = [":" if "part" in name else "-" for name in methods]
    styles = [marker + line for marker, line in zip(2 * report.MARKERS, lines, strict=False)]
    canvas, axes = plt.subplots(3, 2, figsize=(10, 12), layout="constrained")
    shown = [(axis, "gradient_passes", "time (gradient passes)") for axis in AXES]
    shown.append(("samples", "megabytes", "memory of one call by XLA (MB)"))
    for panel, (axis, column, label) in zip(axes.flat, shown, strict=False):
        curves = frame[frame["axis"] == axis].pivot(index="value", columns="method", values=column)
        if len(curves):
            options = {"style": styles, "color": report.COLOURS, "mfc": "none", "logx": axis != "depth", "logy": True}
            curves.reindex(columns=methods).plot(ax=panel, legend=False, **options)
            panel.set(xlabel=AXES[axis], ylabel=label)
    if len(ranking):
        words = {"spearman": "Spearman", "overlap": "same weights kept at 0.9"}
        curves = ranking.rename(columns=words).pivot(index="probes", columns="network")
        curves.columns = [f"{network}: {measure}" for measure, network in curves.columns]
        curves.plot(ax=axes[-1, -1], style=["o-", "o-", "s--", "s--"], color=report.COLOURS[5:7] * 2, logx=True)
        axes[-1, -1].set(xlabel="probes, K = 1,000", ylabel="agreement with the exact ranking")
        axes[-1, -1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    for panel in axes.flat:
        panel.set_visible(panel.has_data())
        panel.grid(which="both", alpha=0.2)
    report.save(canvas, path, ncols=3)


if __name__ == "__main__":
    results.command(Config, main, __doc__)
