"""Where the samples lie in every value, and whether an operation mixes them.

The samples are followed by their place, never by their number, which other axes may share. An operation that takes them
together (a mean over the batch, a product over it) mixes them; one that is not known here may or may not.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, SupportsIndex


class Place(NamedTuple):
    """Where the samples lie in a value: along one axis, of length ``before · samples · after``.

    Attributes:
        axis: which one.
        before: how many positions of a sample were merged into the axis outside of the samples.
        after: how many inside of them.
    """

    axis: int
    before: int = 1
    after: int = 1


class MixedSamplesError(Exception):
    """An operation takes samples together."""


class UnknownOperationError(Exception):
    """An operation may take samples together."""


# Operations entry by entry, of values of one shape (or with axes of length 1).
ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt
    ceil clamp clz complex conj convert_element_type copy copy_p cos cosh device_put digamma div eq erf erf_inv
    erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite layout_constraint le
    lgamma log log1p logistic lt max min mul mulhi name ne neg nextafter not optimization_barrier or polygamma
    population_count pow pvary real reduce_precision regularized_incomplete_beta rem reshard round rsqrt select_n
    sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
    stop_gradient sub tan tanh xor zeros_like zeta
    """.split()  # noqa: SIM905
)
# Operations over some axes of one value, and the parameter that names them.
_OVER_AXES = {
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"), "axes"),
    **dict.fromkeys(("reduce_xor", "argmax", "argmin"), "axes"),
    "reduce": "dimensions",
}
# Operations along one axis that keep the shape.
_ALONG_AXIS = {
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), "axis"),
    "sort": "dimension",
    "rev": "dimensions",
    "split": "axis",
}
# Operations on the matrices of the last two axes.
_MATRICES = frozenset(
    "cholesky eigh lu qr svd triangular_solve householder_product tridiagonal_solve".split()  # noqa: SIM905
)
_SCATTERS = [
    "scatter",
    "scatter-add",
    "scatter_add",
    "scatter-mul",
    "scatter_mul",
    "scatter-sub",
    "scatter_sub",
    "scatter-min",
    "scatter_min",
    "scatter-max",
    "scatter_max",
]
_WINDOWS = frozenset(
    ("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window", "cumred_reduce_window")
)


def shape_of(variable: Any) -> tuple[int, ...]:
    """The shape of an operand or a result of an equation, which is an array: a variable, or a number in the code."""
    return tuple(variable.aval.shape)


def shapes(variables: Iterable) -> list[tuple[int, ...]]:
    """The shapes of an equation's operands or results."""
    return [shape_of(variable) for variable in variables]


def whole_numbers(axes: Iterable | SupportsIndex) -> tuple[int, ...]:
    """Axes as an equation names them, where ``vmap`` leaves NumPy's whole numbers among Python's."""
    return tuple(map(int, axes)) if isinstance(axes, Iterable) else (int(axes),)


def places(equation, operands: Sequence[Place | None], samples: int) -> list[Place | None]:
    """Where the samples lie in the results of an operation, given where they lie in its operands.

    Args:
        equation: of a jaxpr, one that holds no jaxpr to be looked into.
        operands: a place for each operand; None for one that does not depend on the inputs.
        samples: how many there are, at least 2.

    Raises:
        MixedSamplesError: the operation takes several samples together.
        UnknownOperationError: it is not known whether it does.
    """
    if not any(operands):
        return [None] * len(equation.outvars)
    name = equation.primitive.name
    if name == "optimization_barrier":
        return list(operands)
    rule = _elementwise if name in ELEMENTWISE else _RULES.get(name)
    if rule is None and (name in _OVER_AXES or name in _ALONG_AXIS or name in _MATRICES or name in _WINDOWS):
        rule = _rule_of_kind(name)
    if rule is None:
        raise UnknownOperationError
    found = rule(equation, list(operands), samples)
    return found if isinstance(found, list) else [found] * len(equation.outvars)


def _rule_of_kind(name: str) -> Callable:
    if name in _OVER_AXES:
        return lambda equation, operands, _: _without_axes(
            operands[0], whole_numbers(equation.params[_OVER_AXES[name]])
        )
    if name in _ALONG_AXIS:
        return lambda equation, operands, _: _along(_one(operands), whole_numbers(equation.params[_ALONG_AXIS[name]]))
    return _matrices if name in _MATRICES else _window


