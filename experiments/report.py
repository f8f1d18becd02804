"""What a sweep ends in: tables and figures; and what experiments share at the command line."""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from experiments.methods import METHODS
from experiments.sweep import DENSE, FINE_TUNED, PRUNED, SMALL, TRAINED

# Okabe and Ito's palette, told apart by the colour-blind; the markers say the same again. Each method keeps its own.
_PALETTE = (
    ("#999999", "x"),
    ("#E69F00", "s"),
    ("#CC79A7", "v"),
    ("#56B4E9", "D"),
    ("#009E73", "o"),
    ("#D55E00", "^"),
    ("#0072B2", "P"),
    ("#882255", "*"),
)
_STYLES = {SMALL: ("black", "*")} | dict(zip(METHODS, _PALETTE, strict=False))


class Measure(NamedTuple):
    """How a column is shown: words, number format, a factor, a logarithmic axis or not, its lower end and its label."""

    words: str
    number: str
    factor: float = 1.0
    logarithmic: bool = False
    lowest: float | None = None
    axis: str = "sparsity (fraction of weights removed)"


CLASSIFIER_MEASURES = {
    "test_loss": Measure("loss", ".4f", logarithmic=True),
    "test_accuracy": Measure("accuracy (%)", ".2f", factor=100.0),
}


def progress() -> Progress:
    """A progress bar on stderr with an estimate of the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left"))
    return Progress(*columns, *times, console=Console(stderr=True))


def require_flags(
    config: Any, *, fractions: Sequence[str], counts: Sequence[str], distinct: Sequence[str] = ()
) -> None:
    """Refuses flags that would fail only after minutes of training.

    Args:
        config: the flags.
        fractions: flags whose values must lie in [0, 1], none of them twice.
        counts: flags that must be at least 1, or None.
        distinct: other flags that must not name anything twice.
    """
    for name in (*fractions, *distinct):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise SystemExit(f"--{name.replace('_', '-')} must not repeat anything, got {list(values)}")
    for name in fractions:
        outside = [fraction for fraction in getattr(config, name) if not 0 <= fraction <= 1]
        if outside:
            raise SystemExit(f"--{name.replace('_', '-')} must lie in [0, 1], got {outside}")
    for name in counts:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def console() -> Console:
    """Where tables go: stdout, wide enough for them when it is a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else 150)


def label(method: str) -> str:
    """A method's name in tables and figures."""
    return METHODS[method].label if method in METHODS else method


def table(frame: pd.DataFrame, measures: dict[str, Measure], title: str) -> Table:
    """Mean ± standard deviation over seeds, a line for each method and sparsity, the dense network first."""
    phases = [phase for phase in (PRUNED, FINE_TUNED) if phase in set(frame["phase"])]
    result = Table(title=title)
    result.add_column("sparsity", justify="right")
    result.add_column("method")
    for measure in measures.values():
        for phase in phases:
            result.add_column(f"{measure.words},\n{phase}", justify="right")

    def cells(chosen: pd.DataFrame, in_phases: list[str]) -> list[str]:
        return [
            _mean_and_deviation(chosen.loc[chosen["phase"] == phase, column], measure)
            for column, measure in measures.items()
            for phase in in_phases
        ]

    first, last_column = [TRAINED] + [""] * (len(phases) - 1), [""] * (len(phases) - 1) + [TRAINED]
    dense = frame[frame["method"] == DENSE]
    result.add_row("0", DENSE, *cells(dense, first), end_section=True)
    for sparsity, group in frame[frame["method"] != DENSE].groupby("sparsity"):
        methods = list(dict.fromkeys(group["method"]))
        for method in methods:
            chosen = group[group["method"] == method]
            columns = last_column if method == SMALL else phases
            last = method == methods[-1]
            result.add_row(f"{sparsity:g}", label(method), *cells(chosen, columns), end_section=last)
    return result


