"""What scoring and pruning cost, in plain gradient passes over the same samples: ``python -m experiments.benchmark``.

MLPs of growing width, depth, number of samples and number of outputs are scored by elimination-compensation, by optimal
brain damage, and by the ways to write EC that this library exists to avoid; one of them is pruned in stages and by the
brain surgeons. A character transformer, a convnet and 24 scanned, rematerialised layers are scored with one probe.
Then, for a network of 1,000 outputs, how well a few probes rank the weights, and how long it takes to choose what goes.
It takes up to half an hour on two cores. It writes results.csv, config.json and benchmark.png, and prints the tables.
"""

import contextlib
import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jax.flatten_util import ravel_pytree
from rich.table import Table

from ecjax import devices, networks, prune, repair, score, surgeon
from ecjax.networks import Network, Params
from experiments import brain_surgeon, convnet, flags, language, report, results, scale, sweep

AXES = {"width": "width of the layers", "depth": "layers", "samples": "samples", "outputs": "outputs K"}
GRADIENT, EC = "gradient pass", score.elimination_compensation
JACOBIANS, DEFINITION = (f"{name} (part of the samples)" for name in ("per-sample Jacobians", "EC by definition"))
ARCHITECTURES = {
    "character transformer": language.GPT(characters=65, layers=3, width=128, heads=4),
    "convnet": convnet.ConvNet((32, 64, 64), 10, "layer"),
    "24 scanned layers": scale.Sizes(layers=24, width=128, heads=4, groups=4, hidden=512, words=65),
}
AGREEMENT = {"Spearman": math.nan, "same kept at 0.9": math.nan}  # of what is not compared with the exact ranking
COLUMNS = {"method": "{:35}", "median (ms)": "{:,.1f}", "first (s)": "{:.1f}"}
COLUMNS |= dict.fromkeys(("relative time", "relative\nmultiply-adds"), "{:,.2f}")
COLUMNS |= dict.fromkeys(("XLA (MB)", "process (MB)"), "{:,.0f}") | dict.fromkeys(AGREEMENT, "{:.4f}")
Given = tuple[Network | None, Params | None, jax.Array]  # a network, its params and inputs


@dataclass(frozen=True)
class Config:
    """Time scoring and pruning against a plain gradient pass over the same samples, and measure their memory."""

    base: tuple[int, ...] = (784, 300, 100, 10)  # Widths of the network that is pruned, inputs first.
    base_samples: int = 10_000  # Calibration samples wherever they don't grow.
    widths: tuple[int, ...] = (100, 300, 1000, 2048, 4096)  # Widths of four layers, the last with ten outputs.
    depths: tuple[int, ...] = (2, 4, 6, 8)  # Layers of a network of width 512.
    samples: tuple[int, ...] = (1_000, 10_000, 60_000)  # Calibration samples of the base network.
    outputs: tuple[int, ...] = (1, 10, 100, 1000)  # Outputs K of the base network.
    architectures: tuple[Literal[tuple(ARCHITECTURES)], ...] = tuple(ARCHITECTURES)  # Scored with one probe.
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
    """What is timed: a call, and on how many samples it runs at most."""

    name: str
    call: Callable[[Network, Params, jax.Array], Any]
    samples: int | None = None
    one_program: bool = True  # or there is no account of it from the compiler


def main(config: Config) -> None:
    """Runs the benchmark from networks to figure."""
    flags.require(config, repeating=("base",))
    if config.quick:
        small = {"widths": (100,), "depths": (), "samples": (5000,), "outputs": (), "probes": (1,)}
        small |= {"architecture_samples": 16, "architecture_batch": 8, "selected": (266_200,)}
        config = replace(config, base_samples=2000, stages=1, gradients=50, rounds=3, seconds=0.2, **small)
    planned = [(*case, method, methods[0]) for *case, methods in cases(config) for method in methods]
    with results.opened(config.output, config) as rows, report.progress() as bar:
        step = bar.add_task("", total=len(planned), completed=rows.count())
        for axis, value, name, samples, method, unit in planned:
            layers = name if isinstance(name, str) else f"MLP {'-'.join(map(str, name))}"
            keys = {"axis": axis, "value": value, "layers": layers, "samples": samples, "method": method.name}
            if not rows.count(**keys):
                bar.update(step, description=f"{axis} {value:,}: {method.name}")
                given = problem(name, samples)
                ranking = agreement(method.call, *given) if axis == "probes" and method is not unit else AGREEMENT
                rows.add(keys | measured(method, unit, given, config.rounds, config.seconds) | ranking)
                bar.advance(step)
    figure(rows.frame(), config.output / "benchmark.png")
    report.console().print(*tables(rows.frame()), f"results.csv, config.json and benchmark.png are in {config.output}/")


