"""What each leaf of the params does in a network: one walk over the jaxpr that evaluates nothing.

Four things are followed from equation to equation: where the samples lie (``samples``); a leaf that was only cast and
rearranged; the product of a kernel, until its bias is added; and the units of one layer, as long as every entry is a
function of one pre-activation.
"""

import math
from collections.abc import Sequence

from jax.extend import core

from ecjax.graph import layout as layouts
from ecjax.graph.layout import Axes
from ecjax.graph.products import multiplied, summed
from ecjax.graph.samples import (
    ELEMENTWISE,
    MixedSamplesError,
    Place,
    UnknownOperationError,
    places,
    shape_of,
    shapes,
    whole_numbers,
)
from ecjax.graph.values import AT_TOP, Found, Leaf, Product, Units, Value, Within, is_float, leaves_of

# Calls that only run the jaxpr they hold, on the same arguments, and the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
_CUSTOM = {"custom_jvp_call": "jax.custom_jvp", "custom_vjp_call": "jax.custom_vjp"}
_CUSTOM["custom_vjp_call_jaxpr"] = "jax.custom_vjp"
# What changes neither the entries of a leaf nor their order.
CASTS = frozenset(
    """
    convert_element_type copy copy_p device_put layout_constraint name pvary reduce_precision reshard
    sharding_constraint
    """.split()  # noqa: SIM905
)
_RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator")
_REARRANGEMENTS = ("broadcast_in_dim", "reshape", "squeeze", "transpose")
# What takes only some entries of a leaf, or puts several leaves together.
PARTS = CASTS.union(
    _REARRANGEMENTS,
    "concatenate dynamic_slice gather pad rev slice split stack tile unstack".split(),  # noqa: SIM905
)


