"""A jaxpr evaluated with fewer entries along some axes.

Every operation does what it did, on arrays that lack what was taken away. Where a shape is written into an equation
(a reshape, a broadcast, the groups of a convolution) it becomes the smaller one; a constant of the network loses the
entries of the units that went. Numbers stay as they are: a mean over a group that has lost units is still divided by
their old number, as if they were there and zero.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.extend import core
from jaxtyping import Bool, Int

from ecjax.graph.atoms import Atoms, Axes, Axis
from ecjax.graph.couple import CUSTOM_JVP, CUSTOM_VJP, Walked, is_inexact
from ecjax.graph.evaluate import run
from ecjax.graph.groups import Coupled, units_along
from ecjax.graph.samples import shape_of

Kept = dict[str, tuple[Bool[np.ndarray, " _"], ...]]


def units_of(coupled: Coupled, kept: Kept, shape: tuple[int, ...]) -> dict[int, Int[np.ndarray, " _"]]:
    """By atom, which of its units stay, where some go.

    Raises:
        ValueError: what is to go is no group of units for inputs of this shape.
    """
    atoms, stays = coupled.atoms, {}
    along, emptied = [], []
    for path, axes in coupled.leaves.items():
        for axis, here in zip(axes, kept[path], strict=True):
            of_axis = dict.fromkeys(atoms.smallest(axis))
            tells = here.any() or len(of_axis) == 1  # which of several has lost all of its units
            emptied += [] if tells else [of_axis]
            for atom in of_axis:
                for units in units_along(axis, atom, atoms):
                    if tells:
                        known = stays.setdefault(atom, np.zeros(atoms.lengths[atom], bool))
                        known[units[here & (units >= 0)]] = True
                    along.append((path, here, axis, atom, units))
    for of_axis in emptied:
        unknown = [atom for atom in of_axis if atom not in stays]
        if all(stays[atom].any() for atom in of_axis if atom in stays):
            unknown.sort(key=lambda atom: atom in atoms.pins)
            stays |= {atom: np.zeros(atoms.lengths[atom], bool) for atom in unknown[:1]}
        stays |= {atom: np.ones(atoms.lengths[atom], bool) for atom in unknown if atom not in stays}
    left: dict[tuple, np.ndarray] = {}
    for path, here, axis, atom, units in along:
        mine = left.setdefault((path, axis, id(here)), np.ones(len(here), bool))
        mine &= (units < 0) | stays[atom][units]
    gone = {atom for atom, here in stays.items() if not here.all()}
    same = all((left[path, axis, id(here)] == here).all() for path, here, axis, _, _ in along)
    if not same or any(atom in atoms.pins for atom in gone):
        reasons = "; ".join(atoms.pins[atom][0] for atom in gone if atom in atoms.pins)
        raise ValueError(
            f"for inputs of shape {shape} the network has other units than those that were taken out of it"
            f"{f': one {reasons}' if reasons else ''}"
        )
    return {atom: np.flatnonzero(stays[atom]) for atom in gone}


class Cut(NamedTuple):
    """Which units stay.

    Attributes:
        atoms: that the axes are made of.
        units: by atom, those that stay; all of an atom that is not there.
    """

    atoms: Atoms
    units: dict[int, Int[np.ndarray, " _"]]

    def is_whole(self, axes: Axes) -> bool:
        """Whether nothing along these axes has gone."""
        return not any(atom in self.units for axis in axes for atom in self.atoms.smallest(axis))

    def length(self, axis: Axis) -> int:
        """How many entries of an axis stay."""
        return self.atoms.left(axis, {atom: len(units) for atom, units in self.units.items()})

    def shape(self, axes: Axes) -> tuple[int, ...]:
        """How many entries of each axis stay."""
        return tuple(map(self.length, axes))

    def kept(self, axis: Axis) -> Bool[np.ndarray, " _"]:
        """Which entries along an axis stay."""
        found = np.ones(1, bool)
        for atom in self.atoms.expand(axis):
            here = np.ones(self.atoms.lengths[atom], bool)
            if atom in self.atoms.segments:
                here = np.concatenate([self.kept(part) for part in self.atoms.segments[atom]])
            elif atom in self.units:
                here = np.isin(np.arange(len(here)), self.units[atom])
            found = np.multiply.outer(found, here).reshape(-1)
        return found


def evaluate(walked: Walked, arguments: Sequence, units: Cut) -> list:
    """The results of a jaxpr for smaller arguments."""
    jaxpr = walked.jaxpr
    values = dict(zip(jaxpr.invars, arguments, strict=True))
    for variable, constant in zip(jaxpr.constvars, walked.constants, strict=True):
        values[variable] = _constant(constant, walked.axes[variable], units)

    def read(variable):
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    for index, equation in enumerate(jaxpr.eqns):
        operands, axes = [read(variable) for variable in equation.invars], walked.operands(equation)
        results = [walked.axes[variable] for variable in equation.outvars]
        if all(map(units.is_whole, (*axes, *results))):
            found = run(equation, operands)
        else:
            found = _equation(equation, operands, axes, results, walked.inside.get(index, ()), units)
        values |= dict(zip(equation.outvars, found, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _constant(constant: Any, axes: Axes, units: Cut) -> Any:
    if units.is_whole(axes):
        return constant
    return taken(constant, [units.kept(axis) for axis in axes])


def _equation(equation, operands: list, axes: list[Axes], results: list[Axes], inside, units: Cut) -> list:
    name = equation.primitive.name
    if name in _CONTROL:
        return _CONTROL[name](equation, operands, inside, units)
    if name in CUSTOM_JVP and len(inside) == 2:
        return _with_jvp(equation, operands, inside, units)
    if name in CUSTOM_VJP and len(inside) == 2:
        return _with_vjp(equation, operands, inside, units)
    if inside:
        return evaluate(inside[0], operands, units)
    if name in ("sharding_constraint", "layout_constraint", "reshard"):
        return operands  # they are of the old widths
    if name == "iota":
        return [_iota(equation, results[0], units)]
    if name in _SHAPES:
        equation = equation.replace(params=equation.params | _SHAPES[name](equation, axes, results, units))
    return run(equation, operands)


def _iota(equation, axes: Axes, units: Cut) -> Array:
    along = int(equation.params["dimension"])
    numbers = jnp.asarray(np.flatnonzero(units.kept(axes[along])), equation.params["dtype"])
    return lax.broadcast_in_dim(numbers, units.shape(axes), (along,))


def _new_sizes(_equation, _axes, results, units: Cut) -> dict[str, Any]:
    return {"new_sizes": units.shape(results[0]), "sharding": None}


def _shape(_equation, _axes, results, units: Cut) -> dict[str, Any]:
    return {"shape": units.shape(results[0]), "sharding": None}


def _slice(equation, axes, _results, units: Cut) -> dict[str, Any]:
    starts, limits = [], []
    for axis, start, limit in zip(
        axes[0], equation.params["start_indices"], equation.params["limit_indices"], strict=True
    ):
        kept = units.kept(axis)
        starts.append(int(kept[:start].sum()))
        limits.append(int(kept[:limit].sum()))
    return {"start_indices": tuple(starts), "limit_indices": tuple(limits)}


def _split(equation, _axes, results, units: Cut) -> dict[str, Any]:
    return {"sizes": tuple(units.length(axes[int(equation.params["axis"])]) for axes in results)}


def _dynamic_slice(_equation, _axes, results, units: Cut) -> dict[str, Any]:
    return {"slice_sizes": units.shape(results[0])}


def _gather(equation, axes, _results, units: Cut) -> dict[str, Any]:
    sizes, lengths = equation.params["slice_sizes"], shape_of(equation.invars[0])
    whole = [size == length for size, length in zip(sizes, lengths, strict=True)]
    found = [units.length(axis) if all_of else n for axis, all_of, n in zip(axes[0], whole, sizes, strict=True)]
    return {"slice_sizes": tuple(found)}


def _convolution(equation, axes, _results, units: Cut) -> dict[str, Any]:
    """The groups of a convolution are the outer atoms of the channels that it reads."""
    groups, channels = equation.params["feature_group_count"], equation.params["dimension_numbers"].lhs_spec[1]
    outer: Axis = ()
    for atom in units.atoms.expand(axes[0][channels]):
        if units.atoms.length(outer) == groups:
            break
        outer = (*outer, atom)
    return {"feature_group_count": units.length(outer) if units.atoms.length(outer) == groups else groups}


_SHAPES = {
    "broadcast_in_dim": _shape,
    "conv_general_dilated": _convolution,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "reshape": _new_sizes,
    "slice": _slice,
    "split": _split,
}


def _remat(equation, operands, inside, units: Cut) -> list:
    options = {name: equation.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(lambda *arguments: evaluate(inside[0], arguments, units), **options)(*operands)


def _scan(equation, operands, inside, units: Cut) -> list:
    consts, carried = equation.params["num_consts"], equation.params["num_carry"]
    fixed, carry, stacked = operands[:consts], operands[consts : consts + carried], operands[consts + carried :]

    def turn(carry, slices):
        results = evaluate(inside[0], [*fixed, *carry, *slices], units)
        return results[:carried], results[carried:]

    options = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
    carry, slices = lax.scan(turn, carry, stacked, **options)
    return [*carry, *slices]


def _while(equation, operands, inside, units: Cut) -> list:
    of_condition, of_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    condition, fixed = operands[:of_condition], operands[of_condition : of_condition + of_body]
    test, body = inside
    return lax.while_loop(
        lambda carry: evaluate(test, [*condition, *carry], units)[0],
        lambda carry: evaluate(body, [*fixed, *carry], units),
        operands[of_condition + of_body :],
    )


def _cond(_equation, operands, inside, units: Cut) -> list:
    branches = [lambda *arguments, own=own: evaluate(own, arguments, units) for own in inside]
    return lax.switch(operands[0], branches, *operands[1:])


_CONTROL = {
    **dict.fromkeys(("remat", "remat2", "checkpoint"), _remat),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def _with_jvp(equation, operands, inside, units: Cut) -> list:
    body, derivative = inside
    inexact = list(map(is_inexact, equation.outvars))

    @jax.custom_jvp
    def function(*arguments):
        return evaluate(body, arguments, units)

    @function.defjvp
    def _(arguments, tangents):
        given = [t for t, variable in zip(tangents, equation.invars, strict=True) if is_inexact(variable)]
        moved = iter(evaluate(derivative, [*arguments, *given], units))
        results = function(*arguments)
        zeros = (np.zeros(result.shape, jax.dtypes.float0) for result in results)
        return results, [next(moved) if moves else zero for moves, zero in zip(inexact, zeros, strict=True)]

    return function(*operands)


def _with_vjp(equation, operands, inside, units: Cut) -> list:
    body, derivative = inside

    @jax.custom_vjp
    def function(*arguments):
        return evaluate(body, arguments, units)

    def backward(arguments, cotangents):
        given = [c for c, variable in zip(cotangents, equation.outvars, strict=True) if is_inexact(variable)]
        found = iter(evaluate(derivative, [*arguments, *given], units))
        return tuple(next(found) if is_inexact(variable) else None for variable in equation.invars)

    function.defvjp(lambda *arguments: (function(*arguments), arguments), backward)
    return function(*operands)


def like(array: Any, values: np.ndarray) -> Any:
    """Values as an array of the same kind: NumPy's, or JAX's."""
    return values if isinstance(array, np.ndarray) else jnp.asarray(values)


def taken(array: Any, kept: Sequence[Bool[np.ndarray, " _"]]) -> Any:
    """The entries of an array that stay, along each of its axes."""
    if all(here.all() for here in kept):
        return array
    if isinstance(array, Tracer):
        for axis, here in enumerate(kept):
            array = jnp.take(array, np.flatnonzero(here), axis)
        return array
    found = np.asarray(array)  # nothing is compiled for shapes that come once
    for axis, here in enumerate(kept):
        found = found.compress(here, axis)
    return like(array, found)
