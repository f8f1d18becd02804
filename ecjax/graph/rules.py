"""Which axes each primitive matches: from the axes of its operands to those of its results.

A primitive that has no rule here pins all axes that it touches: it can cost a group of units, never an answer.
"""

from collections.abc import Callable, Sequence

from ecjax.graph.atoms import Atoms, Axes, Axis
from ecjax.graph.samples import ELEMENTWISE, shape_of, shapes, whole_numbers

Rule = Callable[..., list[Axes]]

_OVER_AXES = {
    **dict.fromkeys(("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"), "axes"),
    **dict.fromkeys(("argmax", "argmin"), "axes"),
}
_ALONG_AXIS = {
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), "axis"),
    "sort": "dimension",
    "rev": "dimensions",
}


def describe(equation) -> str:
    """An operation and the shapes that it takes, in words."""
    taken = ", ".join(str(shape) for shape in shapes(equation.invars))
    return f"'{equation.primitive.name}' of {taken}"


def results_of(equation, operands: Sequence[Axes], atoms: Atoms) -> list[Axes]:
    """The axes of an equation's results; what it matches and pins is noted in the atoms."""
    name = equation.primitive.name
    rule = _elementwise if name in ELEMENTWISE else RULES.get(name, unknown)
    return rule(equation, list(operands), atoms)


def unknown(equation, operands: list[Axes], atoms: Atoms) -> list[Axes]:
    """Pins everything that goes into an operation of which it is not known what it does."""
    reason = f"goes through {describe(equation)}, which is not known here"
    return _pin_all(equation, operands, atoms, reason)


def _pin_all(equation, operands, atoms: Atoms, reason: str) -> list[Axes]:
    for axes in operands:
        for axis in axes:
            atoms.pin(axis, reason)
    return [atoms.axes(shape, reason) for shape in shapes(equation.outvars)]


def _elementwise(equation, operands, atoms: Atoms) -> list[Axes]:
    if equation.primitive.name == "optimization_barrier":
        return operands
    if any(len(axes) not in (0, len(shape)) for axes in operands for shape in shapes(equation.outvars)):
        return unknown(equation, operands, atoms)
    return [together(operands, shape, atoms, describe(equation)) for shape in shapes(equation.outvars)]


def together(operands: Sequence[Axes], shape: Sequence[int], atoms: Atoms, what: str) -> Axes:
    """The axes of values that are combined entry by entry; those of length 1, and scalars, are repeated."""
    found = []
    for index, length in enumerate(shape):
        here = [axes[index] for axes in operands if axes]
        full = [axis for axis in here if atoms.length(axis) == length]
        for axis in here:
            if atoms.length(axis) != length:
                atoms.pin(axis, f"is repeated in {what}")
        for axis in full[1:]:
            atoms.unify(full[0], axis, f"does not fit together in {what}")
        found.append(full[0] if full else atoms.axes((length,))[0])
    return tuple(found)


def _kept(kept: Sequence[int], axes: Axes, shape, atoms: Atoms, reason: str) -> Axes:
    """The same axes where nothing happens along them; pinned, and with other ones in their place, elsewhere."""
    found = []
    for index, (axis, length) in enumerate(zip(axes, shape, strict=True)):
        if index in kept:
            found.append(axis)
        else:
            atoms.pin(axis, reason)
            found.append(axis if atoms.length(axis) == length else atoms.axes((length,), reason)[0])
    return tuple(found)


def _reduce_sum(equation, operands, _atoms) -> list[Axes]:
    gone = whole_numbers(equation.params["axes"])
    return [tuple(axis for index, axis in enumerate(operands[0]) if index not in gone)]


def _over_axes(equation, operands, atoms: Atoms) -> list[Axes]:
    gone = whole_numbers(equation.params[_OVER_AXES[equation.primitive.name]])
    for index in gone:
        atoms.pin(operands[0][index], f"is taken together in {describe(equation)}, as softmax does")
    return _reduce_sum(equation, operands, atoms) if gone else operands


