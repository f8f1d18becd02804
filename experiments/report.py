"""What experiments end in: tables and figures; and what else they show at the command line."""

import itertools
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import LogFormatterSciNotation, LogLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from ecjax._progress import can_draw
from ecjax.plots import _spread_out_high_sparsity
from experiments.methods import METHODS, label
from experiments.results import Folder
from experiments.sweep import DENSE, FINE_TUNED, PRUNED, SMALL, STAGED, TRAINED, Measure

# Okabe and Ito's palette, told apart by the colour-blind; the markers say the same again. Each method keeps its own.
COLOURS = ("#999999", "#E69F00", "#CC79A7", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#882255")
MARKERS = "xsvDo^P*"
_PALETTE = [(*how, line) for line in ("-", "--") for how in zip(COLOURS, MARKERS, strict=True)]
_STYLES = dict(zip((*METHODS, STAGED), _PALETTE, strict=False)) | {SMALL: ("black", "*", ":")}
_PHASES = {PRUNED: "after pruning", FINE_TUNED: "after pruning and fine-tuning"}


def progress() -> Progress:
    """A progress bar on stderr with an estimate of the time left."""
    shown = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "elapsed,", TimeRemainingColumn(), "left"
    return Progress("{task.description}", *shown, console=Console(stderr=True), disable=not can_draw())


def console() -> Console:
    """Where tables go: stdout, wide enough for them when it is a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else 150)


def table(frame: pd.DataFrame, measures: dict[str | float, Measure], title: str) -> Table:
    """Mean ± standard deviation over seeds, a line for each method and sparsity, the dense network first."""
    phases = [phase for phase in _PHASES if phase in set(frame["phase"])]
    shown = list(itertools.product(measures.items(), phases))
    columns = [Column(f"{measure.words},\n{phase}", justify="right") for (_, measure), phase in shown]
    result = Table(Column("sparsity", justify="right"), "method", *columns, title=title)
    # The dense networks stand in the first column of a measure, those that were small from the start in the last.
    places = frame["phase"].mask(frame["method"] == DENSE, phases[0]).mask(frame["method"] == SMALL, phases[-1])
    for sparsity, group in frame.assign(phase=places).groupby("sparsity"):
        for method, chosen in group.groupby("method", sort=False):
            cells = [_number(chosen.loc[chosen["phase"] == phase, name], how) for (name, how), phase in shown]
            result.add_row(f"{sparsity:g}", label(method), *cells)
        result.add_section()
    return result


def _number(values: pd.Series, measure: Measure) -> str:
    mean, deviation = (format(number * measure.factor, measure.number) for number in (values.mean(), values.std()))
    return f"{mean} ± {deviation}" if values.count() > 1 else mean if values.count() else ""


def sizes(kept: Folder) -> Table:
    """What the saved networks of the highest sparsity take."""
    frame = kept.rows.frame().query("sparsity == sparsity.max()")
    title = f"sparsity {frame['sparsity'].iloc[0]:g}; every network and report.csv are in {kept.path}/"
    numbers = ["parameters", "non-zeros", "bytes", "FLOPs", "µs, batch 1", "µs, 256"]
    frame.columns = ["method", "sparsity", "seed", "name", "runtime", *numbers]
    frame = frame.assign(form=frame["name"] + ", " + frame["runtime"])
    return plain(title, frame, {"method": "{}", "form": "{}"} | dict.fromkeys(numbers, "{:,.0f}"))


def plain(title: str, frame: pd.DataFrame, formats: dict[str, str]) -> Table:
    """A table of some columns, each with its format; what is not there stays empty."""
    frame = frame[list(formats)]
    numbers = frame.select_dtypes("number").columns
    result = Table(*(Column(name, justify="right" if name in numbers else "left") for name in frame), title=title)
    for row in frame.itertuples(index=False):
        cells = zip(formats.values(), row, strict=True)
        result.add_row(*("" if pd.isna(value) else text.format(value) for text, value in cells))
    return result


Panel = tuple[str, pd.DataFrame, str, Measure]


def panels(frame: pd.DataFrame, column: str, measure: Measure, title: str = "{phase}") -> list[Panel]:
    """What ``curves`` takes, for each phase after pruning that the frame holds."""
    return [
        (title.format(phase=words), frame[frame["phase"].isin([phase, TRAINED])], column, measure)
        for phase, words in _PHASES.items()
        if phase in set(frame["phase"])
    ]


def figure(grid: list[list[Panel]], title: str, path: Path) -> None:
    """Rows of panels of curves against sparsity, with one legend in the place of a missing panel, or below."""
    rows, columns = len(grid), max(map(len, grid))
    # At most 11 inches wide, so that the letters can be read where a page shows the figure 800 pixels wide.
    size = max(min(5.5, 11 / columns) * columns, 7), (3.7 if columns < 3 else 3) * rows + 1
    canvas, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    names = dict.fromkeys(name for _, frame, *_ in itertools.chain(*grid) for name in frame["method"] if name != DENSE)
    # The criteria look the same in every figure, all other methods in all panels of one.
    styles = _STYLES if _STYLES.keys() >= set(names) else dict(zip(names, itertools.cycle(_PALETTE), strict=False))
    for row, panels_of_row in zip(axes, grid, strict=True):
        for axis, panel in itertools.zip_longest(row, panels_of_row):
            curves(axis, panel, styles) if panel else axis.axis("off")
    # What the panel below or on the left says already.
    for above, below in zip(axes[:-1].ravel(), axes[1:].ravel(), strict=True):
        above.set_xlabel("" if below.axison else above.get_xlabel())
    for before, axis in (pair for row in axes for pair in itertools.pairwise(row[::-1])):
        before.set_ylabel("" if before.get_ylabel() == axis.get_ylabel() else before.get_ylabel())
    canvas.suptitle(title)
    save(canvas, path, ncols=3 if columns == 1 else 4)


def end(folder: Path, frame: pd.DataFrame, measures: dict[str, Measure], title: str, *tables: Table, **others: Measure):
    """A figure of each measure, in a file of its name; prints the table of these and the others, and further tables."""
    names = {column: f"{column.removeprefix('test_')}.png" for column in measures}
    for column, measure in measures.items():
        figure([panels(frame, column, measure)], title, folder / names[column])
    note = f"results.csv, config.json and {', '.join(names.values())} are in {folder}/"
    console().print(table(frame, measures | others, title), *tables, note)


def save(canvas: plt.Figure, path: Path, ncols: int = 4) -> None:
    """Writes a figure with one legend of all panels that have none of their own: in an empty panel, or below."""
    panels = [axis.get_legend_handles_labels() for axis in canvas.axes if not axis.get_legend()]
    named = {name: line for panel in panels for line, name in zip(*panel, strict=True)}
    empty = [axis for axis in canvas.axes if not axis.axison]
    how = {"loc": "center"} if empty else {"loc": "outside lower center", "ncols": ncols}
    (empty[0] if empty else canvas).legend(named.values(), named.keys(), frameon=False, **how)
    canvas.savefig(path, dpi=150)
    plt.close(canvas)


def curves(axis: plt.Axes, panel: Panel, styles: dict[str, tuple[str, str, str]]) -> None:
    """A measure against sparsity: the mean over seeds of each method, and a band of one standard deviation."""
    title, frame, column, measure = panel
    pruned, dense = frame[frame["method"] != DENSE], frame.loc[frame["method"] == DENSE, column].mean()
    axis.axhline(dense * measure.factor, color="black", linestyle="--", linewidth=1, label=DENSE)
    for method, chosen in pruned.groupby("method", sort=False):
        by_sparsity, (colour, marker, line) = chosen.groupby("sparsity")[column], styles[method]
        mean, spread = by_sparsity.mean() * measure.factor, by_sparsity.std().fillna(0) * measure.factor
        axis.plot(mean, color=colour, marker=marker, markersize=5, linestyle=line, label=label(method))
        low = (mean - spread).clip(lower=mean * 0.1) if measure.logarithmic else mean - spread
        axis.fill_between(mean.index, low, mean + spread, color=colour, alpha=0.2, linewidth=0)
    _spread_out_high_sparsity(axis, pruned["sparsity"].max())
    axis.set_xlim(left=1.1 * pruned["sparsity"].min() - 0.1)  # and not at 0
    if measure.logarithmic:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 1000 else (1, 2, 5)))
        axis.yaxis.set_major_formatter(LogFormatterSciNotation() if low < 1e-3 else "{x:g}")
        axis.yaxis.set_minor_formatter("")
    if measure.lowest is not None:
        axis.set_ylim(bottom=max(measure.lowest, axis.get_ylim()[0]))
    axis.set_title(title, fontsize="medium")
    axis.set(xlabel=measure.axis, ylabel=f"test {measure.words}")
    axis.grid(which="both", alpha=0.2)
