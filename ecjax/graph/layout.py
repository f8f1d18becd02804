"""Where the entries of a leaf lie: its axes, followed through transposes and reshapes, and its entries as a matrix.

The length of an axis is a product of *factors*, the outer ones first. A reshape splits and merges axes, so it moves
factors; a transpose moves axes. What a factor is of says where each entry of an array comes from.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Shaped


class Factor(NamedTuple):
    """A part of an axis.

    Attributes:
        of: the axis of the origin that it is a part of, or None for what is merely repeated along it.
        stride: how far apart its entries are along that axis.
        size: how many there are.
    """

    of: int | None
    stride: int
    size: int


Axis = tuple[Factor, ...]
Axes = tuple[Axis, ...]


def whole(shape: Sequence[int]) -> Axes:
    """The axes of an array that is its own origin."""
    return tuple((Factor(axis, 1, length),) for axis, length in enumerate(shape))


def repeated(length: int) -> Axis:
    """An axis along which nothing of the origin changes."""
    return (Factor(None, 1, length),)


def is_repeated(axis: Axis) -> bool:
    """Whether nothing of the origin changes along an axis."""
    return all(factor.of is None for factor in axis)


def merged(factors: Iterable[Factor]) -> Axis:
    """The same axis in as few factors as possible; factors of size 1 say nothing and are left out."""
    found: list[Factor] = []
    for factor in factors:
        if factor.size == 1:
            continue
        if found and found[-1].of == factor.of and _continues(found[-1], factor):
            factor = factor._replace(size=found.pop().size * factor.size)
        found.append(factor)
    return tuple(found)


def _continues(outer: Factor, inner: Factor) -> bool:
    return outer.of is None or outer.stride == inner.stride * inner.size


def reshaped(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The axes after a reshape; None where the new ones cut through a factor."""
    lengths = [math.prod(factor.size for factor in axis) for axis in axes]
    if [length for length in lengths if length != 1] == [length for length in shape if length != 1]:
        kept = iter([axis for axis, length in zip(axes, lengths, strict=True) if length != 1])
        return tuple(() if length == 1 else next(kept) for length in shape)
    if 0 in shape:
        return None
    left = [factor for axis in axes for factor in axis if factor.size > 1]
    found = []
    for length in shape:
        axis: list[Factor] = []
        missing = length
        while missing > 1:
            factor = left.pop(0)
            if missing % factor.size == 0:
                axis.append(factor)
                missing //= factor.size
            elif factor.size % missing == 0:
                inner = factor.size // missing
                axis.append(Factor(factor.of, factor.stride * inner, missing))
                left.insert(0, Factor(factor.of, factor.stride, inner))
                missing = 1
            else:
                return None
        found.append(merged(axis))
    return tuple(found)


def pairs(first: Axis, second: Axis) -> list[tuple[Factor, Factor]] | None:
    """Two descriptions of one axis, split until their factors correspond; None if they can't be."""
    ones, others, found = list(merged(first)), list(merged(second)), []
    while ones and others:
        one, other = ones.pop(0), others.pop(0)
        if one.size == other.size:  # also 0
            found.append((one, other))
            continue
        size = math.gcd(one.size, other.size)
        if size not in (one.size, other.size) or size == 0:
            return None
        for factor, rest in ((one, ones), (other, others)):
            if factor.size > size:
                inner = factor.size // size
                rest.insert(0, Factor(factor.of, factor.stride, inner))
        outer = [Factor(f.of, f.stride * (f.size // size), size) for f in (one, other)]
        found.append((outer[0], outer[1]))
    return None if ones or others else found


class Layout(NamedTuple):
    """How the entries of a leaf are those of matrices ``(in, out)``, one for each member of a stack.

    Attributes:
        shape: of the leaf.
        split: its axes, split into factors.
        stacked: which of these tell the members of the stack apart, in order.
        inputs: which of these are the inputs of a neuron.
        outputs: which of these are the neurons.

    Example:
        >>> layout = networks.layers(network, params, inputs)[0].layout
        >>> layout.shape, layout.axes, layout.sizes
        ((4, 8), ('in', 'out'), (1, 4, 8))
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    stacked: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many members, inputs and neurons."""
        parts = self.stacked, self.inputs, self.outputs
        stack, inputs, outputs = (math.prod(self.split[i] for i in part) for part in parts)
        return stack, inputs, outputs

    @property
    def axes(self) -> tuple[str, ...]:
        """What each axis of the leaf is: "stack", "in", "out", several of these joined by "·", or "1"."""
        names = {i: name for name, part in zip(("stack", "in", "out"), self[2:], strict=True) for i in part}
        found, index = [], 0
        for length in self.shape:
            here, size = [], 1
            while size != length:
                here.append(names[index])
                size *= self.split[index]
                index += 1
            found.append("·".join(dict.fromkeys(here)) or "1")
        return tuple(found)


def layout(shape: Sequence[int], stacked: Axis, inputs: Axis, outputs: Axis) -> Layout | None:
    """The layout of a leaf with these factors in this order; None if they do not make up the leaf, each entry once."""
    factors = [*stacked, *inputs, *outputs]
    if any(factor.of is None for factor in factors):
        return None
    ordered = sorted(range(len(factors)), key=lambda i: (factors[i].of, -factors[i].stride))
    place = {i: position for position, i in enumerate(ordered)}
    split = tuple(factors[i].size for i in ordered)
    expected = merged(factors[i] for i in ordered)
    if expected != merged(Factor(axis, 1, length) for axis, length in enumerate(shape)):
        return None
    ends = len(stacked), len(stacked) + len(inputs), len(factors)
    parts = (range(ends[0]), range(ends[0], ends[1]), range(ends[1], ends[2]))
    return Layout(tuple(shape), split, *(tuple(place[i] for i in part) for part in parts))


def as_matrices(leaf: Shaped[Array, "..."], layout: Layout) -> Shaped[Array, "stack in out"]:
    """The entries of a leaf as matrices, inputs by neurons.

    Args:
        leaf: a kernel, or a bias, which has no inputs.
        layout: its own.

    Example:
        >>> transposed = networks.layers(lambda kernel, x: x @ kernel.T, jnp.ones((3, 4)), inputs)[0].layout
        >>> graph.as_matrices(jnp.arange(12).reshape(3, 4), transposed)[0, 1].tolist()  # of the second input
        [1, 5, 9]
    """
    order = (*layout.stacked, *layout.inputs, *layout.outputs)
    return jnp.reshape(leaf, layout.split).transpose(order).reshape(layout.sizes)


def as_leaf(matrices: Shaped[Array, "*stack in out"], layout: Layout) -> Shaped[Array, "..."]:
    """The leaf whose entries as matrices are these: the inverse of ``as_matrices``.

    Args:
        matrices: one for each member of the stack; where there is one, it may come without that axis.
        layout: of the leaf.

    Example:
        >>> layout = networks.layers(lambda kernel, x: x @ kernel.T, jnp.ones((3, 4)), inputs)[0].layout
        >>> graph.as_leaf(jnp.zeros((1, 4, 3)), layout).shape
        (3, 4)
    """
    order = (*layout.stacked, *layout.inputs, *layout.outputs)
    back = sorted(range(len(order)), key=order.__getitem__)
    return jnp.reshape(matrices, [layout.split[i] for i in order]).transpose(back).reshape(layout.shape)