def _along_axis(equation, operands, atoms: Atoms) -> list[Axes]:
    along = whole_numbers(equation.params[_ALONG_AXIS[equation.primitive.name]])
    axes = together(operands, shape_of(equation.invars[0]), atoms, describe(equation))
    for index in along:
        atoms.pin(axes[index], f"has an order in {describe(equation)}")
    return [axes] * len(equation.outvars)


def _transpose(equation, operands, _atoms) -> list[Axes]:
    return [tuple(operands[0][axis] for axis in whole_numbers(equation.params["permutation"]))]


def _squeeze(equation, operands, atoms: Atoms) -> list[Axes]:
    gone = whole_numbers(equation.params["dimensions"])
    for index in gone:
        atoms.pin(operands[0][index], f"is taken out in {describe(equation)}")
    return [tuple(axis for index, axis in enumerate(operands[0]) if index not in gone)]


def _broadcast_in_dim(equation, operands, atoms: Atoms) -> list[Axes]:
    (shape,), axes = shapes(equation.outvars), operands[0]
    found = list(atoms.axes(shape))
    for axis, place in zip(axes, whole_numbers(equation.params["broadcast_dimensions"]), strict=True):
        if atoms.length(axis) == shape[place]:
            found[place] = axis
        else:
            atoms.pin(axis, f"is repeated in {describe(equation)}")
    return [tuple(found)]


def _reshape(equation, operands, atoms: Atoms) -> list[Axes]:
    (shape,) = shapes(equation.outvars)
    if equation.params.get("dimensions") is not None:
        return unknown(equation, operands, atoms)
    return [atoms.reshaped(operands[0], shape, f"is torn apart in {describe(equation)} to {shape}")]


def _iota(equation, _operands, atoms: Atoms) -> list[Axes]:
    return [atoms.axes(shape) for shape in shapes(equation.outvars)]


def _concatenate(equation, operands, atoms: Atoms) -> list[Axes]:
    (shape,), along = shapes(equation.outvars), int(equation.params["dimension"])
    others = [tuple(axis if index != along else () for index, axis in enumerate(axes)) for axes in operands]
    lengths = tuple(length if index != along else 1 for index, length in enumerate(shape))
    found = list(together(others, lengths, atoms, describe(equation)))
    found[along] = atoms.joined([axes[along] for axes in operands])
    return [tuple(found)]


def _pad(equation, operands, atoms: Atoms) -> list[Axes]:
    found = []
    for axis, padding in zip(operands[0], equation.params["padding_config"], strict=True):
        low, high, inside = whole_numbers(padding)
        reason = f"is padded in {describe(equation)}"
        if (low, high, inside) == (0, 0, 0):
            found.append(axis)
        elif min(low, high) < 0 or inside:
            atoms.pin(axis, reason)
            found.append(())
        else:
            found.append(atoms.joined([atoms.new(low, reason), axis, atoms.new(high, reason)]))
    (shape,) = shapes(equation.outvars)
    new = atoms.axes(shape, f"is padded in {describe(equation)}")
    return [tuple(axis if atoms.length(axis) == length else new[i] for i, (axis, length) in _numbered(found, shape))]


def _numbered(axes: Sequence, shape: Sequence[int]):
    return enumerate(zip(axes, shape, strict=True))


def _slice(equation, operands, atoms: Atoms) -> list[Axes]:
    found = []
    (before,), (after,) = shapes(equation.invars), shapes(equation.outvars)
    strides = equation.params["strides"] or (1,) * len(before)
    for axis, length, size, start, stride in zip(
        operands[0], before, after, whole_numbers(equation.params["start_indices"]), strides, strict=True
    ):
        reason = f"is cut in {describe(equation)}"
        if length == size:
            found.append(axis)
        elif stride != 1:
            atoms.pin(axis, reason)
            found.extend(atoms.axes((size,), reason))
        else:
            found.append(atoms.cut(axis, (start, size, length - start - size), reason)[1])
    return [tuple(found)]


