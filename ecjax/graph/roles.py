"""What each leaf of the params does in a network: one walk over the jaxpr that evaluates nothing.

Four things are followed from equation to equation: where the samples lie (``samples``); a leaf that was only cast and
rearranged; the product of a kernel, until its bias is added; and the units of one layer, as long as every entry is a
function of one pre-activation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core

from ecjax.graph import layout as layouts
from ecjax.graph.layout import Axes, Axis, Factor, Layout
from ecjax.graph.samples import (
    ELEMENTWISE,
    MixedSamplesError,
    Place,
    UnknownOperationError,
    places,
    shapes,
    whole_numbers,
)

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
_CASTS = frozenset(
    ["convert_element_type", "copy", "copy_p", "reduce_precision", "sharding_constraint", "device_put", "pvary"]
)
# What takes only some entries of a leaf, or puts several leaves together.
_PARTS = _CASTS | frozenset(
    [
        "slice",
        "dynamic_slice",
        "split",
        "concatenate",
        "pad",
        "rev",
        "gather",
        "squeeze",
        "reshape",
        "broadcast_in_dim",
        "transpose",
    ]
)
# The origins of a product's axes: members of a stack, and neurons.
_STACK, _OUT = 0, 1


class Leaf(NamedTuple):
    """A leaf of the params, cast and rearranged."""

    path: str
    axes: Axes
    stacked: Axis = ()  # the axes that a scan has taken apart


class Units(NamedTuple):
    """What the products of some kernels have become, entry by entry."""

    products: frozenset[int]
    axes: Axes
    bare: bool  # whether it is the product, or a sum of products, itself
    bias: "Added | None" = None  # what was just added to it


class Value(NamedTuple):
    """What is known of a value in the jaxpr."""

    depends: bool = False  # on the inputs
    place: Place | None = None  # of the samples; None also where they were lost
    leaf: Leaf | None = None
    parts: frozenset[str] = frozenset()  # leaves of which parts were cut out or put together
    units: Units | None = None
    uniform: bool = False  # the same number in every entry
    sources: frozenset[str] = frozenset()  # leaves that it was computed from, without the inputs
    mixed: str = ""  # the operation that has taken samples together on the way to it
    unknown: str = ""  # an operation on the way to it of which that is not known


class Product(NamedTuple):
    """One product of a kernel with something that depends on the inputs.

    Attributes:
        path: of the kernel.
        site: which equation it is: its index in the jaxpr, after the indices of the calls that it is in.
        layout: of the kernel; None if its entries don't enter this product one by one.
        positions: how many rows a sample has in it.
        what: "" for a product of matrices; or why it can't be scored.
        side: which operand the kernel is.
        reads: the axes (samples, inputs…) of the other operand, the inputs in the order of the layout.
        gives: the axes (samples, neurons…) of the product, likewise.
        follows: the product whose units are exactly what this one reads.
    """

    path: str
    site: tuple[int, ...]
    layout: Layout | None
    positions: int
    what: str
    side: int
    reads: tuple[int, ...]
    gives: tuple[int, ...]
    follows: int | None


class Added(NamedTuple):
    """A leaf that was added to a product as its bias.

    Attributes:
        path: of the leaf.
        layout: of the leaf.
        within: the products to which it was added before this one was; empty if it was added to this one.
    """

    path: str
    layout: Layout
    within: frozenset[int] = frozenset()


@dataclass
class Found:
    """What the walk has found so far."""

    samples: int
    leaves: dict[str, Any]
    products: list[Product] = field(default_factory=list)
    added: dict[int, list[Added | None]] = field(default_factory=dict)  # by product; None: used without a bias
    read: dict[int, list[int | None]] = field(default_factory=dict)  # by product; None: its units go elsewhere
    biases: dict[str, int] = field(default_factory=dict)  # how many times a leaf was added as a bias
    biased: dict[frozenset[int], int] = field(default_factory=dict)  # how many operations take products with a bias
    others: dict[str, list[str]] = field(default_factory=dict)  # what else each leaf does

    def note(self, value: Value, what: str) -> None:
        """Notes that the leaves in a value are used for something else."""
        for path in (value.leaf.path,) if value.leaf else sorted(value.parts | value.sources):
            if what not in (known := self.others.setdefault(path, [])):
                known.append(what)

    def count(self, units: Units | None) -> None:
        """Notes that an operation takes products whose bias was just added."""
        if units and units.bias:
            self.biased[units.products] = self.biased.get(units.products, 0) + 1

    def consume(self, units: Units | None) -> None:
        """Notes that units, or products, go where they are not followed."""
        self.count(units)
        for product in units.products if units else ():
            self.read.setdefault(product, []).append(None)
            if units.bare:
                self.added.setdefault(product, []).append(None)


def walk(closed, arguments: Sequence[Value], found: Found, *, within: str = "", site: tuple[int, ...] = ()) -> list:
    """What the results of a jaxpr are, given what its arguments are.

    Args:
        closed: a jaxpr, with or without its constants.
        arguments: what is known of each.
        found: what the walk adds to.
        within: what the jaxpr is in that keeps its products from being scored, in words.
        site: the equations that it is called from.
    """
    jaxpr = getattr(closed, "jaxpr", closed)
    known = {var: Value(uniform=math.prod(var.aval.shape) == 1) for var in jaxpr.constvars}
    known |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(var) -> Value:
        return Value(uniform=True) if isinstance(var, core.Literal) else known[var]

    for index, equation in enumerate(jaxpr.eqns):
        operands = [read(var) for var in equation.invars]
        here = (*site, index)
        results = _equation(equation, operands, found, within, here)
        known |= dict(zip(equation.outvars, results, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _equation(equation, operands: list[Value], found: Found, within: str, site: tuple[int, ...]) -> list[Value]:
    name = equation.primitive.name
    if name in CALLS:
        inside = f"is used inside {_CUSTOM[name]}, whose derivative is its own" if name in _CUSTOM else within
        results = walk(equation.params[CALLS[name]], operands, found, within=inside, site=site)
        return [_after_custom(result, _CUSTOM[name], found) for result in results] if name in _CUSTOM else results
    if name == "scan":
        return _scan(equation, operands, found, site)
    if name == "while":
        return _while(equation, operands, found, site)
    if name == "cond":
        return _cond(equation, operands, found, site)
    results = _samples(equation, operands, found)
    if name == "dot_general" or name == "conv_general_dilated":
        multiplied = _multiplied(equation, operands, results[0], found, within, site)
        if multiplied is not None:
            return [multiplied]
    if name in ("add", "add_any"):
        summed = _summed(equation, operands, results[0], found, within)
        if summed is not None:
            return [summed]
    if len(operands) == 1 and len(results) == 1:
        rearranged = _rearranged(equation, operands[0], results[0])
        if rearranged is not None:
            return [rearranged]
    return _otherwise(equation, operands, results, found)


def _after_custom(value: Value, name: str, found: Found) -> Value:
    """What comes out of a function with a derivative of its own: no leaf, and no bare product, whatever it computes."""
    if _leaves(value):
        found.note(value, f"goes through {name}")
    units = value.units
    if units is not None and units.bare:
        for product in units.products:
            found.added.setdefault(product, []).append(None)
    found.count(units)
    units = units and units._replace(bare=False, bias=None)
    return value._replace(leaf=None, parts=frozenset(), units=units, sources=value.sources | _leaves(value))


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
    """The result of a cast or a rearrangement of a leaf, or of units; None for another operation."""
    name = equation.primitive.name
    (shape,) = shapes(equation.outvars)
    uniform = operand.uniform and name in (*_CASTS, "broadcast_in_dim", "reshape", "squeeze", "transpose")
    if name in _CASTS and not _is_float(equation.outvars[0]):
        return None
    change = None
    if name in _CASTS:
        change = lambda axes: axes  # noqa: E731
    elif name == "transpose":
        change = lambda axes: tuple(axes[i] for i in equation.params["permutation"])  # noqa: E731
    elif name in ("reshape", "squeeze", "expand_dims"):
        change = lambda axes: layouts.reshaped(axes, shape)  # noqa: E731
    elif name == "broadcast_in_dim":
        change = lambda axes: _broadcast(axes, whole_numbers(equation.params["broadcast_dimensions"]), shape)  # noqa: E731
    if change is None:
        return None
    if operand.leaf is not None:
        axes = change(operand.leaf.axes)
        if axes is None:
            return None
        return result._replace(leaf=operand.leaf._replace(axes=axes), uniform=uniform)
    if operand.units is not None:
        axes = change(operand.units.axes)
        return None if axes is None else result._replace(units=operand.units._replace(axes=axes))
    if uniform:
        return result._replace(uniform=True, sources=operand.sources)
    return None


def _is_float(var) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.floating)


def _broadcast(axes: Axes, dimensions: Sequence[int], shape: tuple[int, ...]) -> Axes:
    found = [layouts.repeated(length) for length in shape]
    for axis, place in zip(axes, dimensions, strict=True):
        if math.prod(factor.size for factor in axis) == shape[place]:
            found[place] = axis
    return tuple(found)


def _otherwise(equation, operands: list[Value], results: list[Value], found: Found) -> list[Value]:
    """Any other operation: units may go through it entry by entry; leaves are no longer themselves."""
    name = equation.primitive.name
    entrywise = name in ELEMENTWISE and len(results) == 1
    units = _entrywise_units(operands) if entrywise else None
    depends = any(operand.depends for operand in operands)
    parts = frozenset()
    if name in _PARTS and not depends and not any(operand.sources for operand in operands):
        parts = frozenset().union(*(_leaves(operand) for operand in operands))
    sources = frozenset()
    for operand in operands:
        if units is None:
            found.consume(operand.units)
        else:
            found.count(operand.units)
            for product in operand.units.products if operand.units and operand.units.bare else ():
                found.added.setdefault(product, []).append(None)
        if not parts and _leaves(operand):
            found.note(operand, _use(equation, depends))
        if not depends:
            sources |= _leaves(operand) | operand.sources
    if parts:
        return [result._replace(parts=parts) for result in results]
    uniform = entrywise and all(operand.uniform for operand in operands)
    return [result._replace(units=units, sources=sources, uniform=uniform) for result in results]


def _leaves(value: Value) -> frozenset[str]:
    return frozenset({value.leaf.path}) if value.leaf else value.parts


def _use(equation, depends: bool) -> str:
    """What an operation does with a leaf, in words."""
    name = equation.primitive.name
    if any(isinstance(value, core.Jaxpr | core.ClosedJaxpr) for value in equation.params.values()):
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
    return found.pop()


def _multiplied(equation, operands, result: Value, found: Found, within: str, site) -> Value | None:
    """A product of a leaf with something that depends on the inputs; None for any other product."""
    sides = [i for i, operand in enumerate(operands) if _leaves(operand) and operands[1 - i].depends]
    if not sides:
        return None
    side = sides[0]
    kernel, other = operands[side], operands[1 - side]
    is_product = equation.primitive.name == "dot_general"
    what = ""
    if kernel.leaf is None:
        what = "enters a product only in part, or put together with other leaves"
    elif not (is_product or side == 1):
        what = "is what another value is convolved with"
    elif not all(map(_is_float, (equation.invars[side], *equation.outvars))):
        what = "enters a product of whole or complex numbers"
    if what:
        found.products += [Product(path, site, None, 1, what, side, (), (), None) for path in sorted(_leaves(kernel))]
        found.consume(other.units)
        return result
    describe_product = _matrix_product if is_product else _convolution
    return describe_product(equation, side, kernel.leaf, other, result, found, within, site)


def _matrix_product(equation, side, leaf: Leaf, other: Value, result: Value, found: Found, within, site) -> Value:
    contracted, batched = (tuple(map(whole_numbers, pair)) for pair in equation.params["dimension_numbers"])
    own, others = (contracted[side], batched[side]), (contracted[1 - side], batched[1 - side])
    axes, shape = leaf.axes, equation.invars[1 - side].aval.shape
    free = [axis for axis in range(len(axes)) if axis not in (*own[0], *own[1])]
    free_others = [axis for axis in range(len(shape)) if axis not in (*others[0], *others[1])]
    stacked = [axis for axis in own[1] if not layouts.is_repeated(axes[axis])]
    inputs, outputs = (_joined(axes, chosen) for chosen in (own[0], free))
    of_kernel = layouts.layout(
        found.leaves[leaf.path].shape, layouts.merged((*leaf.stacked, *_joined(axes, stacked))), inputs, outputs
    )
    rows = math.prod(shape[axis] for axis in free_others)
    rows *= math.prod(shape[o] for a, o in zip(own[1], others[1], strict=True) if a not in stacked)
    positions = max(rows // found.samples, 1)
    what = within
    if of_kernel is None:
        what = "has entries that don't enter the product one by one"
    elif of_kernel.stacked and not within:
        what = "is a stack of kernels"
    elif positions > 1 and not within:
        what = f"is applied at {positions} positions of each sample"

    first = len(own[1])
    gives = [first + (len(free_others) if side else 0) + i for i in range(len(free))]
    of_product = _axes_of_product(equation, own[1], stacked, free, gives)
    reads, gives_samples = _samples_first(other.place, others[0], result.place, gives)
    follows = _followed(other.units, [*others[0]], found)
    found.products.append(Product(leaf.path, site, of_kernel, positions, what, side, reads, gives_samples, follows))
    number = len(found.products) - 1
    if follows is not None:
        found.count(other.units)
        found.read.setdefault(follows, []).append(number)
        if other.units.bare:
            found.added.setdefault(follows, []).append(None)
    else:
        found.consume(other.units)
    return result._replace(units=Units(frozenset({number}), of_product, bare=True))


def _joined(axes: Axes, chosen: Sequence[int]) -> Axis:
    return layouts.merged([factor for axis in chosen for factor in axes[axis]])


def _axes_of_product(equation, batched, stacked, free, gives) -> Axes:
    """The axes of a product: which are the neurons, which the members of a stack, and which come from the inputs."""
    (shape,) = shapes(equation.outvars)
    found = [layouts.repeated(length) for length in shape]
    for origin, places_after, chosen in (
        (_STACK, range(len(batched)), [axis if axis in stacked else None for axis in batched]),
        (_OUT, gives, free),
    ):
        stride = 1
        for place, axis in reversed(list(zip(places_after, chosen, strict=True))):
            if axis is not None:
                found[place] = layouts.merged((Factor(origin, stride, shape[place]),))
                stride *= shape[place]
    return tuple(found)


def _samples_first(of_inputs: Place | None, contracted, of_product: Place | None, gives):
    """The axes of a product's operand and of its result, those of the samples before all others."""
    if of_inputs is None or of_product is None:
        return (), ()
    return (of_inputs.axis, *contracted), (of_product.axis, *gives)


