"""A jaxpr evaluated equation by equation, with some of its equations done in another way.

Only the calls and scans that such an equation is in are gone into: jitted and custom-derivative functions keep their
own rules everywhere else. What the network rematerialises is rematerialised here.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core
from jaxtyping import PyTree

from ecjax.graph.roles import CALLS

Path = tuple[int, ...]
Aside = dict[str, Array]
# From an equation, its operands, its place and what is given for that place: its results, and something aside.
Hook = Callable[[Any, list, Path, PyTree], tuple[list, Aside]]
_REMATERIALISED = ("remat", "remat2", "checkpoint")


def evaluate(
    closed: Any,
    arguments: Sequence,
    sites: frozenset[Path],
    hook: Hook,
    given: Mapping[Path, PyTree],
    others: Callable[[Any, list], list] | None = None,
    site: Path = (),
) -> tuple[list, Aside]:
    """The results of a jaxpr, and what the hook puts aside.

    Args:
        closed: the jaxpr, with or without its constants.
        arguments: its own.
        sites: the equations that the hook evaluates: the index of each, after those of the calls that it is in.
        hook: called there in place of the equation. What it puts aside under one name adds up; in scans it has an axis
            before its own for each of them.
        given: arrays for some of the sites; in scans with an axis before their own for each of them.
        others: how all other equations are evaluated; as they are if None.
        site: the equations that the jaxpr is called from.
    """
    jaxpr = getattr(closed, "jaxpr", closed)
    values = dict(zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))
    aside: Aside = {}

    def read(var):
        return var.val if isinstance(var, core.Literal) else values[var]

    for index, equation in enumerate(jaxpr.eqns):
        here, operands = (*site, index), [read(var) for var in equation.invars]
        inside = frozenset(path for path in sites if path[: len(here)] == here)
        into, name = inside or others is not None, equation.primitive.name
        if here in sites:
            results, more = hook(equation, operands, here, given.get(here))
        elif into and name in CALLS:
            call = functools.partial(_call, equation.params[CALLS[name]], inside, hook, others, here)
            if name in _REMATERIALISED:
                options = {option: equation.params[option] for option in ("prevent_cse", "policy")}
                call = jax.checkpoint(call, **options)
            results, more = call(operands, {path: given[path] for path in inside if path in given})
        elif into and name == "scan":
            results, more = _scan(equation, operands, inside, hook, given, others, here)
        else:
            results, more = (others or run)(equation, operands), {}
        aside |= {name: _added(aside, name, array) for name, array in more.items()}
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(var) for var in jaxpr.outvars], aside


def _added(aside: dict[str, Array], name: str, array: Array) -> Array:
    """The array and what is put aside already; of one shape, since numbers of a scan and of none would broadcast."""
    if name not in aside:
        return array
    if aside[name].shape != array.shape:
        raise ValueError(f"'{name}' is put aside with shapes {aside[name].shape} and {array.shape}")
    return aside[name] + array


def _call(closed, sites: frozenset[Path], hook: Hook, others, site: Path, operands: list, given):
    return evaluate(closed, operands, sites, hook, given, others, site)


def _scan(equation, operands: list, sites: frozenset[Path], hook: Hook, given, others, site: Path):
    consts, carried, body = equation.params["num_consts"], equation.params["num_carry"], equation.params["jaxpr"]
    fixed, carry, slices = operands[:consts], operands[consts : consts + carried], operands[consts + carried :]

    def turn(carry, slices):
        slices, of_turn = slices
        results, aside = evaluate(body, [*fixed, *carry, *slices], sites, hook, of_turn, others, site)
        return results[:carried], (results[carried:], aside)

    options = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
    here = {path: given[path] for path in sites if path in given}
    carry, (stacked, aside) = lax.scan(turn, carry, (slices, here), **options)
    return [*carry, *stacked], aside


def run(equation, operands: list) -> list:
    """Runs one equation by itself; ``core.jaxpr_as_fun`` is the public way to bind a primitive again."""
    variables = [var for var in equation.invars if not isinstance(var, core.Literal)]
    source = core.DebugInfo("ecjax.graph", equation.primitive.name, None, None)
    jaxpr = core.Jaxpr((), variables, equation.outvars, [equation], equation.effects, source)
    arguments = [
        operand for operand, var in zip(operands, equation.invars, strict=True) if not isinstance(var, core.Literal)
    ]
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*arguments)


def promoted(array: Array, least: Any = jnp.float32) -> Array:
    """The array in at least this dtype, if it holds floating-point numbers."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return jnp.asarray(array, jnp.promote_types(array.dtype, least))


def in_full(equation, operands: list, least: Any = jnp.float32) -> list:
    """Runs an equation in at least this dtype, whatever it asks for."""
    params = dict(equation.params)
    if any(isinstance(value, core.Jaxpr | core.ClosedJaxpr) for value in jax.tree.leaves(params)):
        asked = [var.aval.dtype for var in equation.invars]
        operands = [jnp.asarray(operand).astype(dtype) for operand, dtype in zip(operands, asked, strict=True)]
        return [promoted(result, least) for result in run(equation, operands)]
    for name in ("new_dtype", "preferred_element_type", "dtype"):
        if params.get(name) is not None and jnp.issubdtype(params[name], jnp.floating):
            params[name] = jnp.promote_types(params[name], least)
    operands = [jnp.asarray(operand) for operand in operands]
    floating = [operand.dtype for operand in operands if jnp.issubdtype(operand.dtype, jnp.floating)]
    if floating:
        widest = jnp.result_type(least, *floating)
        operands = [o.astype(widest) if jnp.issubdtype(o.dtype, jnp.floating) else o for o in operands]
    results = equation.primitive.bind(*operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]
