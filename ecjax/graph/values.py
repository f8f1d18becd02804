"""What is known of a value in a jaxpr, and what a walk over the jaxpr has found."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp

from ecjax.graph.layout import Axes, Axis, Layout
from ecjax.graph.samples import Place


class Leaf(NamedTuple):
    """A leaf of the params, cast and rearranged."""

    path: str
    axes: Axes
    stacked: Axis = ()  # the axes that a scan has taken apart


class Units(NamedTuple):
    """What the products of some kernels have become, entry by entry."""

    products: frozenset[int]
    axes: Axes
    bare: bool  # whether it is the product, or a sum with it, and no bias was added yet
    bias: "Added | None" = None  # what was just added to it
    alone: bool = True  # whether nothing else is in the sum
    scaled: bool = False  # whether it was multiplied by a number
    shared: "Added | None" = None  # the bias of another product in the sum, which is its own if it gets no other


class Value(NamedTuple):
    """What is known of a value in the jaxpr."""

    depends: bool = False  # on the inputs
    place: Place | None = None  # of the samples; None also where they were lost
    leaf: Leaf | None = None
    parts: frozenset[str] = frozenset()  # leaves of which parts were cut out or put together
    units: Units | None = None
    uniform: bool = False  # the same number in every entry
    sources: frozenset[str] = frozenset()  # leaves that it was computed from, without the inputs
    changed: frozenset[str] = frozenset()  # leaves that it is made of entry by entry, without the inputs
    mixed: str = ""  # the operation that has taken samples together on the way to it
    unknown: str = ""  # an operation on the way to it of which that is not known


class Within(NamedTuple):
    """What an equation is in.

    Attributes:
        reason: why products there can't be scored, in words; "" if they can.
        turns: the lengths of the scans around it, the outer ones first.
    """

    reason: str = ""
    turns: tuple[int, ...] = ()


AT_TOP = Within()


class Rows(NamedTuple):
    """Where the rows of a product's operand, or of its result, lie.

    Attributes:
        samples: where the samples lie.
        stacked: the axes of a stack's members.
        features: the axes of inputs, or of neurons; empty for the inputs of a convolution.
    """

    samples: Place
    stacked: tuple[int, ...]
    features: tuple[int, ...]


class Product(NamedTuple):
    """One product of a kernel with something that depends on the inputs.

    ``rows`` is ``reads`` and ``gives`` of a product that must have them, as those of layers that are scored have.

    Attributes:
        path: of the kernel.
        site: which equation it is: its index in the jaxpr, after the indices of the calls that it is in.
        layout: of the kernel; None if its entries don't enter this product one by one.
        positions: how many rows a sample has in it.
        what: why it can't be scored; "" if it can.
        outer: whether it is one product of matrices with one row for each sample.
        side: which operand the kernel is.
        kernel: which axes of this operand are members of a stack, inputs and neurons, in the order of the layout.
        plain: whether no axis of it repeats the kernel's entries, and it multiplies no whole numbers.
        reads: where the samples lie in the other operand, and which of its axes are members and inputs; None where they
            can't be followed.
        gives: where they lie in the product, and which of its axes are members and neurons; likewise.
        turns: the lengths of the scans that it is in, the outer ones first.
        sliced: how many of the kernel's matrices these scans tell apart.
        follows: the product whose units are exactly what this one reads.
        window: how many places the window of a convolution has; 1 for a product of matrices.
    """

    path: str
    site: tuple[int, ...]
    layout: Layout | None
    positions: int
    what: str
    outer: bool
    side: int
    kernel: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] = ((), (), ())
    plain: bool = False
    reads: Rows | None = None
    gives: Rows | None = None
    turns: tuple[int, ...] = ()
    sliced: int = 1
    follows: int | None = None
    window: int = 1

    @property
    def once(self) -> bool:
        """Whether each turn has matrices of its own, which no axis repeats, and where samples can be told apart."""
        return bool(self.plain and self.reads and self.gives) and math.prod(self.turns) == self.sliced

    @property
    def rows(self) -> tuple[Rows, Rows]:
        """Where the rows of the other operand lie, and those of the product.

        Raises:
            ValueError: a product in which the samples can't be followed.
        """
        if self.reads is None or self.gives is None:
            raise ValueError(f"the samples can't be followed through the product of '{self.path}'")
        return self.reads, self.gives


class Added(NamedTuple):
    """A leaf that was added to a product as its bias.

    Attributes:
        path: of the leaf.
        layout: of the leaf.
        within: the products to which it was added before this one was; empty if it was added to this one.
        as_it_is: whether neither was multiplied by a number before.
    """

    path: str
    layout: Layout
    within: frozenset[int] = frozenset()
    as_it_is: bool = True


class Site(NamedTuple):
    """Where a bias is added to a product.

    Attributes:
        path: of the equation: its index in the jaxpr, after the indices of the calls and scans that it is in.
        side: which operand the bias is.
        turns: the lengths of these scans, the outer ones first.
    """

    path: tuple[int, ...]
    side: int
    turns: tuple[int, ...]


@dataclass
class Found:
    """What the walk has found so far."""

    samples: int
    leaves: dict[str, Any]
    products: list[Product] = field(default_factory=list)
    added: dict[int, list[Added | None]] = field(default_factory=dict)  # by product; None: used without a bias
    read: dict[int, list[int | None]] = field(default_factory=dict)  # by product; None: its units go elsewhere
    biases: dict[str, list[Site]] = field(default_factory=dict)  # where a leaf is added as a bias
    biased: dict[frozenset[int], int] = field(default_factory=dict)  # how many operations take products with a bias
    others: dict[str, list[str]] = field(default_factory=dict)  # what else each leaf does
    random: str = ""  # an operation that draws numbers for each sample, in words; "" if there is none

    def note(self, value: Value, what: str) -> None:
        """Notes that the leaves in a value are used for something else."""
        for path in (value.leaf.path,) if value.leaf else sorted(value.parts | value.sources):
            if what not in (known := self.others.setdefault(path, [])):
                known.append(what)

    def use(self, units: Units | None) -> None:
        """Notes that an operation takes units: products without a bias of their own, or those that just got one."""
        if units is None:
            return
        if units.bias:
            self.biased[units.products] = self.biased.get(units.products, 0) + 1
        for product in units.products if units.bare else ():
            added = self.added.setdefault(product, [])
            if units.shared is None or units.shared not in added:
                added.append(units.shared)

    def consume(self, units: Units | None) -> None:
        """Notes that units go where they are not followed."""
        self.use(units)
        self.part(units)

    def part(self, units: Units | None) -> None:
        """Notes that something else than these units alone is read from here on."""
        for product in units.products if units else ():
            self.read.setdefault(product, []).append(None)


def leaves_of(value: Value) -> frozenset[str]:
    """The leaves that a value is, or is put together of."""
    return frozenset({value.leaf.path}) if value.leaf else value.parts


def is_float(var) -> bool:
    """Whether a variable of a jaxpr holds floating-point numbers."""
    return jnp.issubdtype(var.aval.dtype, jnp.floating)
