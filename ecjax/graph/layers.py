"""The layers of a network, in order of execution, and what its other leaves do; shown as a table."""

import fnmatch
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxtyping import PyTree

from ecjax import _trees
from ecjax.graph import tables
from ecjax.graph.layout import Layout


class Layer(NamedTuple):
    """A kernel, and what there is to know about its place in the network.

    ``layout`` and ``bias_layout`` are ``of_kernel`` and ``of_bias`` of a layer that must have them, as those that are
    scored have; of another they raise a ValueError.

    Attributes:
        kernel: the path of the kernel.
        bias: the path of the leaf that is added to its product alone, one number for each neuron; None without one.
        shape: of the kernel.
        axes: what each axis of the kernel is: "in", "out", "stack", or several of these joined by "·"; empty where
            its entries don't enter one product one by one.
        positions: how many rows a sample has in the product.
        weights: how many entries the kernel has.
        reason: why it can't be scored; "" if it can.
        outer: whether each sample's gradient is one outer product: of its one row of inputs, and of one of neurons.
        once: whether its product is the only one, and each sample's rows can be told apart there.
        follows: the path of the kernel whose units, entry by entry and used for nothing else, are what this one reads.
        of_kernel: how the entries of the kernel are those of a matrix ``(in, out)``; None where they don't enter the
            product one by one.
        of_bias: how the entries of the bias are those of a row of neurons; None without one.
        window: how many of the inputs are the same channel, at the places of a convolution's window; 1 without one.

    Example:
        >>> layer = networks.layers(network, params, inputs)[1]
        >>> layer.kernel, layer.bias, layer.axes, layer.follows
        ('Dense_1/kernel', 'Dense_1/bias', ('in', 'out'), 'Dense_0/kernel')
    """

    kernel: str
    bias: str | None
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    positions: int
    weights: int
    reason: str
    outer: bool
    once: bool
    follows: str | None
    of_kernel: Layout | None
    of_bias: Layout | None
    window: int = 1

    @property
    def layout(self) -> Layout:
        """How the entries of the kernel are those of a matrix ``(in, out)``.

        Raises:
            ValueError: a kernel whose entries don't enter the product one by one.
        """
        if self.of_kernel is None:
            raise ValueError(f"kernel '{self.kernel}' is no matrix of inputs and neurons: it {self.reason}")
        return self.of_kernel

    @property
    def bias_layout(self) -> Layout:
        """How the entries of the bias are those of a row of neurons.

        Raises:
            ValueError: a kernel without a bias.
        """
        if self.of_bias is None:
            raise ValueError(f"kernel '{self.kernel}' has no bias")
        return self.of_bias


class Layers(tuple[Layer, ...]):
    """All layers of a network, in order of execution: a tuple that prints as a table.

    Attributes:
        others: the leaves that are not pruned, by path, and what each of them does.

    Example:
        >>> layers = networks.layers(network, params, inputs, exclude="Dense_1/*")
        >>> [layer.kernel for layer in layers], layers.others
        (['Dense_0/kernel'], {'Dense_1/bias': 'is excluded', 'Dense_1/kernel': 'is excluded'})
    """

    others: dict[str, str]

    def __new__(cls, layers: Iterable[Layer], others: dict[str, str] | None = None):
        """Layers, and the other leaves."""
        made = super().__new__(cls, layers)
        made.others = dict(others or {})
        return made

    def __repr__(self) -> str:
        """The table: the layers, and then the other leaves, one a line."""
        return tables.as_text(_cells(self))

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """The table in Jupyter."""
        return tables.as_html(_cells(self))


NO_LAYERS = Layers(())
_COLUMNS = ("kernel", "shape", "axes", "bias", "positions", "weights", "pruned")


def _cells(layers: Layers) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for layer in layers:
        shape = " × ".join(map(str, layer.shape))
        facts = (shape, ", ".join(layer.axes), layer.bias or "none", f"{layer.positions:,}", f"{layer.weights:,}")
        rows.append((layer.kernel or "(params)", *facts, f"no: {layer.reason}" if layer.reason else "yes"))
    rows += [(path, "", "", "", "", "", f"no: {what}") for path, what in layers.others.items()]
    return rows


def as_patterns(exclude: Iterable[str] | str) -> tuple[str, ...]:
    """Patterns as a tuple: of one, or of several.

    Raises:
        ValueError: something that is no pattern.
    """
    if isinstance(exclude, str):
        return (exclude,)
    if isinstance(exclude, Iterator):
        raise ValueError(f"{exclude!r} must be one or several patterns of paths; an iterator can be read only once")
    given = [*exclude] if isinstance(exclude, Iterable) and not isinstance(exclude, bytes) else [exclude]
    found = tuple(pattern for pattern in given if isinstance(pattern, str))
    if len(found) < len(given):
        raise ValueError(f"{exclude!r} must be one or several patterns of paths, such as 'head/*'")
    return found


def chosen(patterns: Iterable[str] | str, paths: Sequence[str]) -> frozenset[str]:
    """The paths that any of the patterns matches.

    Args:
        patterns: as in ``fnmatch``: "head/*", "*/bias", "Dense_0/kernel".
        paths: of the leaves.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    patterns = as_patterns(patterns)
    found = set()
    for pattern in patterns:
        here = fnmatch.filter(paths, pattern) if pattern not in paths else [pattern]
        if not here:
            hint = inside(pattern, paths)
            raise ValueError(
                f"the pattern {pattern!r} matches no leaf of the params{hint}; they are {', '.join(paths)}"
            )
        found.update(here)
    return frozenset(found)


def inside(pattern: str, paths: Iterable[str]) -> str:
    """What an error adds where a pattern names what holds leaves."""
    return f" (did you mean '{pattern}/*'?)" if any(path.startswith(f"{pattern}/") for path in paths) else ""


def kernels(layers: Sequence[Layer], params: PyTree) -> dict[str, Any]:
    """The kernels of some layers by path, in the order of the flattened params."""
    paths = {layer.kernel for layer in layers}
    return {path: leaf for path, leaf in _trees.by_path(params).items() if path in paths}


def chain(layers: Sequence[Layer]) -> Sequence[Layer]:
    """The layers, if each reads the neurons of the one before and nothing else does: a multilayer perceptron.

    Args:
        layers: of a network.

    Raises:
        ValueError: another network, with the first layer that breaks the chain by name.

    Example:
        >>> [layer.kernel for layer in graph.chain(networks.layers(network, params, inputs))]
        ['Dense_0/kernel', 'Dense_1/kernel']
    """
    if not layers:
        raise ValueError("the network has no kernel, so no neurons")
    for layer in layers:
        if not layer.outer:
            raise ValueError(
                f"this takes a multilayer perceptron, whose kernels each see one row of a sample; '{layer.kernel}' "
                f"{layer.reason or 'sees more, or is used more than once'}"
            )
    for before, layer in itertools.pairwise(layers):
        if layer.follows != before.kernel:
            raise ValueError(
                f"this takes a multilayer perceptron, where each layer reads the neurons of the one before and nothing "
                f"else does; '{layer.kernel}' does not read just the neurons of '{before.kernel}'"
            )
    return layers