def walk(
    closed, arguments: Sequence[Value], found: Found, *, within: Within = AT_TOP, site: tuple[int, ...] = ()
) -> list:
    """What the results of a jaxpr are, given what its arguments are.

    Args:
        closed: a jaxpr, with or without its constants.
        arguments: what is known of each.
        found: what the walk adds to.
        within: what the jaxpr is in.
        site: the equations that it is called from.
    """
    jaxpr = getattr(closed, "jaxpr", closed)
    known = {var: Value(uniform=math.prod(shape_of(var)) == 1) for var in jaxpr.constvars}
    known |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(var) -> Value:
        return Value(uniform=True) if isinstance(var, core.Literal) else known[var]

    for index, equation in enumerate(jaxpr.eqns):
        operands = [read(var) for var in equation.invars]
        here = (*site, index)
        results = _equation(equation, operands, found, within, here)
        known |= dict(zip(equation.outvars, results, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _equation(equation, operands: list[Value], found: Found, within: Within, site: tuple[int, ...]) -> list[Value]:
    name = equation.primitive.name
    if name in CALLS:
        own = f"is used inside {_CUSTOM[name]}, whose derivative is its own" if name in _CUSTOM else ""
        inside = within._replace(reason=within.reason or own)
        results = walk(equation.params[CALLS[name]], operands, found, within=inside, site=site)
        return [_after_custom(result, _CUSTOM[name], found) for result in results] if name in _CUSTOM else results
    if name == "scan":
        return _scan(equation, operands, found, within, site)
    if name == "while":
        return _while(equation, operands, found, within, site)
    if name == "cond":
        return _cond(equation, operands, found, within, site)
    if name in _RANDOM and any(found.samples in shape for shape in shapes(equation.outvars)):
        found.random = found.random or describe(equation)
    results = _samples(equation, operands, found)
    if name in ("dot_general", "conv_general_dilated"):
        product = multiplied(equation, operands, results[0], found, within, site)
        if product is not None:
            return [product]
    total = summed(equation, operands, results[0], found, within, site) if results else None
    if total is not None:
        return [total]
    if len(operands) == 1 and len(results) == 1:
        rearranged = _rearranged(equation, operands[0], results[0])
        if rearranged is not None:
            return [rearranged]
    return _otherwise(equation, operands, results, found, site)


def _after_custom(value: Value, name: str, found: Found) -> Value:
    """What comes out of a function with a derivative of its own: no leaf, and no bare product, whatever it computes."""
    if leaves_of(value):
        found.note(value, f"goes through {name}")
    found.use(value.units)
    units = value.units and value.units._replace(bare=False, bias=None)
    return value._replace(leaf=None, parts=frozenset(), units=units, sources=value.sources | leaves_of(value))


def _samples(equation, operands: list[Value], found: Found) -> list[Value]:
    """The results with nothing but the place of the samples."""
    count = len(equation.outvars)
    if not any(operand.depends for operand in operands):
        return [Value()] * count
    mixed = next((operand.mixed for operand in operands if operand.mixed), "")
    unknown = next((operand.unknown for operand in operands if operand.unknown), "")
    given = [operand.place for operand in operands]
    places_after = [None] * count
    if not any(operand.depends and operand.place is None for operand in operands):
        try:
            places_after = places(equation, given, found.samples)
        except MixedSamplesError:
            mixed = mixed or describe(equation)
        except UnknownOperationError:
            unknown = unknown or describe(equation)
            places_after = [_guessed(given, shape, found.samples) for shape in shapes(equation.outvars)]
    return [Value(depends=True, place=place, mixed=mixed, unknown=unknown) for place in places_after]


def _guessed(given: Sequence[Place | None], shape: tuple[int, ...], samples: int) -> Place | None:
    """Where samples most likely lie after an operation that is not known; whether they are mixed is then compared."""
    place = next(place for place in given if place is not None)
    fitting = place.axis < len(shape) and shape[place.axis] == place.before * samples * place.after
    return place if fitting else None


def describe(equation) -> str:
    """An operation and the shapes that it takes, in words."""
    taken = ", ".join(str(shape) for shape in shapes(equation.invars))
    return f"'{equation.primitive.name}' of {taken}"


def _rearranged(equation, operand: Value, result: Value) -> Value | None:
    """The result of a cast or a rearrangement of a leaf, of units or of equal numbers; None for another operation."""
    if equation.primitive.name in CASTS and not is_float(equation.outvars[0]):
        return None
    if operand.leaf is not None:
        axes = _axes_after(equation, operand.leaf.axes)
        rearranged = operand.leaf._replace(axes=axes)
        return None if axes is None else result._replace(leaf=rearranged, uniform=operand.uniform)
    if operand.units is not None:
        axes = _axes_after(equation, operand.units.axes)
        return None if axes is None else result._replace(units=operand.units._replace(axes=axes))
    if operand.uniform and equation.primitive.name in (*CASTS, *_REARRANGEMENTS):
        return result._replace(uniform=True, sources=operand.sources)
    if operand.changed and equation.primitive.name in (*CASTS, "reshape", "squeeze", "transpose"):
        return result._replace(sources=operand.sources, changed=operand.changed)
    return None


def _axes_after(equation, axes: Axes) -> Axes | None:
    """The axes of a value after a cast or a rearrangement; None after another operation, or one that cuts a factor."""
    name, (shape,) = equation.primitive.name, shapes(equation.outvars)
    if name in CASTS:
        return axes
    if name == "transpose":
        return tuple(axes[i] for i in equation.params["permutation"])
    if name in ("reshape", "squeeze"):
        return layouts.reshaped(axes, shape)
    if name == "broadcast_in_dim":
        return _broadcast(axes, whole_numbers(equation.params["broadcast_dimensions"]), shape)
    return None


def _broadcast(axes: Axes, dimensions: Sequence[int], shape: tuple[int, ...]) -> Axes:
    found = [layouts.repeated(length) for length in shape]
    for axis, place in zip(axes, dimensions, strict=True):
        if math.prod(factor.size for factor in axis) == shape[place]:
            found[place] = axis
    return tuple(found)


def _otherwise(equation, operands: list[Value], results: list[Value], found: Found, site) -> list[Value]:
    """Any other operation: units may go through it entry by entry; leaves are no longer themselves."""
    name = equation.primitive.name
    entrywise = name in ELEMENTWISE and len(results) == 1
    units = _entrywise_units(operands) if entrywise else None
    depends = any(operand.depends for operand in operands)
    parts = frozenset()
    if name in PARTS and not depends and not any(operand.sources for operand in operands):
        parts = frozenset().union(*(leaves_of(operand) for operand in operands))
    sources = frozenset()
    for operand in operands:
        (found.consume if units is None else found.use)(operand.units)
        if not parts and leaves_of(operand):
            what = _use(equation, depends)
            found.note(operand, what)
            if depends and _holds_jaxpr(equation):  # it may be a kernel there
                found.products += [Product(path, site, None, 1, what, False, 0) for path in leaves_of(operand)]
        if not depends:
            sources |= leaves_of(operand) | operand.sources
    if parts:
        return [result._replace(parts=parts) for result in results]
    uniform = entrywise and all(operand.uniform for operand in operands)
    changed = frozenset() if depends or not entrywise else _changed(equation, operands)
    return [result._replace(units=units, sources=sources, uniform=uniform, changed=changed) for result in results]


def _changed(equation, operands: list[Value]) -> frozenset[str]:
    """The leaves that the result of an entrywise operation is made of: those of its own shape."""
    (shape,), found = shapes(equation.outvars), frozenset()
    for var, operand in zip(equation.invars, operands, strict=True):
        if shape_of(var) == shape and math.prod(shape) > 1 and not _is_repeated(operand):
            found |= leaves_of(operand) | operand.changed
    return found


def _is_repeated(operand: Value) -> bool:
    """Whether a leaf was broadcast along some axis."""
    axes = operand.leaf.axes if operand.leaf else ()
    return any(layouts.is_repeated(axis) and math.prod(factor.size for factor in axis) > 1 for axis in axes)


def _holds_jaxpr(equation) -> bool:
    return any(isinstance(value, core.Jaxpr | core.ClosedJaxpr) for value in equation.params.values())


def _use(equation, depends: bool) -> str:
    """What an operation does with a leaf, in words."""
    name = equation.primitive.name
    if _holds_jaxpr(equation):
        return f"enters '{name}', which can't be looked into"
    if name == "gather":
        return "is looked up in"
    if name in ("add", "sub", "add_any"):
        return "is added" if depends else f"goes through arithmetic ('{name}')"
    if name == "mul" and depends:
        return "multiplies entry by entry"
    return f"enters '{name}'" if depends else f"goes through arithmetic ('{name}')"


def _entrywise_units(operands: list[Value]) -> Units | None:
    """The units that go through an entrywise operation: those of one product, with numbers that are all the same."""
    found = {operand.units._replace(bare=False, bias=None) for operand in operands if operand.units is not None}
    others = [operand for operand in operands if operand.units is None]
    if len(found) != 1 or not all(operand.uniform for operand in others):
        return None
    units = found.pop()
    return units if units.alone else None


def _scan(equation, operands: list[Value], found: Found, within: Within, site) -> list[Value]:
    """A scan: its slices keep their leaves, its carry is followed until nothing changes."""
    consts, carried = equation.params["num_consts"], equation.params["num_carry"]
    body = equation.params["jaxpr"]
    carry = [_carried(operand, found) for operand in operands[consts : consts + carried]]
    slices = [_slice(operand, found) for operand in operands[consts + carried :]]
    carry = _fixed(lambda carry, scratch: walk(body, [*operands[:consts], *carry, *slices], scratch), carry, found)
    inside = within._replace(turns=(*within.turns, equation.params["length"]))
    results = walk(body, [*operands[:consts], *carry, *slices], found, within=inside, site=site)
    left = [_carried(result, found) for result in results]
    stacked = [_unsliced(result) for result in left[carried:]]
    return [*map(_joint, carry, left[:carried]), *stacked]


def _slice(value: Value, found: Found) -> Value:
    """One of the slices that a scan goes over."""
    if value.leaf is not None:
        first, *others = value.leaf.axes
        return Value(leaf=Leaf(value.leaf.path, tuple(others), (*value.leaf.stacked, *first)))
    found.consume(value.units)
    if value.place is not None and value.place.axis == 0:
        return Value(depends=True, mixed=value.mixed, unknown=value.unknown or "'scan' over the samples")
    place = value.place and value.place._replace(axis=value.place.axis - 1)
    return value._replace(place=place, units=None)


def _unsliced(value: Value) -> Value:
    return value._replace(place=value.place and value.place._replace(axis=value.place.axis + 1))


def _carried(value: Value, found: Found) -> Value:
    """What is still known of a value that a loop changes."""
    found.consume(value.units)
    if leaves_of(value):
        found.note(value, "is carried through a loop or a branch")
    sources = value.sources | leaves_of(value)
    return Value(value.depends, value.place, sources=sources, mixed=value.mixed, unknown=value.unknown)


def _fixed(step, carry: list[Value], found: Found) -> list[Value]:
    """What a loop carries, whatever its number of turns."""
    for _ in range(len(carry) + 1):
        scratch = Found(found.samples, found.leaves, list(found.products))
        after = [_carried(result, scratch) for result in step(carry, scratch)[: len(carry)]]
        joint = [_joint(*pair) for pair in zip(carry, after, strict=True)]
        if joint == carry:
            break
        carry = joint
    return carry


def _joint(first: Value, second: Value) -> Value:
    """What is known of a value that is one or the other."""
    depends = first.depends or second.depends
    known = {value.place for value in (first, second) if value.depends}
    mixed, unknown = first.mixed or second.mixed, first.unknown or second.unknown
    if len(known) > 1 and None not in known:
        unknown = unknown or "a loop or a branch that moves the samples to another axis"
    place = known.pop() if len(known) == 1 else None
    return Value(depends, place, sources=first.sources | second.sources, mixed=mixed, unknown=unknown)


def _while(equation, operands: list[Value], found: Found, within: Within, site) -> list[Value]:
    of_condition, of_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    condition, body = operands[:of_condition], operands[of_condition : of_condition + of_body]
    carry = [_carried(operand, found) for operand in operands[of_condition + of_body :]]
    test, turn = equation.params["cond_jaxpr"], equation.params["body_jaxpr"]
    carry = _fixed(lambda carry, scratch: walk(turn, [*body, *carry], scratch), carry, found)
    inside = within._replace(reason=within.reason or "is used inside a while loop")
    (tested,) = walk(test, [*condition, *carry], found, within=inside, site=(*site, 0))
    left = [_carried(result, found) for result in walk(turn, [*body, *carry], found, within=inside, site=(*site, 1))]
    return [_decided(tested, _joint(*pair)) for pair in zip(carry, left, strict=True)]


def _decided(decision: Value, value: Value) -> Value:
    """A value that depends on how a loop or a branch was decided."""
    if not decision.depends:
        return value
    place = value.place if decision.place is not None and not decision.mixed else None
    mixed, unknown = value.mixed or decision.mixed, value.unknown or decision.unknown
    return value._replace(depends=True, place=place, mixed=mixed, unknown=unknown)


def _cond(equation, operands: list[Value], found: Found, within: Within, site) -> list[Value]:
    results: list[Value] = []
    for number, branch in enumerate(equation.params["branches"]):
        inside = within._replace(reason=within.reason or "is used inside a branch")
        found_here = walk(branch, operands[1:], found, within=inside, site=(*site, number))
        found_here = [_carried(result, found) for result in found_here]
        results = [_joint(*p) for p in zip(results, found_here, strict=True)] if number else found_here
    return [_decided(operands[0], value) for value in results]
