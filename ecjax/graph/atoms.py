"""Which axes must have the same length: every axis is a product of atoms, and equal atoms are one.

The length of an axis is the product of the lengths of its *atoms*, the outer ones first: an axis of 12 that was made of
3 heads of 4 features is ``(heads, features)``. An atom may also be a sum of *segments*, which lie one after another, as
``concatenate`` leaves them; each segment is an axis again. Operations match axes, position by position, and matching
refines them: where an axis of 12 meets one of 3 · 4, its atom becomes the product of these two, and where it meets one
of 5 + 7, it becomes that sum. What can't be matched is *pinned*: it keeps its length, for a reason in words.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Axis = tuple[int, ...]  # atoms, the outer ones first; an axis of length 1 may have none
Axes = tuple[Axis, ...]

_PIECES = 64  # an axis that is cut into more is not followed


@dataclass
class Atoms:
    """All atoms of a network: a union-find structure.

    Attributes:
        lengths: of each atom.
        equal: for an atom that has become others, these.
        segments: for an atom that is a sum, the axes that lie one after another.
        pins: for an atom that may not shrink, why, in words.
    """

    lengths: list[int] = field(default_factory=list)
    equal: dict[int, Axis] = field(default_factory=dict)
    segments: dict[int, tuple[Axis, ...]] = field(default_factory=dict)
    pins: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def new(self, length: int, reason: str | Sequence[str] = "") -> Axis:
        """An axis of its own; with a reason if it may not shrink."""
        self.lengths.append(length)
        axis = (len(self.lengths) - 1,)
        if reason:
            self.pin(axis, reason)
        return axis

    def axes(self, shape: Sequence[int], reason: str = "") -> Axes:
        """Axes of their own for an array that is computed; those of length 1 need no atom."""
        return tuple(self.new(length, reason) if length != 1 else () for length in shape)

    def expand(self, axis: Axis) -> Axis:
        """The axis in atoms that have not become others."""
        found: list[int] = []
        for atom in axis:
            found.extend(self.expand(self.equal[atom]) if atom in self.equal else (atom,))
        return tuple(found)

    def length(self, axis: Axis) -> int:
        """How many entries an axis has."""
        return math.prod(self.lengths[atom] for atom in axis)

    def left(self, axis: Axis, left: Mapping[int, Any]) -> Any:
        """How many entries an axis has where of some atoms fewer units are left.

        Args:
            axis: of any value.
            left: how many, by atom: numbers, or arrays of numbers.
        """
        found = 1
        for atom in self.expand(axis):
            if atom in self.segments:
                found = found * sum(self.left(part, left) for part in self.segments[atom])
            else:
                found = found * left.get(atom, self.lengths[atom])
        return found

    def smallest(self, axis: Axis) -> list[int]:
        """The atoms of an axis that are neither products nor sums, in order of their places along it."""
        found: list[int] = []
        for atom in self.expand(axis):
            parts = self.segments.get(atom)
            found.extend([atom] if parts is None else [own for part in parts for own in self.smallest(part)])
        return found

    def pin(self, axis: Axis, reason: str | Sequence[str]) -> None:
        """Notes that an axis may not shrink."""
        reasons = (reason,) if isinstance(reason, str) and reason else tuple(reason)
        for atom in self.smallest(axis) if reasons else ():
            self.pins[atom] = tuple(dict.fromkeys((*self.pins.get(atom, ()), *reasons)))

    def pinned(self, axis: Axis) -> tuple[str, ...]:
        """Why no part of an axis may shrink; empty if some may."""
        atoms = self.smallest(axis)
        return self.pins[atoms[0]] if atoms and all(atom in self.pins for atom in atoms) else ()

    def unify(self, first: Axis, second: Axis, reason: str) -> None:
        """Notes that two axes have the same entries, position by position.

        Args:
            first: an axis.
            second: one of the same length, or of length 1 where entries are repeated.
            reason: of what is pinned because it can't be matched.
        """
        ones, others = self.expand(first), self.expand(second)
        if self._settled(ones, others):
            return
        while ones and others:
            one, other = ones[0], others[0]
            a, b = self.lengths[one], self.lengths[other]
            if a == b:
                self._merge(one, other, reason)
            elif 1 in (a, b):
                self.pin((one,) if a == 1 else (other,), reason)
            elif 0 in (a, b) or not self._factored(*((one, b) if a > b else (other, a))):
                break
            ones, others = self.expand(ones), self.expand(others)
            if a == b:
                ones, others = self._without_common(ones, others)
            else:
                ones, others = ones[a == 1 :], others[b == 1 :]
        self.pin((*ones, *others), reason)

    def _settled(self, ones: Axis, others: Axis) -> bool:
        """Whether one side can't shrink at all, so that the other can't, and how they are made does not matter."""
        if len(ones) == len(others) == 1 and self.lengths[ones[0]] == self.lengths[others[0]]:
            return ones == others
        for side, across in ((ones, others), (others, ones)):
            if pins := self.pinned(side):
                self.pin(across, pins[:1])
                return True
        return False

    def _without_common(self, ones: Axis, others: Axis) -> tuple[Axis, Axis]:
        while ones and others and ones[0] == others[0]:
            ones, others = ones[1:], others[1:]
        return ones, others

    def _merge(self, one: int, other: int, reason: str) -> None:
        """Makes two atoms of one length the same."""
        if one == other:
            return
        if one in self.segments and other in self.segments:
            first, second = self.segments[one], self.segments.pop(other)
            self.equal[other] = (one,)
            self._match(first, second, reason)
        else:
            kept, gone = (one, other) if one in self.segments or other not in self.segments else (other, one)
            self.equal[gone] = (kept,)
            self.pin((kept,), self.pins.pop(gone, ()))

    def _factored(self, atom: int, outer: int) -> bool:
        """Makes an atom the product of two, the outer one of that length; False if it can't be."""
        length = self.lengths[atom]
        if length % outer or atom in self.segments:
            return False
        pins = self.pins.pop(atom, ())
        self.equal[atom] = (*self.new(outer), *self.new(length // outer))
        self.pin((atom,), pins)
        return True

    def _match(self, first: Iterable[Axis], second: Iterable[Axis], reason: str) -> None:
        """Unifies two sums of segments."""
        ones, others = self._parts(first), self._parts(second)
        for _ in range(_PIECES):
            if not (ones and others):
                break
            a, b = self.length(ones[0]), self.length(others[0])
            if a == b:
                self.unify(ones.pop(0), others.pop(0), reason)
            else:
                longer = ones if a > b else others
                pieces = self._halves(longer[0], min(a, b))
                if pieces is None:
                    break
                longer[:1] = pieces
            ones, others = self._parts(ones), self._parts(others)
        for axis in (*ones, *others):
            self.pin(axis, reason)

    def _parts(self, axes: Iterable[Axis]) -> list[Axis]:
        """The segments of some axes that lie one after another, in as many as they are known to have."""
        found: list[Axis] = []
        for axis in axes:
            head, *rest = self.expand(axis) or (-1,)
            if head in self.segments:
                found.extend(self._parts((*segment, *rest) for segment in self.segments[head]))
            else:
                found.append(self.expand(axis))
        return found

    def _halves(self, axis: Axis, at: int) -> tuple[Axis, Axis] | None:
        """A segment cut in two; None if the cut would tear an atom that lies inside of others."""
        head, *rest = self.expand(axis)
        inner, length = self.length(tuple(rest)), self.lengths[head]
        if head in self.segments or inner == 0 or at % inner:
            return None
        pins = self.pins.pop(head, ())
        first, second = self.new(at // inner), self.new(length - at // inner)
        self.segments[head] = (first, second)
        self.pin((head,), pins)
        return (*first, *rest), (*second, *rest)

    def cut(self, axis: Axis, lengths: Sequence[int], reason: str) -> list[Axis]:
        """An axis cut into segments of these lengths, all of it; they are pinned if it can't be."""
        pins = self.pinned(axis)
        left, found = self._parts([axis]), []
        for length in () if pins else lengths:
            piece, missing = [], length
            while missing and len(left) < _PIECES:
                have = self.length(left[0])
                if have > missing:
                    halves = self._halves(left[0], missing)
                    if halves is None:
                        break
                    left[:1] = halves
                    continue
                piece.append(left.pop(0))
                missing -= have
            if missing:
                break
            found.append(self.joined(piece))
        if len(found) < len(lengths):
            self.pin(axis, reason)
            return [self.new(length, pins[:1] or reason) for length in lengths]
        return found

    def joined(self, axes: Sequence[Axis]) -> Axis:
        """The axis that some axes are one after another."""
        parts = [part for part in self._parts(axes) if self.length(part)]
        if len(parts) == 1:
            return parts[0]
        whole = self.new(sum(map(self.length, parts)))
        if parts:
            self.segments[whole[0]] = tuple(parts)
        return whole

    def reshaped(self, axes: Axes, shape: Sequence[int], reason: str) -> Axes:
        """The axes after a reshape: each block of axes that splits or merges by itself is done by itself."""
        before = [self.length(axis) for axis in axes]
        found: list[Axis] = [()] * len(shape)
        if 0 in before:
            for axis in axes:
                self.pin(axis, reason)
            return self.axes(shape, reason)
        ones = self._ones(before, shape)
        for index, length in enumerate(before):
            if length == 1:
                if index in ones:
                    found[ones[index]] = axes[index]
                else:
                    self.pin(axes[index], reason)
        for inside, outside in _blocks(before, shape):
            if len(inside) == len(outside) == 1:
                found[outside[0]] = axes[inside[0]]
                continue
            block = tuple(atom for index in inside for atom in axes[index])
            for index, axis in zip(outside, self._dealt(block, [shape[i] for i in outside], reason), strict=True):
                found[index] = axis
        return tuple(found)

    @staticmethod
    def _ones(before: Sequence[int], shape: Sequence[int]) -> dict[int, int]:
        """Which axes of length 1 stay where they are between the others."""
        places: dict[int, list[int]] = {}
        for index, length in enumerate(shape):
            if length == 1:
                places.setdefault(math.prod(shape[:index]), []).append(index)
        found = {}
        for index, length in enumerate(before):
            here = places.get(math.prod(before[:index]), [])
            if length == 1 and here:
                found[index] = here.pop(0)
        return found

    def _dealt(self, block: Axis, lengths: Sequence[int], reason: str) -> list[Axis]:
        """The atoms of some axes dealt out to axes of other lengths; they are pinned if that tears one."""
        left, found = list(self.expand(block)), []
        for length in lengths:
            axis, missing = [], length
            while missing > 1 and left:
                head = self.lengths[left[0]]
                if head == 1:
                    self.pin((left.pop(0),), reason)
                elif missing % head == 0:
                    axis.append(left.pop(0))
                    missing //= head
                elif head > missing and self._factored(left[0], missing):
                    left = list(self.expand(tuple(left)))
                else:
                    break
            if missing > 1:
                break
            found.append(tuple(axis))
        self.pin(tuple(left), reason)
        if len(found) < len(lengths):
            self.pin(block, reason)
            return [self.new(length, self.pinned(block)[:1]) for length in lengths]
        return found


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The axes of a reshape, without those of length 1, in the smallest blocks of equal size before and after."""
    ones = [index for index, length in enumerate(before) if length != 1]
    others = [index for index, length in enumerate(after) if length != 1]
    found, inside, outside = [], [], []
    while ones or others:
        a, b = math.prod(before[i] for i in inside), math.prod(after[i] for i in outside)
        if inside and outside and a == b:
            found.append((inside, outside))
            inside, outside = [], []
        elif a <= b and ones:
            inside = [*inside, ones.pop(0)]
        else:
            outside = [*outside, others.pop(0)]
    return [*found, (inside, outside)] if inside or outside else found
