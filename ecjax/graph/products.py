"""Products of kernels, sums of products, and the biases that are added to them."""

import math
from collections.abc import Sequence

from ecjax.graph import layout as layouts
from ecjax.graph.layout import Axes, Axis, Factor, Layout
from ecjax.graph.samples import shape_of, shapes, whole_numbers
from ecjax.graph.values import Added, Found, Leaf, Product, Rows, Site, Units, Value, Within, is_float, leaves_of

CHANGED = "goes through arithmetic before its product"
# The origins of a product's axes: members of a stack, and neurons.
_STACK, _OUT = 0, 1


def multiplied(equation, operands, result: Value, found: Found, within: Within, site) -> Value | None:
    """A product of a leaf with something that depends on the inputs; None for any other product."""
    of_kernel = [leaves_of(operand) or operand.changed for operand in operands]
    sides = [i for i in (0, 1) if of_kernel[i] and operands[1 - i].depends]
    if not sides:
        return None
    side = sides[0]
    kernel, other = operands[side], operands[1 - side]
    leaf, is_product = kernel.leaf, equation.primitive.name == "dot_general"
    what = ""
    if kernel.changed:
        what = CHANGED
    elif leaf is None:
        what = "enters a product only in part, or put together with other leaves"
    elif not (is_product or side == 1):
        what = "is what another value is convolved with"
    elif not all(map(is_float, (equation.invars[side], *equation.outvars))):
        what = "enters a product of whole or complex numbers"
    if leaf is None or what:
        for path in sorted(of_kernel[side]):
            found.products.append(Product(path, site, None, 1, what, False, side))
        found.consume(other.units)
        return result
    describe_product = _matrix_product if is_product else _convolution
    return describe_product(equation, side, leaf, other, result, found, within, site)


def _matrix_product(equation, side, leaf: Leaf, other: Value, result: Value, found: Found, within, site) -> Value:
    contracted, batched = (tuple(map(whole_numbers, pair)) for pair in equation.params["dimension_numbers"])
    own, others = (contracted[side], batched[side]), (contracted[1 - side], batched[1 - side])
    axes, shape = leaf.axes, shape_of(equation.invars[1 - side])
    free = [axis for axis in range(len(axes)) if axis not in (*own[0], *own[1])]
    free_others = [axis for axis in range(len(shape)) if axis not in (*others[0], *others[1])]
    stacked = [axis for axis in own[1] if not layouts.is_repeated(axes[axis])]
    inputs, outputs = (_joined(axes, chosen) for chosen in (own[0], free))
    of_kernel = layouts.layout(
        found.leaves[leaf.path].shape, layouts.merged((*leaf.stacked, *_joined(axes, stacked))), inputs, outputs
    )
    rows = math.prod(shape[axis] for axis in free_others)
    rows *= math.prod(shape[o] for a, o in zip(own[1], others[1], strict=True) if a not in stacked)
    positions = _positions(rows, leaf, found, within)
    what = "has entries that don't enter the product one by one" if of_kernel is None else within.reason
    one_by_one = of_kernel is not None and not of_kernel.stacked and positions == 1 and not within.turns
    first = len(own[1])
    gives = [first + (len(free_others) if side else 0) + i for i in range(len(free))]
    of_product = _axes_of_product(equation, own[1], stacked, free, gives)
    places = _stack_places(own[1], others[1], stacked)
    reads = other.place and Rows(other.place, places[0], others[0])
    samples = result.place and Rows(result.place, places[1], tuple(gives))
    if not (reads and samples) and not within.turns:
        what = what or "has a product in which the samples can't be followed"
    follows = _followed(other.units, [*others[0]], found)
    outer = one_by_one and bool(reads and samples) and not what
    repeats = len(stacked) < len(own[1]) or (reads and reads.samples.axis in others[1])
    product = Product(
        leaf.path,
        site,
        of_kernel,
        positions,
        what,
        outer,
        side,
        kernel=(tuple(stacked), own[0], tuple(free)),
        plain=not repeats and is_float(equation.invars[1 - side]),
        reads=reads,
        gives=samples,
        turns=within.turns,
        sliced=_size(leaf.stacked),
        follows=follows,
    )
    found.products.append(product)
    number = len(found.products) - 1
    if follows is None:
        found.consume(other.units)
    else:
        found.use(other.units)
        found.read.setdefault(follows, []).append(number)
    return result._replace(units=Units(frozenset({number}), of_product, bare=True))


