"""How many floating-point operations a network takes, counted from its jaxpr.

XLA's own cost analysis counts the body of a scan once, and no part of a library call; here a body counts as often as it
runs. A multiply-add is two operations.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ecjax import _trees
from ecjax._types import Inputs, Network, Params
from ecjax.graph.roles import CALLS, PARTS
from ecjax.graph.samples import ELEMENTWISE

Shape = Sequence[int]
_MOVES = PARTS | frozenset(
    """
    after_all bitcast_convert_type complex create_token dynamic_update_slice empty expand_dims imag iota random_bits
    random_fold_in random_seed random_split random_unwrap random_wrap real rng_bit_generator scatter stop_gradient
    shard_alike threefry2x32 optimization_barrier
    """.split()  # noqa: SIM905
)
_OVER_ENTRIES = frozenset(
    """
    argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce reduce_and reduce_max reduce_min reduce_or
    reduce_prod reduce_sum reduce_xor
    """.split()  # noqa: SIM905
)


class Flops(NamedTuple):
    """Floating-point operations.

    Attributes:
        products: of dense products and convolutions, two for each multiply-add.
        others: of everything else: one for each entry that an operation computes, or that a sum takes up.
        unknown: the operations that take more than was counted, by name: loops whose turns depend on values, of which
            one turn is counted, and operations that are not known here. With any, the numbers are the least there are.

    Example:
        >>> flops = graph.Flops(products=96, others=20)
        >>> flops.total, str(flops), str(flops._replace(unknown=("while",)))
        (116, '116', 'at least 116')
    """

    products: int = 0
    others: int = 0
    unknown: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """All of them."""
        return self.products + self.others

    def __str__(self) -> str:
        """The total, and whether it is only the least."""
        return f"{'at least ' if self.unknown else ''}{self.total:,}"


def count_flops(network: Network, params: Params, inputs: Inputs | jax.ShapeDtypeStruct) -> Flops:
    """Counts the operations of one call of a network; nothing is computed.

    Dense products and convolutions are counted exactly: ``2 · results · terms of each sum``, without the products with
    padded zeros, and four times as many for complex numbers. Elementwise operations count one for each entry, sums one
    for each entry that they take up, an FFT ``5 n log₂ n``, half of it for real numbers. Moving numbers is free, and so
    is arithmetic of whole numbers. The body of a scan counts as often as it runs, of several branches the one that
    takes most.

    Args:
        params: its parameters, or their shapes.
        inputs: samples along the first axis, or their shape; give one sample for the operations of one.

    Example:
        >>> one = jax.ShapeDtypeStruct((1, 4), jnp.float32)
        >>> graph.count_flops(network, params, one)  # 2 · (4 · 8 + 8 · 2), and 8 + 2 biases, 8 of relu
        Flops(products=96, others=18, unknown=())
    """
    network, params, _ = _trees.split(network, params)
    return of_jaxpr(jax.make_jaxpr(network)(params, inputs))


def of_jaxpr(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> Flops:
    """Counts the operations of a jaxpr; equations whose results nothing uses are left out."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    used, found = set(_variables(jaxpr.outvars)), Flops()
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not used.isdisjoint(equation.outvars):
            used.update(_variables(equation.invars))
            found = _added(_equation(equation), found)
    return found


def of_equation(equation: core.JaxprEqn, operands: Sequence[Shape], results: Sequence[Shape]) -> Flops:
    """Counts the operations of one equation that holds no jaxpr, for operands and results of these shapes.

    With the shapes of ``graph.cut.Cut`` these are the operations of the equation after units have gone.
    """
    name = equation.primitive.name
    kinds = [getattr(variable.aval, "dtype", np.dtype(bool)) for variable in (*equation.invars, *equation.outvars)]
    if name in _PRODUCTS:
        complexity = 4 if any(jnp.issubdtype(kind, jnp.complexfloating) for kind in kinds) else 1
        return Flops(products=2 * complexity * _PRODUCTS[name](equation, operands, results))
    if name in _MOVES or not any(jnp.issubdtype(kind, jnp.inexact) for kind in kinds):
        return Flops()
    if name in ELEMENTWISE:
        return Flops(others=sum(map(math.prod, results)))
    if name in _OVER_ENTRIES:
        return Flops(others=math.prod(operands[0]))
    if name in _OTHERS:
        return Flops(others=_OTHERS[name](equation, operands, results))
    return Flops(others=max(map(math.prod, (*operands, *results)), default=0), unknown=(name,))


def _variables(variables: Sequence) -> list[core.Var]:
    return [variable for variable in variables if not isinstance(variable, core.Literal)]


