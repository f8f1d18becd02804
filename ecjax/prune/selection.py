"""Which entries of several arrays are the smallest, ties by position: found by counting, without a sort.

Numbers become unsigned integers in the same order. The highest bound that has at most ``count`` entries below it is
found bit by bit, by asking "how many are below?": 16 passes over the arrays, 32 where numbers have 64 bits. If fewer
are below than are wanted, the first of the entries equal to the bound are wanted too, and up to which position is found
in the same way.

A pass compares entries and sums, array by array. Nothing is put together, so arrays that are spread over devices stay
where they are and only counts travel. Counts have two words: JAX has no integers of 64 bits unless it is asked to.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Real, UInt

_WORD = np.uint32
Words = tuple[Array, ...]


class Count(NamedTuple):
    """Whole numbers of at least 0, ``high * 2**32 + low``."""

    high: UInt[Array | np.uint32, "..."]
    low: UInt[Array | np.uint32, "..."]


def smallest(values: Real[Array | np.ndarray, "*shape"], count: int | float | Array) -> Bool[Array, "*shape"]:
    """True for the ``count`` smallest values, the earlier ones first among equals.

    Zeros are equal whatever their sign, and so are numbers too small to be normal ones in float32, bfloat16 or float64,
    as XLA's CPU has them; NaN comes last.

    Args:
        values: any real numbers, one for each weight.
        count: how many; may be traced.

    Raises:
        ValueError: complex values, or an axis of 2**32 entries and more.

    Example:
        >>> prune.smallest(jnp.array([3.0, 1.0, 2.0, 1.0]), 2).tolist()
        [False, True, False, True]
    """
    return smallest_of((values,), count)[0]


def smallest_of(arrays: Sequence[Array | np.ndarray], count: int | float | Array) -> tuple[Bool[Array, "..."], ...]:
    """True for the ``count`` smallest entries of several arrays together, the earlier ones first among equals.

    Args:
        arrays: of real numbers, in the order of their positions.
        count: how many; may be traced.

    Raises:
        ValueError: complex entries, or an axis of 2**32 entries and more.
    """
    for array in arrays:
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise ValueError(f"values are {array.dtype}; they must be real numbers to be ranked")
        if max(array.shape, default=0) > np.iinfo(_WORD).max:
            raise ValueError(f"values of shape {array.shape}: no axis may be longer than {np.iinfo(_WORD).max}")
    return _smallest(tuple(arrays), _as_count(count)) if arrays else ()


@jax.jit
def _smallest(arrays: tuple[Array, ...], count: Count) -> tuple[Array, ...]:
    dtype = jnp.result_type(*arrays)
    word = jax.eval_shape(_ordered, jax.ShapeDtypeStruct((), dtype)).dtype
    shapes = [array.shape for array in arrays]

    def read(after):
        """The entries as ordered integers, and their positions.

        Anew in every pass: the compiler would keep both, which takes more memory than the arrays.
        """
        (here, zero), _ = lax.optimization_barrier(((arrays, jnp.zeros((), _WORD)), after))
        return [_ordered(array.astype(dtype)) for array in here], _positions(shapes, zero)

    def below(bounds):
        return _totals([[each < bound for (bound,) in bounds] for each in read(bounds)[0]])

    def equal_before(places):
        entries = zip(*read(places), strict=True)
        return _totals([[(each == bound) & _is_less(at, place) for place in places] for each, at in entries])

    (bound,), found = _highest(below, count, [(word, 8 * word.itemsize)])
    place, _ = _highest(equal_before, _minus(count, found), _bits_of_positions(shapes))
    entries = zip(*read(place), strict=True)
    return tuple((each < bound) | ((each == bound) & _is_less(at, place)) for each, at in entries)


def _highest(below: Callable[[list[Words]], Count], count: Count, bits: Sequence[tuple[np.dtype, int]]):
    """The highest number that has at most ``count`` entries below it, and how many; 0 if none are asked for.

    Two bits are found in a pass, by three questions: to read the arrays takes longer than to compare.

    Args:
        below: how many entries are below each of three numbers, given in words, the highest word first.
        count: how many there may be.
        bits: of each word, its dtype and how many bits are looked for.
    """
    steps = [(word, bit) for word, (_, length) in enumerate(bits) for bit in reversed(range(0, length, 2))]
    # For each word the lower of the two bits of each step, or 0 while it is another word's turn.
    ones = [
        jnp.array([dtype.type(1 << bit if here == word else 0) for here, bit in steps], dtype)
        for word, (dtype, _) in enumerate(bits)
    ]

    def with_next_bits(step, best):
        words, found = best

        def with_digit(digit):
            return tuple(word | one[step] * digit.astype(word.dtype) for word, one in zip(words, ones, strict=True))

        higher = below([with_digit(np.uint8(digit)) for digit in (1, 2, 3)])
        digit = jnp.sum(~_is_less(count, higher))
        return with_digit(digit), jax.tree.map(lambda one, three: jnp.append(one, three)[digit], found, higher)

    start = tuple(jnp.zeros((), dtype) for dtype, _ in bits), Count(jnp.zeros((), _WORD), jnp.zeros((), _WORD))
    return lax.fori_loop(0, jnp.where(_is_less(_as_count(0), count), len(steps), 0), with_next_bits, start)


def _ordered(values: Real[Array, "*shape"]) -> UInt[Array, "*shape"]:
    """Unsigned integers in the same order.

    All in integers, as compilers take a comparison of floats as a chance to be clever with what is not normal.
    """
    floating = jnp.issubdtype(values.dtype, jnp.floating)
    if values.dtype.itemsize < 4:
        values = values.astype(jnp.float32 if floating else jnp.int32)
    bits = np.dtype(f"uint{8 * values.dtype.itemsize}")
    words, sign = lax.bitcast_convert_type(values, bits), bits.type(1 << (8 * bits.itemsize - 1))
    if jnp.issubdtype(values.dtype, jnp.unsignedinteger):
        return words
    if not floating:
        return words ^ sign
    normal, infinite, nan = (
        np.array(limit, values.dtype).view(bits) for limit in (jnp.finfo(values.dtype).tiny, np.inf, np.nan)
    )
    size = words & ~sign
    words = jnp.where(size < normal, 0, jnp.where(size > infinite, nan, words))
    return jnp.where(words < sign, words | sign, ~words)


def _positions(shapes: Sequence[tuple[int, ...]], zero: UInt[Array, ""]) -> list[Words]:
    """Where the entries of several arrays are: in which block, counted on from array to array, and where in it.

    A block has as many of the last axes as one word can count.
    """
    positions, blocks = [], 0
    for shape in shapes:
        axes = _axes_of_blocks(shape)
        within = _flat_index(shape, range(axes, len(shape)), zero)
        positions.append((_flat_index(shape, range(axes), zero) + _WORD(blocks), within))
        blocks += math.prod(shape[:axes])
    return positions


def _bits_of_positions(shapes: Sequence[tuple[int, ...]]) -> list[tuple[np.dtype, int]]:
    """Of both words of a position, their dtype and how many bits it takes to be beyond all."""
    blocks = sum(math.prod(shape[: _axes_of_blocks(shape)]) for shape in shapes)
    longest = max(math.prod(shape[_axes_of_blocks(shape) :]) for shape in shapes)
    return [(np.dtype(_WORD), number.bit_length()) for number in (blocks, longest)]


def _axes_of_blocks(shape: tuple[int, ...]) -> int:
    """How many axes come before those of a block."""
    axes, entries = len(shape), 1
    while axes and entries * shape[axes - 1] <= np.iinfo(_WORD).max:
        axes -= 1
        entries *= shape[axes]
    return axes


def _flat_index(shape: tuple[int, ...], axes: range, zero: UInt[Array, ""]) -> UInt[Array, "..."]:
    """The index of each entry along some consecutive axes taken as one."""
    index = zero
    for axis in axes:
        index = index * _WORD(shape[axis]) + lax.broadcasted_iota(_WORD, shape, axis)
    return index


def _totals(chosen: Sequence[Sequence[Bool[Array, "..."]]]) -> Count:
    """How many entries of several arrays are true, for each of several questions: in a block in one word, then in two.

    All questions are one reduction: each array is read once.
    """
    counts = []
    for here in chosen:
        axes, ndim = _axes_of_blocks(here[0].shape), here[0].ndim
        words = [answer.astype(_WORD) for answer in here]
        low = jnp.stack(lax.reduce(words, [_WORD(0)] * len(here), _each_plus, tuple(range(axes, ndim))))
        counts.append(_sum(Count(jnp.zeros_like(low), low), axes=range(1, axes + 1)))
    return _sum(jax.tree.map(lambda *words: jnp.stack(words), *counts), axes=range(1))


def _each_plus(some, others):
    return [one + other for one, other in zip(some, others, strict=True)]


def _sum(counts: Count, axes: range) -> Count:
    """The sum of arrays of counts along some axes."""
    return Count(*lax.reduce(counts, Count(_WORD(0), _WORD(0)), _plus, tuple(axes))) if axes else counts


def _as_count(number: Any) -> Count:
    """A number as a count: 0 if it is below, the next whole number if it is none."""
    bits = np.iinfo(_WORD).bits
    if isinstance(number, int | float | np.number):
        number = math.ceil(min(max(number, 0), 1 << (2 * bits - 1)))
        return Count(_WORD(number >> bits), _WORD(number % (1 << bits)))
    number = jnp.maximum(number, 0)
    if jnp.issubdtype(number.dtype, jnp.floating):
        number = jnp.ceil(number.astype(jnp.promote_types(number.dtype, jnp.float32)))
        number = jnp.minimum(number, 2.0 ** (2 * bits - 1))
        high = jnp.floor(number / 2.0**bits)
        return Count(high.astype(_WORD), (number - high * 2.0**bits).astype(_WORD))
    high = number >> bits if 8 * number.dtype.itemsize > bits else jnp.zeros_like(number)
    return Count(high.astype(_WORD), number.astype(_WORD))


def _plus(one, other) -> Count:
    low = one[1] + other[1]
    return Count(one[0] + other[0] + (low < other[1]), low)


def _minus(one: Count, other: Count) -> Count:
    """The difference, or 0 if it is below."""
    low = one.low - other.low
    high = one.high - other.high - (one.low < other.low)
    negative = _is_less(one, other)
    return Count(jnp.where(negative, 0, high), jnp.where(negative, 0, low))


def _is_less(one: Count | Words, other: Count | Words) -> Bool[Array | np.ndarray | np.bool, "..."]:
    """Of numbers in two words, the high one first."""
    return (one[0] < other[0]) | ((one[0] == other[0]) & (one[1] < other[1]))
