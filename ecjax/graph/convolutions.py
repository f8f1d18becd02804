"""Convolutions in a form that XLA compiles well inside loops too, and the gradient of a kernel from patches.

Inside a loop XLA's CPU compiler leaves the axes of a convolution as they are, and has a fast way only where channels
come last: the convolutions that a transposition makes are ten times slower there (jaxlib 0.10.2).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core
from jaxtyping import PyTree

from ecjax.graph.evaluate import evaluate, run
from ecjax.graph.roles import CALLS
from ecjax.graph.samples import shape_of

CONVOLUTION = "conv_general_dilated"
_MOST_PATCHES = 64  # each is a slice of its own; a window of more is convolved


def channels_last(equation, operands: list[Array]) -> list[Array]:
    """The results of an equation; those of a convolution with all axes moved to (samples, window…, channels).

    Args:
        equation: of a jaxpr; any but a convolution is run as it is.
        operands: its own.
    """
    if equation.primitive.name != CONVOLUTION or equation.params["batch_group_count"] > 1:
        return run(equation, operands)
    numbers, rank = equation.params["dimension_numbers"], operands[0].ndim
    inputs, kernel, outputs = _last(numbers.lhs_spec), _neurons_last(numbers.rhs_spec), _last(numbers.out_spec)
    moved = operands[0].transpose(inputs), operands[1].transpose(kernel)
    samples_first, window_first = (0, rank - 1, *range(1, rank - 1)), (rank - 1, rank - 2, *range(rank - 2))
    params = dict(equation.params)
    params["dimension_numbers"] = lax.ConvDimensionNumbers(samples_first, window_first, samples_first)
    return [equation.primitive.bind(*moved, **params).transpose(np.argsort(outputs))]


def _last(spec: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of (samples or neurons, channels, window…) with the channels at the end."""
    return (spec[0], *spec[2:], spec[1])


def all_channels_last(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The function of one array with all its convolutions in that order."""

    def call(array: Array) -> Array:
        jaxpr = jax.make_jaxpr(function)(array)
        values = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)) | {jaxpr.jaxpr.invars[0]: array}
        for equation in jaxpr.eqns:
            operands = [var.val if isinstance(var, core.Literal) else values[var] for var in equation.invars]
            values |= dict(zip(equation.outvars, channels_last(equation, operands), strict=True))
        return values[jaxpr.jaxpr.outvars[0]]

    return call


def has_patches(equation) -> bool:
    """Whether an equation is a convolution whose window is small enough for patches."""
    if equation.primitive.name != CONVOLUTION or equation.params["batch_group_count"] > 1:
        return False
    window = equation.params["dimension_numbers"].rhs_spec[2:]
    return math.prod(shape_of(equation.invars[1])[axis] for axis in window) <= _MOST_PATCHES


def kernel_gradient(equation, inputs: Array, slopes: Array, shape: tuple[int, ...]) -> Array:
    """The gradient with respect to a convolution's kernel: patches of its inputs times the slopes, one product.

    Args:
        equation: a convolution that ``has_patches``.
        inputs: what is convolved.
        slopes: the gradients with respect to the convolution's results.
        shape: of the kernel.
    """
    numbers = equation.params["dimension_numbers"]
    slopes = slopes.transpose(_last(numbers.out_spec))
    patches = _patches(equation, inputs, slopes.shape[1:-1], shape)
    slopes = slopes.reshape(*slopes.shape[:-1], patches.shape[-3], -1)
    found = jnp.einsum("...gwc,...go->wcgo", patches, slopes)
    window = [shape[axis] for axis in numbers.rhs_spec[2:]]
    found = found.reshape(*window, patches.shape[-1], -1)
    return found.transpose(np.argsort(_neurons_last(numbers.rhs_spec)))


def _neurons_last(spec: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a kernel as (window…, channels, neurons)."""
    return (*spec[2:], spec[1], spec[0])


def _patches(equation, inputs: Array, places: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """What the kernel is multiplied with: (samples, places…, groups, entries of the window, channels of a group).

    Args:
        equation: a convolution.
        inputs: what is convolved.
        places: how many results there are along each axis of the window.
        shape: of the kernel.
    """
    numbers, params = equation.params["dimension_numbers"], equation.params
    inputs = inputs.transpose(_last(numbers.lhs_spec))
    edges = zip(params["padding"], params["lhs_dilation"], strict=True)
    padding = [(0, 0, 0), *((low, high, dilation - 1) for (low, high), dilation in edges), (0, 0, 0)]
    padded, strides = lax.pad(inputs, jnp.zeros((), inputs.dtype), padding), params["window_strides"]

    def patch(offset: tuple[int, ...]) -> Array:
        starts = [place * dilation for place, dilation in zip(offset, params["rhs_dilation"], strict=True)]
        ends = [start + (count - 1) * stride + 1 for start, count, stride in zip(starts, places, strides, strict=True)]
        found = lax.slice(padded, (0, *starts, 0), (len(padded), *ends, padded.shape[-1]), (1, *strides, 1))
        return found.reshape(*found.shape[:-1], params["feature_group_count"], -1)

    window = [shape[axis] for axis in numbers.rhs_spec[2:]]
    return jnp.stack([patch(offset) for offset in itertools.product(*map(range, window))], -2)


def _by_patches(equation, operands: list[Array], *_) -> tuple[list[Array], dict]:
    """A convolution as patches of its inputs times its kernel; every other is run as it is."""
    if not has_patches(equation):
        return run(equation, operands), {}
    inputs, kernel = operands
    numbers, (result,) = equation.params["dimension_numbers"], equation.outvars
    order = _last(numbers.out_spec)
    places = tuple(shape_of(result)[axis] for axis in order[1:-1])
    patches = _patches(equation, inputs, places, kernel.shape)
    matrices = kernel.transpose(_neurons_last(numbers.rhs_spec))
    matrices = matrices.reshape(*patches.shape[-2:], patches.shape[-3], -1)
    found = jnp.einsum("...gwc,wcgo->...go", patches, matrices)
    return [found.reshape(*found.shape[:-2], -1).transpose(np.argsort(order)).astype(result.aval.dtype)], {}


def in_loops(network: Callable) -> Callable:
    """The network as it is fast inside a loop, also when it is differentiated there; the same up to rounding.

    On CPUs its convolutions become products with patches of their inputs; elsewhere it is the network itself.
    """
    return _ByPatches(network) if jax.default_backend() == "cpu" else network


@dataclasses.dataclass(frozen=True)
class _ByPatches:
    network: Callable

    def __call__(self, params: PyTree, inputs: PyTree) -> PyTree:
        jaxpr, shapes = jax.make_jaxpr(self.network, return_shape=True)(params, inputs)
        sites = frozenset(_convolutions(jaxpr))
        if not sites:
            return self.network(params, inputs)
        outputs, _ = evaluate(jaxpr, jax.tree.leaves((params, inputs)), sites, _by_patches, {})
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


def _convolutions(closed, site: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """The places of all convolutions but those in functions with a derivative of their own."""
    for index, equation in enumerate(getattr(closed, "jaxpr", closed).eqns):
        name, here = equation.primitive.name, (*site, index)
        if name == CONVOLUTION:
            yield here
        elif name == "scan":
            yield from _convolutions(equation.params["jaxpr"], here)
        elif name in CALLS and "custom" not in name:
            yield from _convolutions(equation.params[CALLS[name]], here)