def _followed(units: Units | None, contracted: Sequence[int], found: Found) -> int | None:
    """The product whose units, all of them in order, are what is contracted."""
    if units is None or len(units.products) != 1:
        return None
    (product,) = units.products
    of_kernel = found.products[product].layout
    joined = _joined(units.axes, contracted)
    if of_kernel is None or of_kernel.stacked:
        return None
    neurons = of_kernel.sizes[2]
    return product if joined == layouts.merged((Factor(_OUT, 1, neurons),)) else None


def _convolution(equation, side, leaf: Leaf, other: Value, result: Value, found: Found, within, site) -> Value:
    numbers = equation.params["dimension_numbers"]
    outputs, *inputs = numbers.rhs_spec
    of_kernel = layouts.layout(
        found.leaves[leaf.path].shape, leaf.stacked, _joined(leaf.axes, inputs), _joined(leaf.axes, [outputs])
    )
    (shape,) = shapes(equation.outvars)
    channel = numbers.out_spec[1]
    positions = math.prod(shape[axis] for axis in numbers.out_spec[2:])
    what = within or f"is convolved, {positions} positions a sample"
    found.products.append(Product(leaf.path, site, of_kernel, positions, what, side, (), (), None))
    found.consume(other.units)
    axes = [layouts.repeated(length) for length in shape]
    axes[channel] = layouts.merged((Factor(_OUT, 1, shape[channel]),))
    return result._replace(units=Units(frozenset({len(found.products) - 1}), tuple(axes), bare=True))


