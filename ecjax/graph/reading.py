"""The reading of a network: traced once, it tells the role of every leaf."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core
from jaxtyping import PyTree

from ecjax import _trees
from ecjax.graph import layout as layouts
from ecjax.graph.layers import Layer, Layers, chosen
from ecjax.graph.products import CHANGED
from ecjax.graph.roles import walk
from ecjax.graph.samples import Place
from ecjax.graph.values import Added, Found, Leaf, Product, Site, Value

_LOOKED_UP = "is looked up in"


class Reading(NamedTuple):
    """What a network is, as its jaxpr shows it.

    Attributes:
        layers: in order of execution, without excluded ones.
        products: of each layer, by its kernel's path, in order of execution.
        biases: by its path, where each leaf is added as a bias.
        jaxpr: of the network, for params and inputs of these shapes.
        mixed: an operation that takes samples together on the way to the outputs, in words; "" if there is none.
        unknown: an operation on that way of which it is not known whether it does; "" if there is none.
        looked_up: the kernels, by path, that are also looked up in, as an embedding that is the last layer too.

    Example:
        >>> graph.read(lambda params, x: network(params, x - x.mean(0)), params, inputs).mixed
        "'reduce_sum' of (200, 4)"
    """

    layers: Layers
    products: dict[str, list[Product]]
    biases: dict[str, list[Site]]
    jaxpr: core.ClosedJaxpr
    mixed: str
    unknown: str
    looked_up: frozenset[str]


def at_least_two(inputs: Array | np.ndarray) -> Array:
    """The inputs, one sample twice: an axis of length 1 can't be told from others, and no weighted mean changes.

    Example:
        >>> graph.at_least_two(jnp.ones((1, 4))).shape, graph.at_least_two(jnp.ones((3, 4))).shape
        ((2, 4), (3, 4))
    """
    return jnp.repeat(inputs, 2, 0) if inputs.shape[0] == 1 else jnp.asarray(inputs)


def shape_of_two(inputs: Any) -> jax.ShapeDtypeStruct:
    """The shape that ``at_least_two`` gives inputs, of which only the shape and the dtype are looked at."""
    return jax.ShapeDtypeStruct((max(inputs.shape[0], 2), *inputs.shape[1:]), inputs.dtype)


def read(network: Callable, params: PyTree, inputs: Any, *, exclude: Iterable[str] | str = ()) -> Reading:
    """Reads a network.

    Args:
        params: of arrays, or of their shapes.
        inputs: an array of at least two samples, or its shape.
        exclude: patterns of the paths of leaves that are left alone.

    Raises:
        ValueError: a network that does not take these params and inputs, or does not return one array with a row for
            each sample, or several; a pattern that matches nothing.

    Example:
        >>> [layer.kernel for layer in graph.read(network, params, inputs).layers]
        ['Dense_0/kernel', 'Dense_1/kernel']
    """
    leaves = _trees.by_path(params)
    left_alone = chosen(exclude, list(leaves))
    jaxpr = trace(network, params, inputs)
    samples = inputs.shape[0]
    found = Found(samples, leaves)
    arguments = [_value(path, leaf) for path, leaf in leaves.items()]
    (outputs,) = walk(jaxpr, [*arguments, Value(depends=True, place=Place(0))], found)
    found.consume(outputs.units)
    unknown = outputs.unknown or found.random
    if outputs.place not in (None, Place(0)):
        unknown = unknown or "outputs whose first axis is not that of the samples"
    if not outputs.depends:
        raise ValueError("the outputs of the network do not depend on its inputs")
    if outputs.leaf is not None:
        found.note(outputs, "is returned")
    firsts = {}
    for number, product in enumerate(found.products):
        firsts.setdefault(product.path, number)
    firsts = {path: number for path, number in firsts.items() if path not in left_alone}
    layers = [_layer(path, number, found, leaves, left_alone) for path, number in firsts.items()]
    named = {*firsts, *(layer.bias for layer in layers)}
    others = {path: _role(path, left_alone, found) for path in leaves if path not in named}
    products = {path: [product for product in found.products if product.path == path] for path in firsts}
    looked_up = frozenset(path for path in firsts if _LOOKED_UP in found.others.get(path, ()))
    return Reading(Layers(layers, others), products, found.biases, jaxpr, outputs.mixed, unknown, looked_up)


def trace(network: Callable, params: PyTree, inputs: Any) -> core.ClosedJaxpr:
    """The jaxpr of a network, of the leaves of its params in order and its inputs.

    Raises:
        ValueError: a network that does not take these, or does not return one array with a row for each sample, or
            several.
    """
    try:
        jaxpr, shape = jax.make_jaxpr(network, return_shape=True)(params, inputs)
    except Exception as error:
        hint = " (any number of samples must do; it is read with two)" if inputs.shape[0] == 2 else ""
        raise ValueError(
            f"the network does not take inputs of shape {tuple(inputs.shape)}{hint} and dtype {inputs.dtype} with "
            f"these params: {str(error).strip() or type(error).__name__}"
        ) from error
    samples = inputs.shape[0]
    if getattr(shape, "dtype", None) is not None and not jnp.issubdtype(shape.dtype, jnp.floating):
        raise ValueError(
            f"the network returns {shape.dtype}; its outputs must be floating-point numbers, so that they can be "
            "differentiated: logits, not classes"
        )
    if getattr(shape, "ndim", 0) < 2 or shape.shape[0] != samples:
        given = jax.tree.map(lambda leaf: leaf.shape, shape)
        kind = "one of shape" if hasattr(shape, "ndim") else f"a {type(shape).__name__} of shapes"
        raise ValueError(
            f"the network must return one array of shape (samples, outputs), here ({samples}, K), or (samples, "
            f"positions, outputs); "
            f"it returns {kind} {given}"
        )
    return jaxpr


def _value(path: str, leaf: Any) -> Value:
    shape = np.shape(leaf)
    return Value(leaf=Leaf(path, layouts.whole(shape)), uniform=int(np.prod(shape)) == 1)


def _layer(path: str, number: int, found: Found, leaves: dict[str, Any], left_alone: frozenset[str]) -> Layer:
    """One layer, from all that was found about its kernel."""
    numbers = [index for index, product in enumerate(found.products) if product.path == path]
    uses, first = [found.products[index] for index in numbers], found.products[number]
    added = [_biases(index, found, left_alone) for index in numbers]
    unclear = _unclear(path, uses, added, found)
    bias = added[0][0] if added[0] and not unclear else None
    if bias and not jnp.issubdtype(leaves[bias.path].dtype, jnp.floating):
        bias = None
    follows = None
    if first.follows is not None and len(uses) == 1 and found.read.get(first.follows) == [number]:
        follows = found.products[first.follows].path
    of_kernel = None if unclear else first.layout
    alone = len(uses) == 1 and not unclear and path not in found.others and (bias is None or bias.as_it_is)
    return Layer(
        kernel=path,
        bias=bias.path if bias else None,
        shape=tuple(leaves[path].shape),
        axes=of_kernel.axes if of_kernel else (),
        positions=sum(use.positions for use in uses),
        weights=int(np.prod(leaves[path].shape)),
        reason=unclear or next((use.what for use in uses if use.what), ""),
        outer=alone and first.outer,
        once=alone and first.once,
        follows=follows,
        of_kernel=of_kernel,
        of_bias=bias.layout if bias else None,
        window=first.window,
    )


def _biases(number: int, found: Found, left_alone: frozenset[str]) -> list[Added | None]:
    """What is added to a product as its bias, None for where it is used without one; nothing if that is left alone."""
    added = found.added.get(number, [])
    if len(added) > 1 or any(one and found.biased.get(one.within, 0) > 1 for one in added):
        added = [one for one in added if one is None or not one.within]  # the others are not its own alone
    if any(one and one.path in left_alone for one in added):
        return []
    return added if any(added) else []


def _unclear(path: str, uses: list[Product], added: list[list[Added | None]], found: Found) -> str:
    """Why the role of a kernel, or of its bias, is not clear; "" if it is."""
    if any(use.what == CHANGED for use in uses):
        return CHANGED
    if len({use.layout for use in uses}) > 1:
        return f"is used {len(uses)} times, not as the same matrix"
    others = [what for what in found.others.get(path, []) if what != _LOOKED_UP]  # a row that is looked up is a use
    if others or path in found.biases:
        return f"multiplies, and also {[*others, 'is added as a bias'][0]}"
    for biases in added:
        if len(biases) > 1:
            paths = list(dict.fromkeys(bias.path for bias in biases if bias))
            with_both = f"with different biases, {', '.join(map(repr, paths))}"
            both = f"both with and without its bias '{paths[0]}'" if None in biases else with_both
            return f"has a product that is used {both}"
    own = [biases[0] if biases else None for biases in added]
    paths = [bias.path if bias else None for bias in own]
    if len(set(paths)) > 1:
        return (
            f"is used with different biases: {', '.join(repr(one) if one else 'none' for one in dict.fromkeys(paths))}"
        )
    for bias in filter(None, own):
        elsewhere = len(found.biases[bias.path]) > len(uses) or bias.path in found.others
        if elsewhere or any(product.path == bias.path for product in found.products):
            return f"has a bias, '{bias.path}', that is also used elsewhere"
    return ""


def _role(path: str, left_alone: frozenset[str], found: Found) -> str:
    """What a leaf does that is neither a kernel nor the bias of one."""
    if path in left_alone:
        return "is excluded"
    uses = [*found.others.get(path, []), *(["is added as a bias"] if path in found.biases else [])]
    return "; ".join(uses) or "is not used"
