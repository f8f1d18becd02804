"""The axes of every value in a network, in atoms: one walk over its jaxpr that evaluates nothing.

Calls, scans, loops and branches are gone into. A scan's body sees its slices without their first axis; what it carries
has the same units before and after every turn. A function with a derivative of its own is walked twice: its value, and
its derivative, which a smaller network needs, too (the first one: in it, such functions are what they compute).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from ecjax.graph.atoms import Atoms, Axes
from ecjax.graph.evaluate import run
from ecjax.graph.roles import CALLS
from ecjax.graph.rules import describe, results_of, unknown
from ecjax.graph.samples import shape_of

CUSTOM_JVP, CUSTOM_VJP = ("custom_jvp_call",), ("custom_vjp_call", "custom_vjp_call_jaxpr")


class Walked(NamedTuple):
    """A jaxpr whose axes are known in atoms.

    Attributes:
        jaxpr: without its constants.
        constants: these.
        axes: of each of its variables.
        results: the axes of what it returns.
        inside: by the index of an equation, the jaxprs that it holds.
    """

    jaxpr: core.Jaxpr
    constants: Sequence[Any]
    axes: dict[core.Var, Axes]
    results: list[Axes]
    inside: dict[int, tuple["Walked", ...]]

    def operands(self, equation) -> list[Axes]:
        """The axes of an equation's operands; literals have no atoms."""
        return [_read(self.axes, variable) for variable in equation.invars]


def _read(known: dict, variable) -> Axes:
    return ((),) * len(shape_of(variable)) if isinstance(variable, core.Literal) else known[variable]


def walk(closed: Any, arguments: Sequence[Axes], atoms: Atoms, *, derivatives: bool = True) -> Walked:
    """Follows the axes of a jaxpr's arguments through it.

    Args:
        closed: a jaxpr, with or without its constants.
        arguments: the axes of each.
        atoms: that they are made of; what is matched and pinned is noted there.
        derivatives: whether the derivatives that functions have of their own are followed, too.
    """
    jaxpr = getattr(closed, "jaxpr", closed)
    axes = {variable: atoms.axes(shape_of(variable)) for variable in jaxpr.constvars}
    axes |= dict(zip(jaxpr.invars, arguments, strict=True))
    inside = {}
    for index, equation in enumerate(jaxpr.eqns):
        operands = [_operand(axes, variable, atoms) for variable in equation.invars]
        results, held = _equation(equation, operands, atoms, derivatives)
        if held:
            inside[index] = held
        axes |= dict(zip(equation.outvars, results, strict=True))
    found = [_operand(axes, variable, atoms) for variable in jaxpr.outvars]
    return Walked(jaxpr, getattr(closed, "consts", ()), axes, found, inside)


def _operand(known: dict, variable, atoms: Atoms) -> Axes:
    if isinstance(variable, core.Literal):
        return atoms.axes(shape_of(variable), "is that of a number in the code")
    return known[variable]


def _equation(equation, operands, atoms: Atoms, derivatives: bool) -> tuple[Sequence[Axes], tuple[Walked, ...]]:
    name = equation.primitive.name
    within = functools.partial(walk, atoms=atoms, derivatives=derivatives)
    if name in (*CUSTOM_JVP, *CUSTOM_VJP) and derivatives:
        return _custom(equation, operands, atoms)
    if name in CALLS:
        body = within(equation.params[CALLS[name]], operands)
        return body.results, (body,)
    if name in _CONTROL:
        return _CONTROL[name](equation, operands, atoms, within)
    return results_of(equation, operands, atoms), ()


def unify_all(first: Sequence[Axes], second: Sequence[Axes], atoms: Atoms, what: str) -> None:
    """Notes that values have the same axes."""
    for ones, others in zip(first, second, strict=True):
        for one, other in zip(ones, others, strict=True):
            atoms.unify(one, other, f"does not fit together in {what}")