def _summed(equation, operands, result: Value, found: Found, within: str) -> Value | None:
    """A sum of products, or of a product and its bias; None for any other sum."""
    if "jax.custom" in within:
        return None
    (shape,) = shapes(equation.outvars)
    units = [operand.units for operand in operands]
    if all(units) and units[0].axes == units[1].axes and not units[0].products & units[1].products:
        together = units[0].products | units[1].products
        if all(u.bare for u in units):
            return result._replace(units=units[0]._replace(products=together))
        bare, biased = sorted(units, key=lambda u: not u.bare)
        if bare.bare and biased.bias:
            found.count(biased)
            added = biased.bias._replace(within=biased.products)
            for number in bare.products:
                found.added.setdefault(number, []).append(added)
            return result._replace(units=biased._replace(products=together))
    side = 0 if units[0] is not None else 1
    product, bias = units[side], operands[1 - side]
    if product is None or not product.bare or bias.leaf is None:
        return None
    of_bias = _bias_layout(product, bias.leaf, shape, found)
    if of_bias is None:
        return None
    added = Added(bias.leaf.path, of_bias)
    for number in product.products:
        found.added.setdefault(number, []).append(added)
    found.biases[added.path] = found.biases.get(added.path, 0) + 1
    return result._replace(units=product._replace(bare=False, bias=added))


