"""Convolutions in the order that XLA compiles well wherever they are, and the gradient of a kernel from patches.

Inside a loop XLA's CPU compiler leaves the axes of a convolution as they are, and has a fast way only where channels
come last: the convolutions that a transposition makes are ten times slower there (jaxlib 0.10.2). The values are the
same.
"""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core

from ecjax.graph.evaluate import run

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
    inputs, kernel, outputs = (_last(spec) for spec in numbers)
    kernel = (*kernel[1:], kernel[0])  # (window…, channels, neurons), of (neurons, window…, channels)
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
    return math.prod(equation.invars[1].aval.shape[axis] for axis in window) <= _MOST_PATCHES


def kernel_gradient(equation, inputs: Array, slopes: Array, shape: tuple[int, ...]) -> Array:
    """The gradient with respect to a convolution's kernel: patches of its inputs times the slopes, one product.

    Args:
        equation: a convolution that ``has_patches``.
        inputs: what is convolved.
        slopes: the gradients with respect to the convolution's results.
        shape: of the kernel.
    """
    numbers, params = equation.params["dimension_numbers"], equation.params
    inputs, slopes = inputs.transpose(_last(numbers.lhs_spec)), slopes.transpose(_last(numbers.out_spec))
    window = [shape[axis] for axis in numbers.rhs_spec[2:]]
    padding = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(params["padding"], params["lhs_dilation"], strict=True)
    ]
    padded = lax.pad(inputs, jnp.zeros((), inputs.dtype), [(0, 0, 0), *padding, (0, 0, 0)])
    places, strides = slopes.shape[1:-1], params["window_strides"]

    def patch(offset: tuple[int, ...]) -> Array:
        starts = [place * dilation for place, dilation in zip(offset, params["rhs_dilation"], strict=True)]
        ends = [start + (count - 1) * stride + 1 for start, count, stride in zip(starts, places, strides, strict=True)]
        return lax.slice(padded, (0, *starts, 0), (len(padded), *ends, padded.shape[-1]), (1, *strides, 1))

    patches = jnp.stack([patch(offset) for offset in itertools.product(*map(range, window))])
    groups = params["feature_group_count"]
    patches = patches.reshape(len(patches), -1, groups, patches.shape[-1] // groups)
    slopes = slopes.reshape(-1, groups, slopes.shape[-1] // groups)
    found = jnp.einsum("wpgc,pgo->wcgo", patches, slopes).reshape(*window, patches.shape[-1], -1)
    last = _last(numbers.rhs_spec)
    return found.transpose(np.argsort((*last[1:], last[0])))