def _split(equation, operands, atoms: Atoms) -> list[Axes]:
    along, axes = int(equation.params["axis"]), operands[0]
    sizes = whole_numbers(equation.params["sizes"])
    pieces = atoms.cut(axes[along], sizes, f"is cut in {describe(equation)}")
    return [(*axes[:along], piece, *axes[along + 1 :]) for piece in pieces]


def _stack(equation, operands, atoms: Atoms) -> list[Axes]:
    along = int(equation.params["axis"])
    axes = together(operands, shape_of(equation.invars[0]), atoms, describe(equation))
    new = atoms.axes((len(operands),), f"is what {describe(equation)} stacks")
    return [(*axes[:along], *new, *axes[along:])]


def _unstack(equation, operands, atoms: Atoms) -> list[Axes]:
    along = int(equation.params["axis"])
    atoms.pin(operands[0][along], f"is taken apart in {describe(equation)}")
    return [(*operands[0][:along], *operands[0][along + 1 :])] * len(equation.outvars)


def _tile(equation, operands, atoms: Atoms) -> list[Axes]:
    (shape,), repeats = shapes(equation.outvars), whole_numbers(equation.params["reps"])
    if len(repeats) != len(operands[0]) or len(shape) != len(repeats):
        return unknown(equation, operands, atoms)
    kept = [index for index, count in enumerate(repeats) if count == 1]
    return [_kept(kept, operands[0], shape, atoms, f"is repeated in {describe(equation)}")]


def _part(equation, operands, atoms: Atoms) -> list[Axes]:
    """A part that starts where other values say: the axes that it takes whole stay."""
    (shape,), before = shapes(equation.outvars), shape_of(equation.invars[0])
    kept = [index for index, (length, size) in enumerate(zip(before, shape, strict=True)) if length == size]
    return [_kept(kept, operands[0], shape, atoms, f"is cut in {describe(equation)}")]


def _dynamic_update_slice(equation, operands, atoms: Atoms) -> list[Axes]:
    whole, part = operands[:2]
    found = []
    for axis, other in zip(whole, part, strict=True):
        if atoms.length(axis) == atoms.length(other):
            atoms.unify(axis, other, f"does not fit together in {describe(equation)}")
        else:
            atoms.pin(axis, f"is written to in part in {describe(equation)}")
            atoms.pin(other, f"is written in {describe(equation)}")
        found.append(axis)
    return [tuple(found)]


def _dot_general(equation, operands, atoms: Atoms) -> list[Axes]:
    (first, second), (of_first, of_second) = equation.params["dimension_numbers"]
    left, right = operands
    for one, other in ((first, second), (of_first, of_second)):
        for a, b in zip(one, other, strict=True):
            atoms.unify(left[a], right[b], f"does not fit together in {describe(equation)}")
    free = [
        [axis for index, axis in enumerate(axes) if index not in (*contracted, *batched)]
        for axes, contracted, batched in ((left, first, of_first), (right, second, of_second))
    ]
    return [(*(left[axis] for axis in of_first), *free[0], *free[1])]