def cases(config: Config) -> Iterator[tuple[str, int, str | tuple[int, ...], int, list[Method]]]:
    """Where along which axis, the network, its samples, and what is timed on it, all in units of the first."""
    hidden, samples = config.base[:-1], config.base_samples
    mlps = [("samples", count, config.base, count) for count in config.samples]
    mlps += [("outputs", outputs, (*hidden, outputs), samples) for outputs in config.outputs]
    mlps += [("width", width, (width,) * 4 + (10,), samples) for width in config.widths]
    mlps += [("depth", depth, (512,) * depth + (10,), samples) for depth in config.depths]
    yield from ((*case, scoring(case[2], config.probes)) for case in mlps)
    # Kernels that see several rows of a sample: scores and gradients of as many samples at a time.
    ways = [Method(GRADIENT, gradient_pass, config.architecture_batch)]
    options = {"metric": "fisher", "probes": 1, "key": jax.random.key(3), "batch_size": config.architecture_batch}
    for name, criterion in {"EC": EC, "OBD": score.optimal_brain_damage}.items():
        ways.append(Method(f"{name} (Fisher), 1 probe", functools.partial(criterion, **options)))
    for number, name in enumerate(config.architectures):
        yield "network", number, name, config.architecture_samples, ways
    yield "pruning to 0.98", 0, config.base, samples, pruning(config)
    # The outputs of a fresh network have little in common, which is hard for probes.
    every = scoring((*hidden, 1000), config.probes)
    ways = [method for method in every if method.name in (GRADIENT, "EC") or "probe" in method.name]
    yield "probes", 0, (*hidden, 1000), min(samples, 2048), ways
    ways = [Method("by counting", by_counting), Method("by argsort", by_argsort)]
    yield from (("selection of 0.9", weights, "random weights", weights, ways) for weights in config.selected)