def _scan(equation, operands, atoms: Atoms, within: Callable[..., Walked]):
    consts, carried = equation.params["num_consts"], equation.params["num_carry"]
    fixed, carry, stacked = operands[:consts], operands[consts : consts + carried], operands[consts + carried :]
    reason = "is what a scan goes over"
    for axes in stacked:
        atoms.pin(axes[0], reason)
    body = within(equation.params["jaxpr"], [*fixed, *carry, *(axes[1:] for axes in stacked)])
    unify_all(carry, body.results[:carried], atoms, "what a scan carries")
    turns = atoms.new(equation.params["length"], reason)
    return [*carry, *((turns, *axes) for axes in body.results[carried:])], (body,)


def _while(equation, operands, atoms: Atoms, within: Callable[..., Walked]):
    of_condition, of_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    condition, fixed = operands[:of_condition], operands[of_condition : of_condition + of_body]
    carry = operands[of_condition + of_body :]
    test = within(equation.params["cond_jaxpr"], [*condition, *carry])
    body = within(equation.params["body_jaxpr"], [*fixed, *carry])
    unify_all(carry, body.results, atoms, "what a loop carries")
    return carry, (test, body)


def _cond(equation, operands, atoms: Atoms, within: Callable[..., Walked]):
    branches = tuple(within(branch, operands[1:]) for branch in equation.params["branches"])
    for branch in branches[1:]:
        unify_all(branches[0].results, branch.results, atoms, "the branches of a condition")
    return branches[0].results, branches


_CONTROL = {"scan": _scan, "while": _while, "cond": _cond}


def _custom(equation, operands, atoms: Atoms):
    """A function with a derivative of its own, and this derivative."""
    body = walk(equation.params[CALLS[equation.primitive.name]], operands, atoms)
    forwards = equation.primitive.name in CUSTOM_JVP
    try:
        closed = _derivative(equation, forwards)
    except Exception:  # whatever the user's rule may raise
        return unknown(equation, [*operands, *body.results], atoms), (body,)
    inputs = [axes for axes, variable in zip(operands, equation.invars, strict=True) if is_inexact(variable)]
    outputs = [axes for axes, variable in zip(body.results, equation.outvars, strict=True) if is_inexact(variable)]
    derivative = walk(closed, [*operands, *(inputs if forwards else outputs)], atoms, derivatives=False)
    unify_all(derivative.results, outputs if forwards else inputs, atoms, f"the derivative of {describe(equation)}")
    return body.results, (body, derivative)


def is_inexact(variable) -> bool:
    """Whether a variable of a jaxpr holds numbers that can be differentiated."""
    return jnp.issubdtype(variable.aval.dtype, jnp.inexact)


def _derivative(equation, forwards: bool) -> core.ClosedJaxpr:
    """The derivative of a function: of its arguments and their tangents, or of its arguments and cotangents."""
    primals = [jax.ShapeDtypeStruct(shape_of(v), v.aval.dtype) for v in equation.invars]
    places = [index for index, variable in enumerate(equation.invars) if is_inexact(variable)]
    kept = [index for index, variable in enumerate(equation.outvars) if is_inexact(variable)]

    def at(primals):
        def function(*moved):
            arguments = list(primals)
            for place, value in zip(places, moved, strict=True):
                arguments[place] = value
            results = run(equation, arguments)
            return [results[index] for index in kept]

        return function, [primals[place] for place in places]

    def tangents(primals, given):
        function, moved = at(primals)
        return jax.jvp(function, moved, given)[1]

    def cotangents(primals, given):
        function, moved = at(primals)
        return jax.vjp(function, *moved)[1](given)

    given = [primals[place] for place in places]
    if not forwards:
        given = [jax.ShapeDtypeStruct(shape_of(v), v.aval.dtype) for v in map(equation.outvars.__getitem__, kept)]
    return jax.make_jaxpr(tangents if forwards else cotangents)(primals, given)