def _positions(rows: int, leaf: Leaf, found: Found, within: Within) -> int:
    """How many rows a sample has in all turns of the scans that do not take the kernel apart."""
    turns = math.prod(within.turns) // max(_size(leaf.stacked), 1)
    return max(rows * max(turns, 1) // found.samples, 1)


def _size(axis: Axis) -> int:
    return math.prod(factor.size for factor in axis)


def _stack_places(batched, others, stacked) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a stack's members in the other operand, and in the product, where batched axes come first."""
    chosen = [batched.index(axis) for axis in stacked]
    return tuple(others[i] for i in chosen), tuple(chosen)


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


def _followed(units: Units | None, contracted: Sequence[int], found: Found) -> int | None:
    """The product whose units, all of them in order, are what is contracted."""
    if units is None or len(units.products) != 1 or not units.alone:
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
    outputs, channels, *window = numbers.rhs_spec
    inputs = [*window, channels]  # so that consecutive inputs are channels
    of_kernel = layouts.layout(
        found.leaves[leaf.path].shape, leaf.stacked, _joined(leaf.axes, inputs), _joined(leaf.axes, [outputs])
    )
    (shape,) = shapes(equation.outvars)
    channel = numbers.out_spec[1]
    rows = shape[numbers.out_spec[0]] * math.prod(shape[axis] for axis in numbers.out_spec[2:])
    positions = _positions(rows, leaf, found, within)
    what = "has entries that don't enter the product one by one" if of_kernel is None else within.reason
    if equation.params["batch_group_count"] > 1:
        what = what or "is convolved in groups of samples"
    product = Product(
        leaf.path,
        site,
        of_kernel,
        positions,
        what,
        False,
        side,
        kernel=((), tuple(inputs), (outputs,)),
        plain=True,
        reads=other.place and Rows(other.place, (), ()),
        gives=result.place and Rows(result.place, (), (channel,)),
        turns=within.turns,
        sliced=_size(leaf.stacked),
        window=math.prod(shape_of(equation.invars[side])[axis] for axis in window),
    )
    found.products.append(product)
    found.consume(other.units)
    axes = [layouts.repeated(length) for length in shape]
    axes[channel] = layouts.merged((Factor(_OUT, 1, shape[channel]),))
    return result._replace(units=Units(frozenset({len(found.products) - 1}), tuple(axes), bare=True))


def summed(equation, operands, result: Value, found: Found, within: Within, site) -> Value | None:
    """A sum with products, or of a product and its bias; a product times a number; None for any other operation."""
    name = equation.primitive.name
    if "jax.custom" in within.reason or name not in _LINEAR:
        return None
    if name == "neg" or name in ("mul", "div"):
        return _scaled(name, operands, result)
    units = [operand.units for operand in operands]
    together = _of_both(name, units[0], units[1], result, found) if all(units) else None
    if together is not None:
        return together
    (side, *others) = [i for i in (0, 1) if units[i] is not None and units[i].bare] or [None]
    if side is None or others:
        return None
    product, bias = units[side], operands[1 - side]
    if leaves_of(bias) or bias.sources:
        return _with_bias(equation, product, bias, 1 - side, result, found, within, site)
    found.consume(bias.units)
    alone = product.alone and bias.uniform and not bias.depends
    if not alone:
        found.part(product)
    negative = name == "sub" and side == 1
    return result._replace(units=product._replace(alone=alone, scaled=product.scaled or negative))


_LINEAR = ("add", "add_any", "sub", "neg", "mul", "div")


def _scaled(name: str, operands, result: Value) -> Value | None:
    """A product with the opposite sign, or times a number."""
    if name == "neg":
        side, number = 0, True
    else:
        side = 0 if operands[0].units is not None or name == "div" else 1
        other = operands[1 - side]
        number = other.uniform and not (other.depends or leaves_of(other) or other.sources)
    product = operands[side].units
    if product is None or not product.bare or not number:
        return None
    return result._replace(units=product._replace(scaled=True))


def _of_both(name: str, first: Units, second: Units, result: Value, found: Found) -> Value | None:
    """A sum of products, or of a product and another with its bias; None for any other."""
    if name == "sub" or first.axes != second.axes or first.products & second.products:
        return None
    if first.bare and second.bare and first.alone and second.alone and not (first.scaled or second.scaled):
        shared = first.shared or second.shared
        return result._replace(units=first._replace(products=first.products | second.products, shared=shared))
    bare, other = sorted((first, second), key=lambda units: (not units.bare, not units.alone))
    if not bare.bare or (other.bare and other.alone):
        return None
    shared = other.bias._replace(within=other.products) if other.bias and not bare.scaled else bare.shared
    found.consume(other)
    found.part(bare)
    return result._replace(units=bare._replace(alone=False, shared=shared))


def _with_bias(equation, product: Units, bias: Value, side: int, result, found: Found, within, site) -> Value | None:
    """A product and its bias, which may be subtracted; None if what is added is none."""
    if bias.leaf is None:
        return None
    (shape,) = shapes(equation.outvars)
    of_bias = _bias_layout(product, bias.leaf, shape, found)
    if of_bias is None:
        return None
    as_it_is = not product.scaled and equation.primitive.name != "sub"
    added = Added(bias.leaf.path, of_bias, as_it_is=as_it_is)
    for number in product.products:
        found.added.setdefault(number, []).append(added)
    found.biases.setdefault(added.path, []).append(Site(site, side, within.turns))
    return result._replace(units=product._replace(bare=False, bias=added, shared=None))


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
