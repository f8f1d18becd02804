"""What a unit becomes when its entries in all leaves are zero: it can go where it adds nothing to anything else.

A unit that is taken away is left out of every sum over its axis: of products with kernels, of products of two values,
of means. That changes nothing if its term is zero there. So zeros are followed from the leaves, entry by entry: through
what maps 0 to 0, through products with anything, and through sums of zeros. Where a sum meets a unit that is not zero,
the unit is pinned: the variance about a mean is such a sum, a mean of squares is not.
"""

import operator
from collections.abc import Sequence
from typing import NamedTuple

from jax.extend import core

from ecjax.graph.atoms import Atoms, Axes
from ecjax.graph.samples import whole_numbers

Zero = tuple[frozenset[int], ...]

# Functions of one number that map 0 to 0.
_KEEP = frozenset(
    """
    abs asin asinh atan atanh cbrt ceil conj convert_element_type copy copy_p device_put erf erf_inv expm1 floor imag
    integer_pow layout_constraint log1p name neg pvary real reduce_precision reshard round sharding_constraint sign sin
    sinh sqrt square stop_gradient tan tanh
    """.split()  # noqa: SIM905
)
_ALL_ZERO = frozenset(("add", "add_any", "sub", "or", "xor", "complex"))
_ONE_ZERO = frozenset(("mul", "and"))
_FIRST_ZERO = frozenset(("div", "rem"))
_WITHIN_AXES = frozenset(
    """
    cummax cummin cumprod cumsum dynamic_slice fft reduce_window_max reduce_window_min reduce_window_sum rev slice
    split tile
    """.split()  # noqa: SIM905
)
_SAME_NUMBER = frozenset(
    ["broadcast_in_dim", "convert_element_type", "copy", "reshape", "slice", "squeeze", "transpose"]
)


class Known(NamedTuple):
    """What is known of a value when some units are zero in all leaves.

    Attributes:
        zero: for each axis, the atoms at whose zero units the value is zero.
        number: that all its entries are; None where they are not known to be the same.
        depends: on the inputs.
        leaves: that it was computed from, if it does not depend on the inputs.
    """

    zero: Zero
    number: float | None = None
    depends: bool = False
    leaves: frozenset[str] = frozenset()


class Step(NamedTuple):
    """An equation, what is known of its operands, and the axes of these and of one of its results."""

    equation: core.JaxprEqn
    values: Sequence[Known]
    operands: Sequence[Axes]
    results: Axes
    atoms: Atoms

    @property
    def name(self) -> str:
        """Of the primitive."""
        return self.equation.primitive.name

    def smallest(self, side: int, axes: Sequence[int]) -> list[int]:
        """The atoms of some axes of an operand."""
        return [atom for axis in axes for atom in self.atoms.smallest(self.operands[side][axis])]

    def zero(self, side: int, axis: int) -> frozenset[int]:
        """The atoms of an axis of an operand at which it is zero."""
        value = self.values[side]
        return frozenset(self.smallest(side, [axis])) if value.number == 0 else value.zero[axis]

    def zero_at(self, side: int, index: int) -> frozenset[int]:
        """The atoms of an axis of the result at which an operand, repeated where it has to be, is zero."""
        axes, axis = self.operands[side], self.results[index]
        if self.values[side].number == 0:
            return frozenset(self.atoms.smallest(axis))
        if not axes or self.atoms.length(axes[index]) != self.atoms.length(axis):
            return frozenset()
        return self.values[side].zero[index]


def of_leaf(path: str, axes: Axes, atoms: Atoms) -> Known:
    """What is known of a leaf: it is zero at its zero units, along each of its axes."""
    return Known(tuple(frozenset(atoms.smallest(axis)) for axis in axes), leaves=frozenset({path}))


def of_inputs(axes: Axes) -> Known:
    """What is known of the inputs: nothing."""
    return Known(nothing(axes), depends=True)


def nothing(axes: Axes) -> Zero:
    """The zeros of a value of which none is known."""
    return (frozenset(),) * len(axes)


def known(step: Step) -> Known:
    """What is known of a result: its zeros, those of the atoms that it still has, and where it comes from."""
    found = zip(_RULES.get(step.name, _of_shape)(step), step.results, strict=True)
    depends = any(value.depends for value in step.values)
    return Known(
        zero=tuple(here & frozenset(step.atoms.smallest(axis)) for here, axis in found),
        number=step.values[0].number if step.name in _SAME_NUMBER else None,
        depends=depends,
        leaves=frozenset() if depends else frozenset().union(*(value.leaves for value in step.values)),
    )


def _of_shape(step: Step) -> Zero:
    """Entry by entry, or along other axes; nothing is known of what any other operation gives."""
    name, sides = step.name, range(len(step.values))
    numbers = [value.number for value in step.values]
    if name in _WITHIN_AXES and len(step.results) == len(step.operands[0]):
        return step.values[0].zero
    if name in ("max", "min"):  # numbers that zeros win against do not count
        wins = operator.le if name == "max" else operator.ge
        sides = [side for side, number in enumerate(numbers) if number is None or not wins(number, 0)] or sides
    elif name == "clamp":
        low, _, high = numbers
        sides = [1] if low is not None and high is not None and low <= 0 <= high else []
    elif name == "select_n":
        sides = sides[1:]
    elif name in _FIRST_ZERO or (name in _KEEP and step.equation.params.get("y", 1) > 0):
        sides = [0]
    elif name not in (*_ALL_ZERO, *_ONE_ZERO):
        sides = []
    together = frozenset.union if name in _ONE_ZERO else frozenset.intersection
    if not sides:
        return nothing(step.results)
    return tuple(together(*(step.zero_at(side, index) for side in sides)) for index in range(len(step.results)))


