"""Units that add nothing, or the same to every sample: found while a network is evaluated for a few samples.

Next to every value goes whether it *varies*, entry by entry: whether weights other than zero join it to the inputs.
What does not vary is a constant, and its value is known. Wherever units are summed over, in products with kernels, in
products of two values and in plain sums, a unit is inert if it adds nothing there (no weight reads it, or it is zero),
or if it adds a constant that a bias can take over. Units that are inert everywhere can go.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core
from jaxtyping import Bool, Num

from ecjax.graph.atoms import Atoms, Axes
from ecjax.graph.couple import Walked
from ecjax.graph.evaluate import run
from ecjax.graph.groups import units_along
from ecjax.graph.roles import CALLS
from ecjax.graph.samples import ELEMENTWISE, whole_numbers

_ROUNDING = 32  # units in the last place, by which the same constant may differ from row to row

# What moves entries without changing them; indices and padding come after the entries.
_MOVES = frozenset(
    """
    broadcast_in_dim concatenate copy expand_dims pad reshape rev slice split squeeze stack tile transpose unstack
    """.split()  # noqa: SIM905
)
_OVER_AXES = frozenset(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor".split()  # noqa: SIM905
)
_PRODUCTS = frozenset(("dot_general", "conv_general_dilated"))


class Seen(NamedTuple):
    """A value for a few samples, and which of its entries vary; None if it does not depend on the inputs at all."""

    value: Num[Array | np.ndarray, "..."]
    varies: Bool[Array | np.ndarray, "..."] | None = None

    @property
    def moves(self) -> Bool[Array | np.ndarray, "..."]:
        """Which entries vary."""
        return jnp.zeros(jnp.shape(self.value), bool) if self.varies is None else self.varies

    @property
    def counts(self) -> Bool[Array | np.ndarray, "..."]:
        """Which entries are not known to be zero."""
        return self.moves | (self.value != 0)


class Found(NamedTuple):
    """What is known of the units after some equations.

    Attributes:
        inert: by atom, the units that add nothing, or a constant that a bias can take over.
        constants: by the site of a product whose bias can take constants over, what it reads for the first sample, at
            its first position.
    """

    inert: Mapping[int, Bool[Array | np.ndarray, " _"]]
    constants: dict[tuple[int, ...], Num[Array | np.ndarray, "..."]]

    def joined(self, other: "Found") -> "Found":
        """What is known after these and other equations."""
        inert = dict(self.inert)
        for atom, units in other.inert.items():
            inert[atom] = inert[atom] & units if atom in inert else units
        return Found(inert, self.constants | other.constants)


class Evaluation(NamedTuple):
    """What an evaluation goes by.

    Attributes:
        atoms: of all axes.
        folding: the sites of products with a bias of their own.
    """

    atoms: Atoms
    folding: frozenset[tuple[int, ...]]

    def follow(self, walked: Walked, arguments: Sequence[Seen], site: tuple[int, ...] = ()) -> tuple[list[Seen], Found]:
        """The results of a jaxpr, and what is known of the units in it."""
        seen = {v: Seen(c) for v, c in zip(walked.jaxpr.constvars, walked.constants, strict=True)}
        seen |= dict(zip(walked.jaxpr.invars, arguments, strict=True))
        found = Found({}, {})

        def read(variable) -> Seen:
            return Seen(variable.val) if isinstance(variable, core.Literal) else seen[variable]

        for index, equation in enumerate(walked.jaxpr.eqns):
            operands, inside = [read(variable) for variable in equation.invars], walked.inside.get(index, ())
            results, more = self._equation(equation, operands, walked, inside, (*site, index))
            found = found.joined(more)
            seen |= dict(zip(equation.outvars, results, strict=True))
        return [read(variable) for variable in walked.jaxpr.outvars], found

    def _equation(self, equation, operands, walked: Walked, inside, site) -> tuple[list[Seen], Found]:
        name = equation.primitive.name
        if inside and name in CALLS:
            return self.follow(inside[0], operands, site)
        if name == "scan":
            return self._scan(equation, operands, inside, site)
        values, axes = run(equation, [operand.value for operand in operands]), walked.operands(equation)
        varies = _varies(equation, operands, values)
        results = [Seen(value, here) for value, here in zip(values, varies, strict=True)]
        if inside:  # loops and branches: what is in them stays
            atoms = {atom for own in axes for axis in own for atom in self.atoms.smallest(axis)}
            return results, Found({atom: jnp.zeros(self.atoms.lengths[atom], bool) for atom in atoms}, {})
        if name in _PRODUCTS:
            return results, self._product(equation, operands, axes, site)
        if name == "reduce_sum":
            parts = [
                (axes[0][axis], _all_but(~operands[0].counts, axis)) for axis in whole_numbers(equation.params["axes"])
            ]
            return results, self._inert(parts)
        return results, Found({}, {})

    def _inert(self, parts: Sequence[tuple[tuple[int, ...], Bool[Array | np.ndarray, " _"]]]) -> Found:
        """The units of which every entry along an axis is inert."""
        found: dict[int, Array] = {}
        for axis, inert in parts:
            for atom in dict.fromkeys(self.atoms.smallest(axis)):
                if atom in self.atoms.pins:
                    continue
                length = self.atoms.lengths[atom]
                for units in units_along(axis, atom, self.atoms):
                    place = np.where(units < 0, length, units)
                    here = jnp.ones(length + 1, int).at[place].min(inert.astype(int))[:length] > 0
                    found[atom] = found[atom] & here if atom in found else here
        return Found(found, {})

    def _product(self, equation, operands: list[Seen], axes: list[Axes], site) -> Found:
        summed = _summed(equation, operands)
        read = next((side for side in (0, 1) if operands[side].varies is not None), 0)
        parts, constant = [], _constant(operands[read], summed[read].axes) if site in self.folding else None
        for number, (own, other) in enumerate(zip(summed[0].axes, summed[1].axes, strict=True)):
            dead = summed[0].zero(own) | summed[1].zero(other)
            if constant is not None:
                dead |= _all_but(constant, number)
            parts.append((axes[1][other], dead))
        found = self._inert(parts)
        if constant is None:
            return found
        value, kept = operands[read].value, summed[read].axes
        first = value[tuple(slice(None) if axis in kept else 0 for axis in range(value.ndim))]
        return found._replace(constants={site: first.transpose(_order(kept))})

    def _scan(self, equation, operands: list[Seen], inside, site) -> tuple[list[Seen], Found]:
        consts, carried = equation.params["num_consts"], equation.params["num_carry"]
        fixed, carry, stacked = operands[:consts], operands[consts : consts + carried], operands[consts + carried :]
        known = [operand.varies is None for operand in stacked]
        fixed_in = self._replace(folding=frozenset())

        def turn(carry, slices):
            given = [Seen(value, None if same else varies) for (value, varies), same in zip(slices, known, strict=True)]
            results, found = fixed_in.follow(inside[0], [*fixed, *(Seen(*pair) for pair in carry), *given], site)
            pairs = [(result.value, result.moves) for result in results]
            return pairs[:carried], (pairs[carried:], found.inert)

        options = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
        kinds = [variable.aval.dtype for variable in equation.invars[consts : consts + carried]]
        start = [(jnp.asarray(o.value, kind), o.moves) for o, kind in zip(carry, kinds, strict=True)]
        given = [(operand.value, operand.moves) for operand in stacked]
        carry, (results, inert) = lax.scan(turn, start, given, **options)
        found = Found({atom: jnp.all(units, 0) for atom, units in inert.items()}, {})
        return [Seen(*pair) for pair in (*carry, *results)], found


def _all_but(array: Bool[Array | np.ndarray, "..."], axis: int) -> Bool[Array, " _"]:
    """For each place along an axis, whether all entries are True."""
    return jnp.all(array, tuple(other for other in range(array.ndim) if other != axis))


class _Summed(NamedTuple):
    """An operand of a product, and the axes that are summed over."""

    operand: Seen
    axes: tuple[int, ...]
    groups: int = 1

    def zero(self, axis: int) -> Bool[Array, " _"]:
        """For each place along an axis, in each group of it, whether all entries are zero."""
        return _all_but(~self.operand.counts, axis).reshape(self.groups, -1).all(0)


def _summed(equation, operands: Sequence[Seen]) -> tuple[_Summed, _Summed]:
    if equation.primitive.name == "dot_general":
        (first, second), _ = equation.params["dimension_numbers"]
        return _Summed(operands[0], whole_numbers(first)), _Summed(operands[1], whole_numbers(second))
    numbers, groups = equation.params["dimension_numbers"], equation.params["feature_group_count"]
    return _Summed(operands[0], (numbers.lhs_spec[1],), groups), _Summed(operands[1], (numbers.rhs_spec[1],))


def _constant(operand: Seen, axes: Sequence[int]) -> Bool[Array | np.ndarray, "..."]:
    """Of what is summed over, which entries are the same for all samples and positions; its axes are those given."""
    others = tuple(axis for axis in range(operand.value.ndim) if axis not in axes)
    value = operand.value
    spread = value.max(others) - value.min(others)
    same = spread <= _ROUNDING * jnp.finfo(value.dtype).eps * jnp.abs(value).max(others)
    found = ~operand.moves.any(others) & same
    return found.transpose(_order(axes))


def _order(axes: Sequence[int]) -> list[int]:
    """How axes that were left in their order come into the order that is given."""
    return np.argsort(np.argsort(axes)).tolist()


def _varies(equation, operands: Sequence[Seen], values: Sequence) -> list[Bool[Array | np.ndarray, "..."] | None]:
    """Which entries of the results vary, given which entries of the operands do."""
    if all(operand.varies is None for operand in operands):
        return [None] * len(values)
    rule = _RULES.get(equation.primitive.name, _everywhere)
    return rule(equation, operands, values)


def _everywhere(_equation, _operands, values) -> list:
    return [jnp.ones(jnp.shape(value), bool) for value in values]


def _either(_equation, operands, values) -> list:
    """Entry by entry: what varies in any operand."""
    return [
        functools.reduce(operator.or_, (jnp.broadcast_to(o.moves, value.shape) for o in operands)) for value in values
    ]


def _each(_equation, operands, _values) -> list:
    return [operand.moves for operand in operands]


def _both(_equation, operands, values) -> list:
    """A product entry by entry: zero times anything is zero."""
    first, second = operands
    return [jnp.broadcast_to((first.moves & second.counts) | (first.counts & second.moves), values[0].shape)]


def _chosen(equation, operands, values) -> list:
    """A choice that does not vary is between what its cases are."""
    choice, *cases = operands
    if choice.varies is not None:
        return _either(equation, operands, values)
    return run(equation, [choice.value, *(case.moves for case in cases)])


def _multiplied(equation, operands, _values) -> list:
    """A product varies where a term does: where one factor varies and the other is not zero."""
    options = equation.params | {"preferred_element_type": jnp.dtype(jnp.float32), "precision": None}
    plain = equation.replace(params=options)

    def any_term(first, second):
        return run(plain, [first.astype(jnp.float32), second.astype(jnp.float32)])[0] > 0

    first, second = operands
    found = [any_term(first.moves, second.counts)] if first.varies is not None else []
    found += [any_term(first.counts, second.moves)] if second.varies is not None else []
    return [functools.reduce(operator.or_, found)]


def _moved(equation, operands, _values) -> list:
    return run(equation, [operand.moves for operand in operands])


def _part(equation, operands, values) -> list:
    """The same entries whatever the inputs are, as long as these do not say which."""
    if any(operand.varies is not None for operand in operands[1:]):
        return _everywhere(equation, operands, values)
    return run(equation, [operands[0].moves, *(operand.value for operand in operands[1:])])


def _looked_up(equation, operands, values) -> list:
    """The rows of a table that the inputs choose: zero where all rows are."""
    table, indices = operands
    if indices.varies is None:
        return _part(equation, operands, values)
    numbers = equation.params["dimension_numbers"]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    sizes, shape = equation.params["slice_sizes"], table.value.shape
    if any(sizes[axis] != shape[axis] for axis in range(len(shape)) if axis not in gone):
        return _everywhere(equation, operands, values)
    return [lax.broadcast_in_dim(table.counts.any(gone), values[0].shape, numbers.offset_dims)]


def _over_axes(equation, operands, _values) -> list:
    return [operands[0].moves.any(whole_numbers(equation.params["axes"]))]


def _window(equation, operands, values) -> list:
    """Pooling: along the axes that the window moves along, all that varies anywhere."""
    sizes = equation.params["window_dimensions"]
    changed = [
        axis for axis, size in enumerate(sizes) if size != 1 or values[0].shape[axis] != operands[0].value.shape[axis]
    ]
    return [jnp.broadcast_to(operands[0].moves.any(tuple(changed), keepdims=True), values[0].shape)]


_RULES: dict[str, Callable] = {
    **dict.fromkeys(ELEMENTWISE, _either),
    **dict.fromkeys(_MOVES, _moved),
    **dict.fromkeys(_OVER_AXES, _over_axes),
    **dict.fromkeys(_PRODUCTS, _multiplied),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum"), _window),
    "gather": _looked_up,
    "dynamic_slice": _part,
    **dict.fromkeys(("mul", "and"), _both),
    "optimization_barrier": _each,
    "select_n": _chosen,
}