def _mean_and_deviation(values: pd.Series, measure: Measure) -> str:
    values = values.dropna() * measure.factor
    if values.empty:
        return ""
    mean = format(values.mean(), measure.number)
    return f"{mean} ± {format(values.std(), measure.number)}" if len(values) > 1 else mean


class Panel(NamedTuple):
    """One panel of a figure: its title, the phase of which rows it shows, and its measure if it has one of its own."""

    title: str
    frame: pd.DataFrame
    phase: str
    column: str = ""
    measure: Measure | None = None


def panels(frame: pd.DataFrame, title: str = "") -> list[Panel]:
    """A panel for each phase after pruning that the frame holds."""
    words = {PRUNED: "after pruning", FINE_TUNED: "after pruning and fine-tuning"}
    shown = [phase for phase in words if phase in set(frame["phase"])]
    return [Panel(f"{title}\n{words[phase]}" if title else words[phase], frame, phase) for phase in shown]


def figure(grid: list[list[Panel]], column: str, measure: Measure, title: str, path: Path) -> None:
    """A measure against sparsity in rows of panels: the mean over seeds, and a band of one standard deviation."""
    rows, columns = len(grid), len(grid[0])
    size = (max(min(5.5, 20 / columns) * columns, 7), 4 * rows + 1)
    canvas, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes.ravel(), itertools.chain(*grid), strict=True):
        _draw(axis, panel, panel.column or column, panel.measure or measure)
    canvas.suptitle(title)
    named = {
        label: line for axis in axes.ravel() for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    canvas.legend(named.values(), named.keys(), loc="outside lower center", ncols=min(4, columns + 2), frameon=False)
    canvas.savefig(path, dpi=150 if rows == 1 else 110)
    plt.close(canvas)


def _draw(axis, panel: Panel, column: str, measure: Measure) -> None:
    frame = panel.frame
    dense = frame.loc[frame["method"] == DENSE, column].mean() * measure.factor
    axis.axhline(dense, color="black", linestyle="--", linewidth=1, label=DENSE)
    shown = frame[(frame["phase"] == panel.phase) | (frame["method"] == SMALL)]
    methods = list(dict.fromkeys(shown["method"]))
    styles = _STYLES if set(methods) <= set(_STYLES) else dict(zip(methods, itertools.cycle(_PALETTE), strict=False))
    for method, chosen in shown.groupby("method", sort=False):
        by_sparsity = chosen.groupby("sparsity")[column]
        mean, spread = by_sparsity.mean() * measure.factor, by_sparsity.std().fillna(0) * measure.factor
        colour, marker = styles[method]
        line = ":" if method == SMALL else "-"
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.5, "linestyle": line}
        axis.plot(mean.index, mean, label=label(method), **style)
        low = (mean - spread).clip(lower=mean * 0.1) if measure.logarithmic else mean - spread
        axis.fill_between(mean.index, low, mean + spread, color=colour, alpha=0.2, linewidth=0)
    axis.set_title(panel.title)
    _spread_out_high_sparsity(axis, sorted(set(frame["sparsity"]) - {0.0}))
    if measure.logarithmic:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    if measure.lowest is not None:
        axis.set_ylim(bottom=max(measure.lowest, axis.get_ylim()[0]))
    axis.set_xlabel(measure.axis)
    axis.set_ylabel(f"test {measure.words}")
    axis.grid(which="both", alpha=0.2)


def _spread_out_high_sparsity(axis, sparsities: list[float]) -> None:
    """Gives equal room to equal factors of weights kept: from 0.9 to 0.95 as much as from 0 to 0.5."""
    if not sparsities or sparsities[-1] >= 1:
        return
    axis.set_xscale("function", functions=(lambda s: -np.log1p(-np.clip(s, 0, 0.9999)), lambda x: -np.expm1(-x)))
    ticks = [sparsities[-1]]
    for sparsity in reversed(sparsities):
        if (1 - sparsity) / (1 - ticks[-1]) > 1.24:  # room for the label
            ticks.append(sparsity)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