def scoring(widths: tuple[int, ...], numbers_of_probes: tuple[int, ...]) -> list[Method]:
    """What is timed on a network of these widths; the slow ways only where they are bearable."""
    weights = sum(map(math.prod, itertools.pairwise(widths)))
    found = [
        Method(GRADIENT, gradient_pass),
        Method("forward pass", jax.jit(lambda network, *given: network(*given), static_argnums=0)),
        Method("optimal brain damage", score.optimal_brain_damage),
        Method("EC", EC),
    ]
    if widths[-1] > 1:  # the softmax of one logit is 1 whatever it is
        found.append(Method("EC (Fisher)", functools.partial(EC, metric="fisher")))
    for number in numbers_of_probes if widths[-1] >= 1000 else (1,):
        call = functools.partial(EC, probes=number, key=jax.random.key(3))
        found.append(Method(f"EC, {number} probe{'s' * (number > 1)}", call))
    if (of_jacobian := widths[-1] * weights) < 3e8:
        found.append(Method(JACOBIANS, jacobian_scores, max(int(3e7 // of_jacobian), 1)))
    if weights < 4e4:
        found.append(Method(DEFINITION, score.elimination_compensation_by_definition, max(int(1e10 // weights**2), 1)))
    return found


def pruning(config: Config) -> list[Method]:
    """Pruning to 0.98, from scores to repaired params, what parts of it take, and a gradient pass to compare with."""

    def one_shot(network, params, inputs, criterion, **options):
        return prune.one_shot(params, criterion(network, params, inputs, **options), 0.98)

    def surgery(network, params, inputs, *, name):
        few = inputs[: config.gradients]
        labels = jnp.arange(len(few)) % config.base[-1]
        gradients = surgeon.loss_gradients(network, params, few, labels, sweep.cross_entropy)
        prune_by = brain_surgeon.methods(network, params, brain_surgeon.Config())[name]
        return prune_by(brain_surgeon.Seen(few, gradients, jax.random.key(0)), 0.98)

    calls = {"magnitude, one shot": functools.partial(one_shot, criterion=score.magnitude)}
    calls["EC, one shot"] = functools.partial(one_shot, criterion=EC, metric="fisher")
    hows = {"no repair": None, **repair.REPAIRS, "one step each": repair.Survivors(iterations=1)}
    for name, how in (hows | {"one product a step": repair.Survivors(products=1)}).items():
        call = functools.partial(prune.staged, sparsity=0.98, stages=config.stages, repair=how, metric="fisher")
        calls[f"EC, {config.stages} stages, {name}"] = call
    for name in ("WoodFisher", "CBS-S + CBS-U"):
        calls[f"{name}, {config.gradients} gradients"] = functools.partial(surgery, name=name)
    return [Method(GRADIENT, gradient_pass), *(Method(*item, one_program=False) for item in calls.items())]


def gradient_pass(network: Network, params: Params, inputs: jax.Array) -> Params:
    """What everything is measured in: the gradient of a mean loss with respect to all params."""
    shape = jax.eval_shape(network, params, inputs).shape
    labels = jnp.arange(math.prod(shape[:-1])).reshape(shape[:-1]) % shape[-1]  # each class in turn
    return sweep.gradient_pass(network, params, inputs, labels)


@functools.partial(jax.jit, static_argnums=0)
def jacobian_scores(network: Network, params: Params, inputs: jax.Array) -> score.Scores:
    """EC of an MLP the usual way: every output's gradient with respect to every weight, for every sample.

    ``Δb* = W Σ E[∂y/∂W ∂y/∂b] / Σ E[(∂y/∂b)²]`` and ``I = Σ E[(∂y/∂W W − ∂y/∂b Δb*)²]``.
    """
    jacobian = jax.vmap(lambda x: jax.jacrev(lambda params: network(params, x[None])[0])(params))(inputs)
    importance, shift = {}, {}
    for name, of_layer in jacobian.items():
        w, b = of_layer["kernel"], of_layer["bias"][:, :, None]  # samples × outputs × inputs × neurons
        square, cross, bias_square = ((one * other).sum((0, 1)) for one, other in ((w, w), (w, b), (b, b)))
        kernel, mean = params[name]["kernel"], cross / jnp.where(bias_square > 0, bias_square, 1)
        shift[name] = {"kernel": kernel * mean}
        importance[name] = {"kernel": kernel**2 * (square - cross * mean) / len(inputs)}
    return score.Scores(importance, shift)


def by_counting(_network: None, _params: None, values: jax.Array) -> jax.Array:
    """True for the nine tenths of the values that are least."""
    return prune.smallest(values, round(0.9 * len(values)))


@functools.partial(jax.jit, static_argnums=0)
def by_argsort(_network: None, _params: None, values: jax.Array) -> jax.Array:
    """The same by a sort."""
    return jnp.zeros(len(values), bool).at[jnp.argsort(values, stable=True)[: round(0.9 * len(values))]].set(True)


@functools.lru_cache(maxsize=1)
def problem(name: str | tuple[int, ...], samples: int) -> Given:
    """A fresh network and random inputs: costs do not depend on the values."""
    key, options = jax.random.key(0), {"train": False} if name == "convnet" else {}
    if name == "random weights":
        values = jax.random.normal(key, (samples,))
        if (by_counting(None, None, values) != by_argsort(None, None, values)).any():
            raise ArithmeticError(f"other weights by counting than by argsort, of {samples}")
        return None, None, values
    words = jax.random.randint(key, (samples, 64), 0, 65)
    if name == "24 scanned layers":
        params = scale.initial(ARCHITECTURES[name], lambda shape, *_: 0.1 * jax.random.normal(key, shape))
        return scale.network, params, words
    features = 784 if name == "convnet" else name[0]
    inputs = words if name == "character transformer" else jax.random.uniform(key, (samples, features))
    module = ARCHITECTURES[name] if name in ARCHITECTURES else networks.MLP(name[1:])
    params = module.init(jax.random.key(2), inputs[:1], **options)["params"]
    return networks.from_linen(module, **options), params, inputs


def measured(method: Method, unit: Method, given: Given, rounds: int, seconds: float) -> dict[str, float]:
    """What a method costs; what ran on a part of the samples is scaled up to all."""
    network, params, inputs = given
    parts = [inputs[: some.samples] for some in (method, unit)]
    factor, of_unit = (len(inputs) / len(part) for part in parts)
    reference = functools.partial(unit.call, network, params, parts[1])
    call = reference if method is unit else functools.partial(method.call, network, params, parts[0])
    taken, of_reference, process_bytes, first = by_turns(call, reference, rounds=rounds, seconds=seconds)
    account, taking = devices.Account(*[math.nan] * 6), functools.partial(method.call, network)
    account = devices.account(taking, params, parts[0]) if method.one_program else account
    return {
        "median (ms)": 1e3 * taken * factor,
        "relative time": taken * factor / (of_reference * of_unit),
        "multiply-adds": account.multiply_adds * factor,
        "XLA (MB)": (account.temporary + account.output) / 1e6,
        "process (MB)": process_bytes / 1e6,
        "first (s)": first,
    }


def by_turns(call: Callable, reference: Callable, *, rounds: int, seconds: float) -> tuple[float, ...]:
    """The median seconds of two calls, how many bytes the first adds to the process, and its seconds with compiling.

    They take turns, so that a slow moment of the machine hits both, after a first time for the compiler.
    """
    times, clocked = [], functools.partial(sweep.clocked, compiled=True)
    (_, first), _ = clocked(call), clocked(reference)
    before = _peak_bytes(reset=True)
    while not times or (len(times) < rounds and np.sum(times) < seconds):
        _, taken = clocked(call)
        memory = memory if times else _peak_bytes() - before
        times.append((taken, taken if reference is call else clocked(reference)[1]))
    return *np.median(times, axis=0).tolist(), memory, first


def _peak_bytes(*, reset: bool = False) -> float:
    """The peak of the resident memory, which a reset sets to what is in use now; NaN where Linux is not."""
    with contextlib.suppress(OSError, AttributeError):
        if reset:
            ctypes.CDLL(None).malloc_trim(0)  # or what an earlier call has freed would be there already
            Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return math.nan


def agreement(call: Callable, network: Network, params: Params, inputs: jax.Array) -> dict[str, float]:
    """With EC's exact ranking: Spearman's correlation, and the share of the weights kept that are the same."""
    every = EC(network, params, inputs), call(network, params, inputs)
    exact, found = (pd.Series(ravel_pytree(scores.importance)[0]) for scores in every)
    kept, also = (ravel_pytree(prune.one_shot(params, scores, 0.9).masks)[0] for scores in every)
    shares = exact.corr(found, method="spearman"), float((kept & also).sum() / kept.sum())
    return dict(zip(AGREEMENT, shares, strict=True))


def tables(frame: pd.DataFrame) -> Iterator[Table]:
    """A table for each network, and each number of weights of which some are chosen."""
    of_unit = frame.groupby(["axis", "value"])["multiply-adds"].transform("first")
    frame = frame.assign(**{"relative\nmultiply-adds": frame["multiply-adds"] / of_unit})
    for (axis, value), chosen in frame.groupby(["axis", "value"], sort=False):
        layers, samples = chosen.iloc[0][["layers", "samples"]]
        what = f"{axis} {value:,}" if axis in AXES else axis
        title = f"{what}: {layers}, {samples:,} samples, {jax.devices()[0].device_kind}"
        formats = {name: text for name, text in COLUMNS.items() if chosen[name].notna().any()}
        yield report.plain(title, chosen, formats)


def figure(frame: pd.DataFrame, path: Path) -> None:
    """Times in gradient passes along each axis, memory against samples, and what probes are worth."""
    along = frame[frame["axis"].isin(AXES) & ~frame["method"].str.endswith("probes")]
    along = along.assign(memory=along["XLA (MB)"].mask(along["method"].str.contains("part")))
    methods = along["method"].unique()
    styles = [marker + (":" if "part" in name else "-") for marker, name in zip(report.MARKERS, methods, strict=False)]
    shown = [(axis, "relative time", "time (gradient passes)") for axis in AXES]
    shown.append(("samples", "memory", "memory of one call by XLA (MB)"))
    canvas, axes = plt.subplots(3, 2, figsize=(10, 12), layout="constrained")
    for panel, (axis, column, label) in zip(axes.flat, shown, strict=False):
        curves = along[along["axis"] == axis].pivot(index="value", columns="method", values=column)
        if len(curves):
            options = {"style": styles, "color": report.COLOURS, "mfc": "none", "logx": axis != "depth", "logy": True}
            curves.reindex(columns=methods).plot(ax=panel, legend=False, **options)
            panel.set(xlabel=AXES[axis], ylabel=label)
    drawn = frame[(frame["axis"] == "probes") & frame["method"].str.contains("probe")]
    numbers = drawn["method"].str.extract(r"(\d+)", expand=False).astype(int)
    curves = drawn.assign(probes=numbers).pivot(index="probes", columns="layers", values=list(AGREEMENT))
    if len(curves):
        curves.columns = [f"{layers}: {measure}" for measure, layers in curves.columns]
        curves.plot(ax=axes[-1, -1], style=["o-", "o-", "s--", "s--"], color=report.COLOURS[5:7] * 2, logx=True)
        axes[-1, -1].set(xlabel="probes, K = 1,000", ylabel="agreement with the exact ranking")
        axes[-1, -1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    for panel in axes.flat:
        panel.set_visible(panel.has_data())
        panel.grid(which="both", alpha=0.2)
    report.save(canvas, path, ncols=3)


if __name__ == "__main__":
    results.command(Config, main, __doc__)
