"""What makes the units of a network, and what takes them up: one walk over a jaxpr whose axes are known."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jax.extend import core

from ecjax.graph.atoms import Atoms
from ecjax.graph.couple import Walked
from ecjax.graph.roles import CALLS
from ecjax.graph.rules import describe
from ecjax.graph.samples import whole_numbers
from ecjax.graph.zeros import Known, Step, free, groups, known, looked_up, nothing


@dataclass
class Uses:
    """Which leaves make the units of each atom, and what takes them up, by atom and in order of execution.

    Attributes:
        produced: the paths of the leaves that make them.
        read: the paths of leaves, or "a product of two values", "a sum".
        pins: why units can't go where they are summed over and would not be zero.
    """

    produced: dict[int, dict[str, None]] = field(default_factory=dict)
    read: dict[int, dict[str, None]] = field(default_factory=dict)
    pins: dict[int, dict[str, None]] = field(default_factory=dict)

    def note(self, kind: dict[int, dict[str, None]], found: Sequence[int], names: Sequence[str]) -> None:
        """Notes names for some atoms."""
        for atom in found:
            kind.setdefault(atom, {}).update(dict.fromkeys(names))


def uses(walked: Walked, arguments: Sequence[Known], atoms: Atoms) -> Uses:
    """What makes and takes up the units of each atom; pins those that can't go although no axis is in their way."""
    found = Uses()
    _follow(walked, arguments, atoms, found)
    for atom, reasons in found.pins.items():
        if atom not in atoms.pins:
            atoms.pin((atom,), tuple(reasons))
    return found


def _follow(walked: Walked, arguments: Sequence[Known], atoms: Atoms, found: Uses) -> list[Known]:
    here = {variable: Known(nothing(walked.axes[variable])) for variable in walked.jaxpr.constvars}
    here |= dict(zip(walked.jaxpr.invars, arguments, strict=True))

    def read(variable) -> Known:
        if not isinstance(variable, core.Literal):
            return here[variable]
        value = np.asarray(variable.val)
        number = float(value) if value.ndim == 0 and value.dtype.kind in "biuf" else None
        return Known(((frozenset(),) * value.ndim), number)

    for index, equation in enumerate(walked.jaxpr.eqns):
        values, inside = [read(variable) for variable in equation.invars], walked.inside.get(index, ())
        results = _results(equation, values, walked, inside, atoms, found)
        here |= dict(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in walked.jaxpr.outvars]


def _results(equation, values, walked: Walked, inside, atoms: Atoms, found: Uses) -> list[Known]:
    name = equation.primitive.name
    if inside and name in CALLS:
        return _follow(inside[0], values, atoms, found)
    if inside:
        return _CONTROL[name](equation, values, inside, atoms, found)
    operands, axes = walked.operands(equation), [walked.axes[variable] for variable in equation.outvars]
    steps = [Step(equation, values, operands, results, atoms) for results in axes]
    if name in _READING:
        _READING[name](steps[0], found)
    return list(map(known, steps))


def _summed(step: Step, found: Uses) -> None:
    for axis in whole_numbers(step.equation.params["axes"]):
        found.note(found.read, step.smallest(0, [axis]), ["a sum"])
        _require_zero(step, step.smallest(0, [axis]), step.zero(0, axis), found)


def _require_zero(step: Step, summed: Sequence[int], zero: frozenset[int], found: Uses) -> None:
    reason = f"is summed over in {describe(step.equation)}, where a unit without weights would not be zero"
    found.note(found.pins, [atom for atom in summed if atom not in zero], [reason])


def _read_in_product(step: Step, found: Uses) -> None:
    contracted, _ = step.equation.params["dimension_numbers"]
    for a, b in zip(*contracted, strict=True):
        _require_zero(step, step.smallest(0, [a]), step.zero(0, a) | step.zero(1, b), found)
    _multiplied(
        step.values,
        [step.smallest(side, contracted[side]) for side in (0, 1)],
        [step.smallest(side, free(step, side)) for side in (0, 1)],
        found,
    )