def _optimization_barrier(step: Step) -> Zero:
    pairs = zip(step.values, step.operands, strict=True)
    return next((value.zero for value, axes in pairs if axes is step.results), nothing(step.results))


def _transpose(step: Step) -> Zero:
    return tuple(step.values[0].zero[axis] for axis in whole_numbers(step.equation.params["permutation"]))


def _broadcast_in_dim(step: Step) -> Zero:
    zero = list(nothing(step.results))
    for index, place in enumerate(whole_numbers(step.equation.params["broadcast_dimensions"])):
        zero[place] = step.values[0].zero[index]
    return tuple(zero)


def _reshape(step: Step) -> Zero:
    """An atom is zero if it was on every axis that it was on."""
    there, missing = set(), set()
    for index, zero in enumerate(step.values[0].zero):
        for atom in step.smallest(0, [index]):
            (there if atom in zero else missing).add(atom)
    return (frozenset(there - missing),) * len(step.results)


def _concatenate(step: Step) -> Zero:
    """Along the axis of the parts, an atom is zero if it is in every part that has it."""
    along, zero = int(step.equation.params["dimension"]), []
    sides = range(len(step.values))
    for index in range(len(step.results)):
        if index == along:
            parts = [(frozenset(step.smallest(side, [along])), step.zero(side, along)) for side in sides]
            there = frozenset().union(*(own for _, own in parts))
            zero.append(there.difference(*(all_of - own for all_of, own in parts)))
        else:
            zero.append(frozenset.intersection(*(step.zero_at(side, index) for side in sides)))
    return tuple(zero)


def _pad(step: Step) -> Zero:
    return step.values[0].zero if step.values[1].number == 0 else nothing(step.results)


def _stack(step: Step) -> Zero:
    along = int(step.equation.params["axis"])
    zero = [frozenset.intersection(*parts) for parts in zip(*(value.zero for value in step.values), strict=True)]
    return (*zero[:along], frozenset(), *zero[along:])


def _without(step: Step) -> Zero:
    name = {"squeeze": "dimensions", "unstack": "axis"}.get(step.name, "axes")
    gone = whole_numbers(step.equation.params[name])
    return tuple(zero for index, zero in enumerate(step.values[0].zero) if index not in gone)


def _dot_general(step: Step) -> Zero:
    _, batched = step.equation.params["dimension_numbers"]
    zero = [step.zero(0, a) | step.zero(1, b) for a, b in zip(*batched, strict=True)]
    return (*zero, *(step.zero(side, axis) for side in (0, 1) for axis in free(step, side)))


def free(step: Step, side: int) -> list[int]:
    """The axes of an operand of a product that are neither summed over nor shared."""
    contracted, batched = step.equation.params["dimension_numbers"]
    taken = (*contracted[side], *batched[side])
    return [axis for axis in range(len(step.operands[side])) if axis not in taken]


def _conv_general_dilated(step: Step) -> Zero:
    numbers, zero = step.equation.params["dimension_numbers"], list(nothing(step.results))
    if step.equation.params["batch_group_count"] == 1:
        zero[numbers.out_spec[0]] = step.zero(0, numbers.lhs_spec[0])
        zero[numbers.out_spec[1]] = step.zero(1, numbers.rhs_spec[0]) | (
            step.zero(0, numbers.lhs_spec[1]) & groups(step)
        )
    return tuple(zero)


def groups(step: Step) -> frozenset[int]:
    """The atoms of the groups of a convolution's channels, which are no sums over the channels of all."""
    numbers = step.equation.params["dimension_numbers"]
    if step.equation.params["feature_group_count"] == 1:
        return frozenset()
    return frozenset(step.smallest(0, [numbers.lhs_spec[1]])).difference(step.smallest(1, [numbers.rhs_spec[1]]))


def _gather(step: Step) -> Zero:
    zero = list(nothing(step.results))
    for place, axis in looked_up(step):
        zero[place] = step.values[0].zero[axis]
    return tuple(zero)


def looked_up(step: Step) -> list[tuple[int, int]]:
    """The axes of what is looked up in a table that are axes of the table, and these."""
    numbers = step.equation.params["dimension_numbers"]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [axis for axis in range(len(step.operands[0])) if axis not in gone]
    return list(zip(numbers.offset_dims, kept, strict=True))


_RULES = {
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or"), _without),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv_general_dilated,
    "dot_general": _dot_general,
    "gather": _gather,
    "optimization_barrier": _optimization_barrier,
    "pad": _pad,
    "reshape": _reshape,
    "squeeze": _without,
    "stack": _stack,
    "transpose": _transpose,
    "unstack": _without,
}