def _one(operands: Sequence[Place | None]) -> Place:
    """The one place that all operands with samples share."""
    found = {place for place in operands if place is not None}
    if len(found) > 1:
        raise MixedSamplesError
    return found.pop()


def _elementwise(_equation, operands, _samples) -> Place:
    return _one(operands)


def _without_axes(place: Place, axes: Sequence[int]) -> Place:
    if place.axis in axes:
        raise MixedSamplesError
    return place._replace(axis=place.axis - sum(axis < place.axis for axis in axes))


def _along(place: Place, axes: Sequence[int]) -> Place:
    if place.axis in axes:
        raise MixedSamplesError
    return place


def _matrices(equation, operands, _samples) -> list[Place]:
    place = _one(operands)
    rank = len(shape_of(equation.invars[0]))
    if place.axis >= rank - 2 or any(len(shape) <= place.axis for shape in shapes(equation.outvars)):
        raise MixedSamplesError
    return [place] * len(equation.outvars)


def _fft(equation, operands, _samples) -> Place:
    rank = len(shape_of(equation.invars[0]))
    return _along(operands[0], range(rank - len(equation.params["fft_lengths"]), rank))


def _top_k(equation, operands, _samples) -> list[Place]:
    rank = len(shape_of(equation.invars[0]))
    return [_along(operands[0], whole_numbers(equation.params.get("axis", rank - 1) % rank))] * 2


def _window(equation, operands, _samples) -> Place:
    place = _one(operands)
    at_samples = {name: value[place.axis] for name, value in equation.params.items() if _is_of_axes(value, equation)}
    plain = {"window_dimensions": 1, "window_strides": 1, "padding": (0, 0), "base_dilation": 1, "window_dilation": 1}
    if any(at_samples.get(name, usual) != usual for name, usual in plain.items()):
        raise MixedSamplesError
    return place


def _is_of_axes(value, equation) -> bool:
    return isinstance(value, tuple | list) and len(value) == len(shape_of(equation.invars[0]))


def _broadcast_in_dim(equation, operands, _samples) -> Place:
    return operands[0]._replace(axis=whole_numbers(equation.params["broadcast_dimensions"])[operands[0].axis])


def _transpose(equation, operands, _samples) -> Place:
    return operands[0]._replace(axis=whole_numbers(equation.params["permutation"]).index(operands[0].axis))


def _squeeze(equation, operands, _samples) -> Place:
    return _without_axes(operands[0], whole_numbers(equation.params["dimensions"]))