def _bias_layout(product: Units, bias: Leaf, shape: tuple[int, ...], found: Found) -> Layout | None:
    """The layout of a leaf that has one number for each neuron of a product; None if it has not."""
    parts: dict[int, list[tuple[int, Factor]]] = {_STACK: [], _OUT: []}
    axes = bias.axes or ((),) * len(shape)  # a scalar is added as it is
    for length, of_product, of_bias in zip(shape, product.axes, axes, strict=True):
        size = math.prod(factor.size for factor in of_bias)
        pairs = layouts.pairs(of_product, of_bias if size == length else layouts.repeated(length))
        if pairs is None:
            return None
        for neurons, entries in pairs:
            if (neurons.of is None) != (entries.of is None):
                return None
            if neurons.of is not None:
                parts[neurons.of].append((neurons.stride, entries))
    stacked, outputs = (
        layouts.merged([entries for _, entries in sorted(parts[origin], key=lambda pair: -pair[0])])
        for origin in (_STACK, _OUT)
    )
    of_bias = layouts.layout(found.leaves[bias.path].shape, (*bias.stacked, *stacked), (), outputs)
    for number in product.products:
        of_kernel = found.products[number].layout
        if of_kernel is None or of_bias is None or of_kernel.sizes[::2] != of_bias.sizes[::2]:
            return None
    return of_bias