def _conv_general_dilated(equation, operands, atoms: Atoms) -> list[Axes]:
    numbers = equation.params["dimension_numbers"]
    if equation.params["batch_group_count"] != 1:
        return _pin_all(equation, operands, atoms, f"is convolved in groups of samples in {describe(equation)}")
    inputs, kernel = operands
    reason = f"has a window slide along it in {describe(equation)}"
    for axes, spec in ((inputs, numbers.lhs_spec), (kernel, numbers.rhs_spec)):
        for index in spec[2:]:
            atoms.pin(axes[index], reason)
    groups, apart = int(equation.params["feature_group_count"]), f"does not fit together in {describe(equation)}"
    channels, (out, of_kernel) = inputs[numbers.lhs_spec[1]], (kernel[axis] for axis in numbers.rhs_spec[:2])
    group = atoms.axes((groups,))[0]
    atoms.unify((*group, *of_kernel), channels, apart)
    if groups > 1:
        atoms.unify((*group, *atoms.axes((atoms.length(out) // groups,))[0]), out, apart)
    found = list(atoms.axes(shape_of(equation.outvars[0]), reason))
    found[numbers.out_spec[0]], found[numbers.out_spec[1]] = inputs[numbers.lhs_spec[0]], out
    return [tuple(found)]


def _window(equation, operands, atoms: Atoms) -> list[Axes]:
    shape, rank = shape_of(equation.outvars[0]), len(operands[0])
    plain = {"window_dimensions": 1, "window_strides": 1, "padding": (0, 0), "base_dilation": 1, "window_dilation": 1}
    kept = [
        axis
        for axis in range(rank)
        if all(_at(equation.params.get(name), axis, usual) == usual for name, usual in plain.items())
    ]
    values = [axes for axes in operands if len(axes) == rank]
    axes = together(values, shape_of(equation.invars[0]), atoms, describe(equation))
    found = _kept(kept, axes, shape, atoms, f"has a window slide along it in {describe(equation)}")
    return [found] * len(equation.outvars)


def _at(values, axis: int, usual):
    value = usual if values is None else values[axis]
    return tuple(map(int, value)) if isinstance(usual, tuple) else int(value)


def _gather(equation, operands, atoms: Atoms) -> list[Axes]:
    """Look-ups: what is looked up is whole along the axes that no index moves along."""
    table, indices = operands
    numbers, sizes = equation.params["dimension_numbers"], whole_numbers(equation.params["slice_sizes"])
    shape, lengths = shape_of(equation.outvars[0]), shape_of(equation.invars[0])
    found: list[Axis] = [()] * len(shape)
    reason = f"is looked up in {describe(equation)}"
    others = [axis for axis in range(len(shape)) if axis not in numbers.offset_dims]
    for place, axis in zip(others, indices[:-1], strict=True):
        found[place] = axis
    for axis in indices[-1:]:
        atoms.pin(axis, reason)
    for own, of_index in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        atoms.unify(table[own], indices[of_index], reason)
    offsets = iter(numbers.offset_dims)
    for index, axis in enumerate(table):
        if index in numbers.operand_batching_dims:
            continue
        collapsed = index in numbers.collapsed_slice_dims
        whole = sizes[index] == lengths[index] and index not in numbers.start_index_map
        if collapsed or not whole:
            atoms.pin(axis, reason)
        if not collapsed:
            found[next(offsets)] = axis if whole else atoms.axes((sizes[index],), reason)[0]
    return [tuple(found)]


def _fft(equation, operands, atoms: Atoms) -> list[Axes]:
    (shape,), rank = shapes(equation.outvars), len(operands[0])
    kept = range(rank - len(equation.params["fft_lengths"]))
    return [_kept(kept, operands[0], shape, atoms, f"is transformed in {describe(equation)}")]


def _top_k(equation, operands, atoms: Atoms) -> list[Axes]:
    shape, rank = shape_of(equation.outvars[0]), len(operands[0])
    along = int(equation.params.get("axis", -1)) % rank
    kept = [axis for axis in range(rank) if axis != along]
    return [_kept(kept, operands[0], shape, atoms, f"has an order in {describe(equation)}")] * len(equation.outvars)


RULES: dict[str, Rule] = {
    **dict.fromkeys(_OVER_AXES, _over_axes),
    **dict.fromkeys(_ALONG_AXIS, _along_axis),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window"), _window),
    **dict.fromkeys(("dynamic_slice",), _part),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv_general_dilated,
    "dot_general": _dot_general,
    "dynamic_update_slice": _dynamic_update_slice,
    "fft": _fft,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "reduce_sum": _reduce_sum,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "top_k": _top_k,
    "transpose": _transpose,
    "unstack": _unstack,
}