def _reshape(equation, operands, samples) -> Place:
    (place, *_), (before, *_), (after,) = operands, shapes(equation.invars), shapes(equation.outvars)
    outside = math.prod(before[: place.axis]) * place.before
    inside = place.after * math.prod(before[place.axis + 1 :])
    for axis, length in enumerate(after):
        passed = math.prod(after[:axis])
        if passed and outside % passed == 0 and length % (outside // passed * samples) == 0:
            of_axis = outside // passed
            remaining = length // (of_axis * samples)
            if remaining * math.prod(after[axis + 1 :]) == inside:
                return Place(axis, of_axis, remaining)
    raise UnknownOperationError  # the samples are torn apart


def _concatenate(equation, operands, _samples) -> Place:
    place = _one(operands)
    if place.axis == equation.params["dimension"]:
        raise UnknownOperationError
    return place


def _stack(equation, operands, _samples) -> Place:
    place = _one(operands)
    return place._replace(axis=place.axis + (equation.params["axis"] <= place.axis))


def _unstack(equation, operands, _samples) -> Place:
    return _without_axes(operands[0], whole_numbers(equation.params["axis"]))


def _tile(equation, operands, _samples) -> Place:
    repeats = whole_numbers(equation.params["reps"])
    if len(repeats) != len(shape_of(equation.invars[0])) or repeats[operands[0].axis] != 1:
        raise UnknownOperationError
    return operands[0]


def _pad(equation, operands, _samples) -> Place:
    place = _one(operands)
    if tuple(equation.params["padding_config"][place.axis]) != (0, 0, 0):
        raise UnknownOperationError
    return place


def _same_length(equation, operands, _samples) -> Place:
    """A part of the other axes: slices and their like, of a value and of indices without samples."""
    place, *others = operands
    before, after = shape_of(equation.invars[0]), shape_of(equation.outvars[0])
    if place is None or any(others) or before[place.axis] != after[place.axis]:
        raise UnknownOperationError
    return place


def _dynamic_update_slice(equation, operands, _samples) -> Place:
    place = _one(operands[:2])
    whole, part = shapes(equation.invars[:2])
    if any(operands[2:]) or whole[place.axis] != part[place.axis]:
        raise UnknownOperationError
    return place


def _dot_general(equation, operands, _samples) -> Place:
    contracted, batched = equation.params["dimension_numbers"]
    for place, axes in zip(operands, contracted, strict=True):
        if place is not None and place.axis in axes:
            raise MixedSamplesError
    found = set()
    for side, place in enumerate(operands):
        if place is None:
            continue
        if place.axis in batched[side]:
            found.add(place._replace(axis=list(batched[side]).index(place.axis)))
        else:
            taken = (*contracted[side], *batched[side])
            free = [axis for axis in range(len(shape_of(equation.invars[side]))) if axis not in taken]
            other = len(shape_of(equation.invars[0])) - len(contracted[0]) if side else len(batched[0])
            found.add(place._replace(axis=other + free.index(place.axis)))
    return _one(list(found))


def _conv_general_dilated(equation, operands, _samples) -> Place:
    place, of_kernel = operands
    numbers = equation.params["dimension_numbers"]
    if of_kernel is not None or place.axis != numbers.lhs_spec[0] or equation.params["batch_group_count"] != 1:
        raise UnknownOperationError
    return place._replace(axis=numbers.out_spec[0])


def _gather(equation, operands, _samples) -> Place:
    """Look-ups: a table's rows for each sample, or the same entries of every sample."""
    of_table, of_indices = operands
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    rank = len(shape_of(equation.outvars[0]))
    offset = tuple(numbers.offset_dims)
    others = [axis for axis in range(rank) if axis not in offset]
    batching = tuple(numbers.operand_batching_dims)
    if of_indices is not None:
        found = of_indices._replace(axis=others[of_indices.axis])
        if of_table is None:
            return found
        together = dict(zip(batching, numbers.start_indices_batching_dims, strict=True))
        if together.get(of_table.axis) == of_indices.axis and of_table[1:] == of_indices[1:]:
            return found
        raise MixedSamplesError
    axis = of_table.axis
    if axis in batching or axis in numbers.collapsed_slice_dims or sizes[axis] != shape_of(equation.invars[0])[axis]:
        raise UnknownOperationError
    kept = [a for a in range(len(sizes)) if a not in (*numbers.collapsed_slice_dims, *batching)]
    return of_table._replace(axis=offset[kept.index(axis)])


def _scatter(equation, operands, _samples) -> Place:
    """The same entries of every sample written over or added to."""
    of_table, of_indices, of_updates = operands
    numbers = equation.params["dimension_numbers"]
    table, _, updates = shapes(equation.invars)
    kept = [a for a in range(len(table)) if a not in (*numbers.inserted_window_dims, *numbers.operand_batching_dims)]
    windows = dict(zip(kept, numbers.update_window_dims, strict=True))
    place = of_table
    if place is None or of_indices is not None or place.axis not in windows:
        raise UnknownOperationError
    in_updates = windows[place.axis]
    if updates[in_updates] != table[place.axis]:
        raise UnknownOperationError
    if of_updates is not None and of_updates != place._replace(axis=in_updates):
        raise MixedSamplesError
    return place


_RULES: dict[str, Callable] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "concatenate": _concatenate,
    "pad": _pad,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "slice": _same_length,
    "dynamic_slice": _same_length,
    "dynamic_update_slice": _dynamic_update_slice,
    "dot_general": _dot_general,
    "conv_general_dilated": _conv_general_dilated,
    "gather": _gather,
    **dict.fromkeys(_SCATTERS, _scatter),
    "fft": _fft,
    "top_k": _top_k,
}
