"""What the benchmark shows: a table for each network, and one figure."""

from collections.abc import Iterator
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from rich.table import Table

GRADIENT = "gradient pass"
JACOBIANS, DEFINITION = "per-sample Jacobians", "EC by definition"
AXES = {"width": "width of the layers", "depth": "layers", "samples": "samples", "outputs": "outputs K"}


def _ratios(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with times and multiply-adds also in gradient passes of the same case."""
    of_gradient = frame[frame["method"] == GRADIENT].set_index(["axis", "value"])
    index = pd.MultiIndex.from_frame(frame[["axis", "value"]])
    passes = {
        f"{column} in gradient passes": frame[column].to_numpy() / of_gradient[column].reindex(index).to_numpy()
        for column in ("seconds", "multiply_adds")
    }
    return frame.assign(**passes)


def tables(frame: pd.DataFrame) -> Iterator[Table]:
    """A table for each network, in gradient passes."""
    device = jax.devices()[0].device_kind
    for (axis, value), chosen in _ratios(frame).groupby(["axis", "value"], sort=False):
        layers, samples = chosen.iloc[0][["layers", "samples"]]
        what = "pruning to 0.9" if axis == "pruning" else f"{axis} {value:,}"
        table = Table(title=f"{what}: MLP {layers}, {samples:,} samples, {device}")
        table.add_column("one call", min_width=32)
        for column in (
            "median (ms)",
            "gradient passes",
            "multiply-adds\nin gradient passes",
            "XLA (MB)",
            "process (MB)",
        ):
            table.add_column(column, justify="right")
        for row in chosen.to_dict("records"):
            table.add_row(
                row["method"],
                f"{1000 * row['seconds']:,.1f}",
                f"{row['seconds in gradient passes']:,.2f}",
                _number(row["multiply_adds in gradient passes"], 1),
                *(_number(row[column], 1e6) for column in ("compiler_bytes", "process_bytes")),
            )
        yield table


def _number(value: float | None, unit: float) -> str:
    if value is None or np.isnan(value):
        return ""
    return f"{value / unit:,.2f}" if unit == 1 else f"{value / unit:,.0f}"


def figure(frame: pd.DataFrame, ranking: pd.DataFrame, path: Path) -> None:
    """Times in gradient passes along each axis, memory against samples, and what probes are worth."""
    ratios = _ratios(frame)
    shown = [axis for axis in AXES if (frame["axis"] == axis).any()]
    canvas, axes = plt.subplots(2, 3, figsize=(15, 9), layout="constrained")
    methods = list(dict.fromkeys(frame.loc[frame["axis"] != "pruning", "method"]))
    colours = dict(zip(methods, plt.get_cmap("tab20").colors, strict=False))
    for panel, axis in zip(axes.ravel(), shown, strict=False):
        _draw(panel, ratios[ratios["axis"] == axis], "seconds in gradient passes", colours)
        panel.set(xlabel=AXES[axis], ylabel="time in gradient passes", title=f"against the {AXES[axis]}")
        panel.set_xscale("linear" if axis == "depth" else "log")
    memory = frame[(frame["axis"] == "samples") & ~frame["method"].isin([JACOBIANS, DEFINITION])]
    _draw(axes[1, 1], memory.assign(megabytes=memory["compiler_bytes"] / 1e6), "megabytes", colours)
    axes[1, 1].set(xscale="log", xlabel="samples", ylabel="memory by XLA (MB)", title="memory of one call, data aside")
    for name, chosen in ranking.groupby("network", sort=False):
        axes[1, 2].plot(chosen["probes"], chosen["spearman"], "o-", label=f"{name}: Spearman")
        axes[1, 2].plot(chosen["probes"], chosen["overlap"], "s--", label=f"{name}: same weights kept at 0.9")
    axes[1, 2].set(xscale="log", xlabel="probes", ylabel="agreement", title="probes against exact, K = 1,000")
    if len(ranking):
        axes[1, 2].legend(fontsize="small")
    for panel in axes.ravel():
        panel.grid(which="both", alpha=0.2)
    timed = axes.ravel()[: len(shown)]
    named = {name: line for panel in timed for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    canvas.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, frameon=False)
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


def _draw(panel, frame: pd.DataFrame, column: str, colours: dict) -> None:
    for method, chosen in frame.groupby("method", sort=False):
        scaled = method in (JACOBIANS, DEFINITION)
        panel.plot(
            chosen["value"],
            chosen[column],
            "s:" if scaled else "o-",
            color=colours[method],
            label=f"{method} (part of the samples)" if scaled else method,
        )
    panel.set_yscale("log")