def _read_in_convolution(step: Step, found: Uses) -> None:
    numbers = step.equation.params["dimension_numbers"]
    if step.equation.params["batch_group_count"] == 1:
        channels, (out, of_kernel) = numbers.lhs_spec[1], numbers.rhs_spec[:2]
        summed = step.smallest(1, [of_kernel])
        _require_zero(step, summed, step.zero(0, channels) | step.zero(1, of_kernel), found)
        made = [atom for atom in step.smallest(1, [out]) if atom not in groups(step)]
        _multiplied(step.values, [summed, summed], [[], made], found)


def _multiplied(values, contracted: Sequence[Sequence[int]], free: Sequence[Sequence[int]], found: Uses) -> None:
    """Notes which leaves read units in a product, and which make new ones."""
    for side, value in enumerate(values):
        if value.leaves:
            of_two = side == 0 and bool(values[1].leaves)  # the first leaf makes what the second one reads
            found.note(found.produced if of_two else found.read, contracted[side], sorted(value.leaves))
            found.note(found.produced, free[side], sorted(value.leaves))
    if not any(value.leaves for value in values):
        found.note(found.read, contracted[0], ["a product of two values"])


def _read_in_table(step: Step, found: Uses) -> None:
    table, indices = step.values
    if indices.depends and table.leaves:
        for _, axis in looked_up(step):
            found.note(found.produced, step.smallest(0, [axis]), sorted(table.leaves))


_READING = {
    "conv_general_dilated": _read_in_convolution,
    "dot_general": _read_in_product,
    "gather": _read_in_table,
    "reduce_sum": _summed,
}


def _joint(first: Known, second: Known) -> Known:
    """What is known of a value that is one or the other."""
    zero = tuple(one & other for one, other in zip(first.zero, second.zero, strict=True))
    depends = first.depends or second.depends
    number = first.number if first.number == second.number else None
    return Known(zero, number, depends, frozenset() if depends else first.leaves | second.leaves)


def _fixed(step, carry: list[Known]) -> list[Known]:
    """What is known of the values that a loop carries, whatever its number of turns."""
    while True:
        after = [_joint(*pair) for pair in zip(carry, step(carry), strict=True)]
        if after == carry:
            return carry
        carry = after


def _scan(equation, values, inside, atoms: Atoms, found: Uses) -> list[Known]:
    consts, carried = equation.params["num_consts"], equation.params["num_carry"]
    fixed, carry = values[:consts], values[consts : consts + carried]
    slices = [value._replace(zero=value.zero[1:]) for value in values[consts + carried :]]

    def turn(carry, found):
        return _follow(inside[0], [*fixed, *carry, *slices], atoms, found)

    carry = _fixed(lambda carry: turn(carry, Uses())[:carried], carry)
    results = turn(carry, found)
    stacked = [value._replace(zero=(frozenset(), *value.zero)) for value in results[carried:]]
    return [*carry, *stacked]


def _while(equation, values, inside, atoms: Atoms, found: Uses) -> list[Known]:
    of_condition, of_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    condition, fixed = values[:of_condition], values[of_condition : of_condition + of_body]
    carry = values[of_condition + of_body :]
    carry = _fixed(lambda carry: _follow(inside[1], [*fixed, *carry], atoms, Uses()), carry)
    (tested,) = _follow(inside[0], [*condition, *carry], atoms, found)
    _follow(inside[1], [*fixed, *carry], atoms, found)
    return [_decided(tested, value) for value in carry]


def _cond(_equation, values, inside, atoms: Atoms, found: Uses) -> list[Known]:
    branches = [_follow(branch, values[1:], atoms, found) for branch in inside]
    return [_decided(values[0], functools.reduce(_joint, results)) for results in zip(*branches, strict=True)]


def _decided(decision: Known, value: Known) -> Known:
    """A value that depends on how a loop or a branch was decided."""
    return value._replace(depends=True, leaves=frozenset()) if decision.depends else value


_CONTROL = {"scan": _scan, "while": _while, "cond": _cond}