def _added(first: Flops, second: Flops) -> Flops:
    unknown = tuple(dict.fromkeys((*first.unknown, *second.unknown)))
    return Flops(first.products + second.products, first.others + second.others, unknown)


def _equation(equation: core.JaxprEqn) -> Flops:
    name = equation.primitive.name
    if name in CALLS:
        return of_jaxpr(equation.params[CALLS[name]])
    if name == "scan":
        turn, turns = of_jaxpr(equation.params["jaxpr"]), equation.params["length"]
        return Flops(turns * turn.products, turns * turn.others, turn.unknown)
    if name == "cond":
        return max(map(of_jaxpr, equation.params["branches"]), key=lambda flops: flops.total)
    inside = [value for value in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr) if _is_jaxpr(value)]
    if inside and name not in _MOVES | _OVER_ENTRIES | _OTHERS.keys():
        return functools.reduce(_added, map(of_jaxpr, inside), Flops(unknown=(name,)))
    shapes = lambda variables: [getattr(variable.aval, "shape", ()) for variable in variables]  # noqa: E731
    return of_equation(equation, shapes(equation.invars), shapes(equation.outvars))


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _dense(equation, operands, results) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    return math.prod(results[0]) * math.prod(operands[0][axis] for axis in contracted)


def _ragged(equation, operands, results) -> int:
    """Each row is multiplied with the kernel of its own group alone."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    terms, groups = math.prod(operands[0][axis] for axis in contracted), operands[2][-1]
    over_rows = set(numbers.lhs_ragged_dimensions) <= set(contracted)
    return math.prod(results[0]) * terms // (groups if over_rows else 1)


def _convolution(equation, operands, results) -> int:
    """Multiply-adds with entries of the input: not with its padding, nor with the zeros that dilation puts between."""
    options, (inputs, kernel), outputs = equation.params, operands, results[0]
    numbers = options["dimension_numbers"]
    rows = outputs[numbers.out_spec[0]] * outputs[numbers.out_spec[1]]
    pairs = [
        _pairs(inputs[of_inputs], kernel[of_kernel], outputs[of_outputs], *how)
        for of_inputs, of_kernel, of_outputs, *how in zip(
            numbers.lhs_spec[2:],
            numbers.rhs_spec[2:],
            numbers.out_spec[2:],
            options["window_strides"],
            [low for low, _ in options["padding"]],
            options["lhs_dilation"],
            options["rhs_dilation"],
            strict=True,
        )
    ]
    return rows * kernel[numbers.rhs_spec[1]] * math.prod(pairs)


def _pairs(entries: int, window: int, results: int, stride: int, low: int, spread: int, dilation: int) -> int:
    """How many pairs of a result and a place in its window meet an entry, along one axis.

    Place k of result o meets ``o · stride + k · dilation − low``, where every spread-th number is that of an entry.
    """
    first = np.arange(window, dtype=np.int64) * dilation - low
    least = np.maximum(-(first // stride), 0)
    most = np.minimum(((entries - 1) * spread - first) // stride, results - 1)
    common = math.gcd(stride, spread)
    period = spread // common
    # o · stride + first is a multiple of spread for one o of each period, if for any.
    start = -(first // common) * pow(stride // common, -1, period) % period
    count = (most - start) // period - (least - 1 - start) // period
    return int(np.where((first % common == 0) & (most >= least), count, 0).sum())


def _windows(equation, _operands, results) -> int:
    return math.prod(results[0]) * math.prod(equation.params["window_dimensions"])


def _fourier(equation, operands, results) -> int:
    kind = equation.params["fft_type"].name
    entries = math.prod(results[0] if kind == "IRFFT" else operands[0])  # of the real side, if there is one
    each = 5 * math.log2(max(math.prod(equation.params["fft_lengths"]), 1))
    return round(entries * each / (2 if kind in ("RFFT", "IRFFT") else 1))


def _updates(_equation, operands, _results) -> int:
    return math.prod(operands[2])


_PRODUCTS: dict[str, Callable] = {
    "dot_general": _dense,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _convolution,
}
_OTHERS: dict[str, Callable] = {
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum", "reduce_window"), _windows),
    "fft": _fourier,
    **dict.fromkeys(("scatter-add", "scatter-mul", "scatter-min", "scatter-max", "scatter-sub"), _updates),
    **dict.fromkeys(("scatter_add", "scatter_mul", "scatter_min", "scatter_max", "scatter_sub"), _updates),
    "sort": lambda _equation, operands, _results: math.prod(operands[0]),
    "top_k": lambda _equation, operands, _results: math.prod(operands[0]),
}
