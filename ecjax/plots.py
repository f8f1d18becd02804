"""Pictures of masks, importances and what was tried, with matplotlib: ``pip install 'ecjax[plots]'``.

Each function draws on the ``ax`` that it is given, or on matplotlib's current one, and returns it, as seaborn does: its
title, labels and limits are yours to change. The colours are told apart by the colour-blind.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from ecjax import _checks, _trees, prune
from ecjax._types import Kernels
from ecjax.prune import Afforded, Pruned
from ecjax.score import NeuronScores, Scores

try:
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("matplotlib is not installed: pip install 'ecjax[plots]'") from error

__all__ = ["curve", "importances", "mask", "sparsity_by_layer"]

# Okabe and Ito's palette; the markers say the same again.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vP*"
_KEPT, _REMOVED = "#0072B2", "#E69F00"
_TICKS = (1, 0.9, 0.99, 0.5, 0, 0.999, 0.8, 0.95, 0.98, 0.995, 0.998)  # the first ones where there is little room
_BINS = 60


def sparsity_by_layer(masks: Kernels, *, ax: Axes | None = None) -> Axes:
    """The sparsity of each kernel as a bar, and that of all of them as a line.

    Args:
        masks: Kernels of booleans, True where the weight stays.
        ax: where to draw; matplotlib's current Axes if None.

    Raises:
        ValueError: masks that are not boolean, or none.

    Example:
        >>> from ecjax import plots
        >>> from matplotlib import pyplot as plt
        >>> _, ax = plt.subplots()
        >>> ax = plots.sparsity_by_layer(pruned.masks, ax=ax)
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['Dense_0/kernel', 'Dense_1/kernel']
    """
    _checks.require_boolean(masks)
    by_path = {path or "(params)": np.asarray(leaf) for path, leaf in _trees.by_path(masks).items()}
    if not by_path:
        raise ValueError("there is no mask to draw: give the masks of a network, such as pruned.masks")
    ax = plt.gca() if ax is None else ax
    sparsities = [1 - leaf.mean() if leaf.size else 0.0 for leaf in by_path.values()]
    bars = ax.barh(range(len(by_path)), sparsities, color=_KEPT)
    left = [f" {np.count_nonzero(leaf):,} of {leaf.size:,} left" for leaf in by_path.values()]
    font = min(10.0, 250 / len(by_path))
    for bar, text, sparsity in zip(bars, left, sparsities, strict=True):
        inside = sparsity > 0.5
        how: dict[str, Any] = {
            "ha": "right" if inside else "left",
            "va": "center",
            "color": "white" if inside else "black",
        }
        ax.text(sparsity, bar.get_y() + bar.get_height() / 2, f"{text} " if inside else text, fontsize=font, **how)
    total = prune.sparsity(masks)
    ax.axvline(total, color="black", linestyle="--", linewidth=1)
    ax.set_title(f"{total:.4g} of all weights removed", fontsize="medium")
    ax.set_yticks(range(len(by_path)), list(by_path), fontsize=font)
    ax.set(xlabel="sparsity", xlim=(0, 1), ylim=(len(by_path) - 0.4, -0.6))
    return ax


def importances(scores: Scores | NeuronScores, *, sparsity: float | int | None = None, ax: Axes | None = None) -> Axes:
    """A histogram of all importances on a logarithmic axis, and the threshold below which they are removed.

    Args:
        scores: of a criterion.
        sparsity: the fraction that would go if all competed with each other (the scope "network"); nothing is marked
            without it.
        ax: where to draw; matplotlib's current Axes if None.

    Raises:
        ValueError: what is no score; importances with NaN, or below 0; no importance that is positive and finite; a
            sparsity outside [0, 1].

    Example:
        >>> from ecjax import plots
        >>> from matplotlib import pyplot as plt
        >>> _, ax = plt.subplots()
        >>> ax = plots.importances(scores, sparsity=0.5, ax=ax)
        >>> ax.get_xlabel(), ax.get_xscale()
        ('importance', 'log')
    """
    scores = _checks.of_kind(scores, (Scores, NeuronScores), "scores are")
    _checks.require_no_nan(scores.importance, "importances")
    values = np.sort(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(scores.importance)]).astype(np.float64))
    on_axis = values[(values > 0) & (values < np.inf)]
    if values[0] < 0 or not on_axis.size:
        raise ValueError(
            f"importances from {values[0]:g} to {values[-1]:g} have no place on a logarithmic axis, which "
            "takes what is above 0 and finite; draw these with ax.hist"
        )
    if sparsity is not None:
        _checks.require_sparsity(sparsity)
    ax = plt.gca() if ax is None else ax
    removed = 0 if sparsity is None else round(sparsity * values.size)
    parts, colours = [values[:removed], values[removed:]], [_REMOVED, _KEPT]
    edges = np.geomspace(on_axis[0], on_axis[-1] * (1 if on_axis[0] < on_axis[-1] else 2), _BINS + 1)
    edges[[0, -1]] = edges[0] * (1 - 1e-9), edges[-1] * (1 + 1e-9)
    named = ["removed", "kept"] if sparsity is not None else ["_removed", "_kept"]  # not in the legend
    ax.set_xscale("log")
    ax.hist([part[np.isfinite(part) & (part > 0)] for part in parts], edges, stacked=True, color=colours, label=named)
    if sparsity is not None and 0 < removed < values.size:
        threshold = f"sparsity {sparsity:g}: up to {values[removed - 1]:.2g}"
        ax.axvline(max(values[removed - 1], edges[0]), color="black", linestyle="--", linewidth=1, label=threshold)
    for count, what in ((values.size - np.count_nonzero(values), "exactly 0"), (np.isinf(values).sum(), "infinite")):
        if count:
            ax.plot([], [], " ", label=f"not shown: {count:,} {what}")
    ax.set(xlabel="importance", ylabel="weights" if isinstance(scores, Scores) else "neurons")
    _legend(ax)
    return ax


def mask(
    mask: Bool[np.ndarray | jax.Array, "..."], *, shape: Sequence[int] | None = None, ax: Axes | None = None
) -> Axes:
    """The mask of a kernel as an image: which weights stay, or how many neurons still read each input.

    Args:
        mask: of one kernel; its last axis is that of neurons or channels, all others are those of inputs (transpose it
            if not).
        shape: of the inputs as an image, such as (28, 28): then each pixel is the number of neurons that read it.
            Further axes, such as channels, are added up.
        ax: where to draw; matplotlib's current Axes if None.

    Raises:
        ValueError: what is no mask of one kernel, or a shape that has not as many pixels as there are inputs.

    Example:
        >>> from ecjax import plots
        >>> from matplotlib import pyplot as plt
        >>> _, ax = plt.subplots()
        >>> ax = plots.mask(pruned.masks["Dense_0"]["kernel"], shape=(2, 2), ax=ax)
        >>> bool(ax.get_images()[0].get_array().sum() == pruned.masks["Dense_0"]["kernel"].sum())
        True
    """
    if not hasattr(mask, "dtype") or mask.dtype.kind != "b" or not mask.ndim or not mask.size:
        raise ValueError(
            f"this draws the mask of one kernel, an array of booleans such as pruned.masks['Dense_0']['kernel']; got a "
            f"{type(mask).__name__}{f' of {mask.dtype}, {mask.shape}' if hasattr(mask, 'dtype') else ''}"
        )
    matrix = np.asarray(mask).reshape(-1, mask.shape[-1])
    if shape is not None and (len(shape) < 2 or np.prod(shape) != len(matrix)):
        raise ValueError(f"shape is {tuple(shape)}; the {len(matrix)} inputs of the kernel need as many pixels")
    ax = plt.gca() if ax is None else ax
    if shape is None:
        colours = ListedColormap(["#EEEEEE", _KEPT])
        # Colours are mixed where several weights share a pixel of the screen: none of those left is lost.
        interpolation = "auto" if max(matrix.shape) > 256 else "nearest"
        how: dict[str, Any] = {"aspect": "auto", "interpolation": interpolation, "interpolation_stage": "rgba"}
        ax.imshow(matrix, cmap=colours, vmin=0, vmax=1, **how)
        inputs = f" ({' × '.join(map(str, mask.shape[:-1]))})" if mask.ndim > 2 else ""
        ax.set(xlabel="output" if mask.ndim > 2 else "neuron", ylabel=f"input{inputs}")
        ax.set_title(f"{matrix.sum():,} of {matrix.size:,} weights left", fontsize="medium")
        return ax
    reads = matrix.sum(1).reshape(shape)
    image = ax.imshow(reads.sum(tuple(range(2, reads.ndim))), cmap="cividis", vmin=0, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    of_pixel = "neurons that read it" if mask.ndim == 2 else "weights that read it"
    ax.figure.colorbar(image, ax=ax, label=of_pixel, ticks=MaxNLocator(integer=True))
    return ax


def curve(results: Mapping[str, Afforded | Iterable[tuple[Pruned, Any]]], *, ax: Axes | None = None) -> Axes:
    """What networks are worth against their sparsity, a line for each name.

    The axis of sparsities gives equal room to equal factors of weights kept: from 0.9 to 0.95 as much as from 0 to 0.5.

    Args:
        results: by name, what ``prune.afford`` gave: its least value is a dotted line, what it found a ring. Or pairs
            of a ``prune.Pruned`` and its value.
        ax: where to draw; matplotlib's current Axes if None.

    Raises:
        ValueError: something else, or nothing.

    Example:
        >>> from ecjax import plots
        >>> from matplotlib import pyplot as plt
        >>> _, ax = plt.subplots()
        >>> several = [prune.one_shot(params, scores, sparsity) for sparsity in (0.2, 0.5, 0.8)]
        >>> accuracy = lambda params: (network(params, inputs).argmax(-1) == labels).mean()
        >>> ax = plots.curve({"in one shot": [(found, accuracy(found.params)) for found in several]}, ax=ax)
        >>> [line.get_label() for line in ax.get_lines()]
        ['in one shot']
    """
    lines = {name: _points(name, result) for name, result in _named(results).items()}
    ax = plt.gca() if ax is None else ax
    styles = itertools.cycle(zip(_COLOURS, _MARKERS, strict=True))
    for (name, points), (colour, marker) in zip(lines.items(), styles, strict=False):
        ax.plot(*points.T, color=colour, marker=marker, markersize=4, label=name)
        result = results[name]
        if isinstance(result, Afforded):
            ring = {"marker": "o", "markersize": 12, "markerfacecolor": "none", "linestyle": "none"}
            ax.axhline(result.least, color=colour, linestyle=":", linewidth=1)
            ax.plot(*result.found[:2], color=colour, **ring, label=f"{name}: sparsity {result.found.sparsity:.3g}")
    _spread_out_high_sparsity(ax, max(points[:, 0].max() for points in lines.values()))
    ax.set(xlabel="sparsity", ylabel="value")
    ax.grid(alpha=0.2)
    _legend(ax)
    return ax


def _named(results: Mapping) -> Mapping:
    if not isinstance(results, Mapping) or not results:
        raise ValueError("results must be a dict with at least one line: {'survivors': prune.afford(...)}")
    return results


def _points(name: str, result: Afforded | Iterable[tuple[Pruned, Any]]) -> np.ndarray:
    """Sparsities and values of a line, in the order of the sparsities."""
    if isinstance(result, Afforded):
        return np.asarray([tried[:2] for tried in result.curve])
    pairs = list(result) if isinstance(result, Iterable) else []
    if not pairs or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(
            f"'{name}' must be what prune.afford gives, or pairs of a prune.Pruned and its value: "
            "[(pruned, accuracy(pruned.params)), ...]"
        )
    for pruned, _ in pairs:
        if not isinstance(pruned, Pruned):
            raise ValueError(f"'{name}' holds a pair that starts with a {type(pruned).__name__}, not a prune.Pruned")
    return np.asarray(sorted((prune.sparsity(pruned.masks), float(value)) for pruned, value in pairs))


def _spread_out_high_sparsity(ax: Axes, highest: float) -> None:
    """Sets the scale, and as many ticks as have room."""
    place = lambda sparsity: -np.log1p(-np.clip(sparsity, 0, 0.9999))  # noqa: E731
    ax.set_xscale("function", functions=(place, lambda x: -np.expm1(-x)))
    ticks: list[float] = []
    for tick in _TICKS:
        if tick <= highest and all(abs(place(tick) - place(other)) > 0.1 * place(highest) for other in ticks):
            ticks.append(tick)
    ticks.sort()
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xticks([], minor=True)


def _legend(ax: Axes) -> None:
    if ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False, fontsize="small", markerscale=0.7)