def _scan(equation, operands: list[Value], found: Found, site) -> list[Value]:
    """A scan: its slices keep their leaves, its carry is followed until nothing changes."""
    consts, carried = equation.params["num_consts"], equation.params["num_carry"]
    body = equation.params["jaxpr"]
    carry = [_carried(operand, found) for operand in operands[consts : consts + carried]]
    slices = [_slice(operand, found) for operand in operands[consts + carried :]]
    carry = _fixed(lambda carry, scratch: walk(body, [*operands[:consts], *carry, *slices], scratch), carry, found)
    inside = "is used inside a scan"
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
    if _leaves(value):
        found.note(value, "is carried through a loop or a branch")
    sources = value.sources | _leaves(value)
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


def _while(equation, operands: list[Value], found: Found, site) -> list[Value]:
    of_condition, of_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    condition, body = operands[:of_condition], operands[of_condition : of_condition + of_body]
    carry = [_carried(operand, found) for operand in operands[of_condition + of_body :]]
    test, turn = equation.params["cond_jaxpr"], equation.params["body_jaxpr"]
    carry = _fixed(lambda carry, scratch: walk(turn, [*body, *carry], scratch), carry, found)
    inside = "is used inside a while loop"
    walk(test, [*condition, *carry], found, within=inside, site=(*site, 0))
    left = [_carried(result, found) for result in walk(turn, [*body, *carry], found, within=inside, site=(*site, 1))]
    return [_joint(*pair) for pair in zip(carry, left, strict=True)]


def _cond(equation, operands: list[Value], found: Found, site) -> list[Value]:
    results = None
    for number, branch in enumerate(equation.params["branches"]):
        inside = "is used inside a branch"
        found_here = walk(branch, operands[1:], found, within=inside, site=(*site, number))
        found_here = [_carried(result, found) for result in found_here]
        results = found_here if results is None else [_joint(*p) for p in zip(results, found_here, strict=True)]
    if operands[0].depends:  # a scalar that depends on the inputs has taken the samples together
        mixed, unknown = operands[0].mixed, operands[0].unknown
        results = [v._replace(depends=True, place=None, mixed=mixed, unknown=unknown) for v in results]
    return results
