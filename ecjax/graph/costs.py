"""What a network with fewer units costs: its parameters, and the floating-point operations of its products."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ecjax.graph.couple import Walked
from ecjax.graph.flops import of_equation
from ecjax.graph.groups import Coupled
from ecjax.graph.roles import CALLS
from ecjax.graph.samples import shapes, whole_numbers

# By atom how many units are left; numbers, or arrays of numbers for several networks at once.
Left = Mapping[int, Any]


def parameters(coupled: Coupled, left: Left) -> Any:
    """How many parameters a network has.

    Args:
        coupled: the network, whose axes are known.
        left: by atom, how many units are left; all of the others.
    """
    return sum(_size(axes, coupled, left) for axes in coupled.leaves.values())


def flops(coupled: Coupled, left: Left) -> Any:
    """How many floating-point operations the products of a network take, as ``graph.count_flops`` counts them.

    The body of a scan counts as often as it turns, that of a while loop once, and of the branches of a condition the
    most costly one. What is done entry by entry does not count.

    Args:
        coupled: the network, whose axes are known.
        left: by atom, how many units are left; all of the others.
    """
    return _flops(coupled.walked, coupled, left)


COSTS: dict[str, Callable[[Coupled, Left], Any]] = {"parameters": parameters, "flops": flops}


def _size(axes, coupled: Coupled, left: Left) -> Any:
    found = 1.0
    for axis in axes:
        found = found * coupled.atoms.left(axis, left)
    return found


def _flops(walked: Walked, coupled: Coupled, left: Left) -> Any:
    total = 0.0
    for index, equation in enumerate(walked.jaxpr.eqns):
        name, inside = equation.primitive.name, walked.inside.get(index, ())
        if inside:
            of_each = [_flops(body, coupled, left) for body in inside[: 1 if name in CALLS else None]]
            turns = equation.params["length"] if name == "scan" else 1
            total = total + (functools.reduce(_larger, of_each) if name == "cond" else sum(of_each) * turns)
        elif name in ("dot_general", "conv_general_dilated"):
            total = total + _of_product(equation, walked, coupled, left)
    return total


def _larger(first: Any, second: Any) -> Any:
    """The larger number, entry by entry, whatever kind of array holds them."""
    return (first + second + abs(first - second)) / 2


def _of_product(equation, walked: Walked, coupled: Coupled, left: Left) -> Any:
    """What ``graph.count_flops`` counts of a product, for what is left of its results and of the terms of each sum."""
    operands, (results,) = walked.operands(equation), [walked.axes[variable] for variable in equation.outvars]
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        summed = [operands[0][axis] for axis in whole_numbers(contracted)]
    else:
        summed = [operands[1][equation.params["dimension_numbers"].rhs_spec[1]]]
    whole = _size([*results, *summed], coupled, {})
    counted = of_equation(equation, shapes(equation.invars), shapes(equation.outvars)).products
    return counted * _size([*results, *summed], coupled, left) / max(whole, 1)
