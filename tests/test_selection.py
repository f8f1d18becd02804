"""The smallest entries by counting, against a stable argsort of all together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecjax import networks, prune, score
from ecjax.prune import selection
from tests import examples

SHAPES = ((3, 4), (0, 2), (11,), ())  # 24 entries
# The bits of zeros, numbers too small to be normal, the smallest and the largest normal ones, infinity and NaN.
SPECIAL = {
    "float16": (0, 1, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0x7C01),
    "bfloat16": (0, 1, 0x7F, 0x80, 0x7F7F, 0x7F80, 0x7F81),
    "float32": (0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001),
    "float64": (0, 1, 2**52 - 1, 2**52, 0x7FEFFFFFFFFFFFFF, 0x7FF << 52, (0x7FF << 52) + 1),
}


def by_argsort(arrays, count):
    """True for the smallest, from all entries in one sorted row."""
    dtype = jnp.result_type(*arrays)
    flat = np.concatenate([np.asarray(array).astype(dtype).ravel() for array in arrays])
    if dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        flat = np.where(np.abs(flat) < jnp.finfo(dtype).tiny, 0, flat)
    if jnp.issubdtype(dtype, jnp.floating):
        flat = np.where(np.isnan(flat), np.nan, flat.astype(np.float64))
    chosen = np.zeros(flat.size, bool)
    chosen[np.argsort(flat, kind="stable")[: max(int(count), 0)]] = True
    parts = np.split(chosen, np.cumsum([array.size for array in arrays])[:-1])
    return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]


def draw(dtype, kind, seed):
    """Arrays of any bits of a dtype, of its special numbers, or of a few whole numbers."""
    generator = np.random.default_rng(seed)
    dtype = jnp.dtype(dtype)
    bits = np.dtype(f"uint{8 * dtype.itemsize}")
    special = np.array(SPECIAL.get(dtype.name, range(7)), bits)

    def one(shape):
        if kind == "few":
            return jnp.asarray(generator.integers(0, 3, shape)).astype(dtype)
        if kind == "any":
            words = generator.integers(0, np.iinfo(bits).max, shape, bits, endpoint=True)
        else:
            words = generator.choice(special, shape) | (
                generator.choice(np.array([0, 1], bits), shape) << bits.type(8 * bits.itemsize - 1)
            )
        return jnp.asarray(np.asarray(words, bits).view(dtype))

    return [one(shape) for shape in SHAPES]


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int32", "int8", "uint32", "int64"])
@given(kind=st.sampled_from(["any", "special", "few"]), seed=st.integers(0, 999), count=st.integers(-1, 25))
def test_the_same_as_by_a_stable_sort(dtype, kind, seed, count):
    with jax.enable_x64(dtype.endswith("64")):
        arrays = draw(dtype, kind, seed)
        expected = by_argsort(arrays, count)
        assert_equal(selection.smallest_of(arrays, count), expected)
        assert_equal(selection.smallest_of(arrays, jnp.float32(count)), expected)


@pytest.mark.parametrize("dtype", SPECIAL)
def test_ties_are_those_of_the_sort_of_xla(dtype):
    with jax.enable_x64(dtype == "float64"):
        values = jnp.concatenate([array.ravel() for array in draw(dtype, "special", 0)])
        first = np.asarray(jnp.argsort(values, stable=True))
        for count in range(0, values.size + 1, 3):
            assert set(np.flatnonzero(prune.smallest(values, count))) == set(first[:count])


@pytest.fixture
def words_of_8_bits(monkeypatch):
    """Counts of up to 2**16 instead of 2**64: arrays that they have to be counted in two words for are small."""
    monkeypatch.setattr(selection, "_WORD", np.uint8)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("words_of_8_bits", "without_checked_types")
@pytest.mark.parametrize("levels", [1, 3, 100_000])
def test_more_entries_than_a_word_can_count(levels):
    generator = np.random.default_rng(0)
    shapes = (7, 20, 25), (50,), (3, 200)  # 4150 entries
    arrays = [jnp.asarray(generator.integers(0, levels, shape), jnp.float32) for shape in shapes]
    for count in (0, 1, 255, 256, 257, 3499, 3500, 3520, 4000, 4150, 20_000):
        expected = by_argsort(arrays, count)
        assert_equal(selection.smallest_of(arrays, count), expected)
        assert_equal(selection.smallest_of(arrays, jnp.int32(count)), expected)


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("int32", "float16"), ("int8", "uint8")])
def test_arrays_of_several_dtypes(dtypes):
    arrays = [draw(dtype, "few", seed)[0] for seed, dtype in enumerate(dtypes)]
    for count in (3, 11, 20):
        assert_equal(selection.smallest_of(arrays, count), by_argsort(arrays, count))


def test_under_jit_and_vmap_with_a_count_for_each():
    generator = np.random.default_rng(0)
    stacked = [jnp.asarray(generator.integers(-3, 3, (4, *shape)), jnp.float32) for shape in SHAPES]
    counts = jnp.array([0, 7, 19, 24])
    found = jax.jit(jax.vmap(selection.smallest_of))(stacked, counts)
    for member, count in enumerate(counts):
        assert_equal([each[member] for each in found], by_argsort([each[member] for each in stacked], count))


@functools.cache
def one_shot(scope, traced):
    function = functools.partial(prune.one_shot, scope=scope)
    return jax.jit(function) if traced else function


@given(
    sparsity=st.floats(0, 1, width=32),
    seed=st.integers(0, 99),
    scope=st.sampled_from(prune.SCOPES),
    traced=st.booleans(),
)
def test_masks_of_every_scope_are_those_of_a_stable_sort(sparsity, seed, scope, traced):
    example = examples.mlp()
    generator = np.random.default_rng(seed)
    levels = jnp.array([0.0, -0.0, 1e-40, 0.5, 1.0, 2.0, 1e38])
    draw = lambda leaf: levels[generator.integers(0, len(levels), leaf.shape)]  # noqa: E731
    importance = jax.tree.map(draw, examples.kernels(example.params))
    scores = score.Scores(importance, layers=networks.layers(*example))
    masks = jax.tree.leaves(one_shot(scope, traced)(example.params, scores, jnp.float32(sparsity)).masks)
    leaves = jax.tree.leaves(importance)
    if scope == "neuron":
        leaves = [column for leaf in leaves for column in leaf.T]
        masks = [column for mask in masks for column in mask.T]
    groups = [leaves] if scope == "network" else [[leaf] for leaf in leaves]
    kept = iter(masks)
    for group in groups:
        weights = sum(leaf.size for leaf in group)
        removed = round(float(jnp.float32(sparsity) * weights) if traced else float(jnp.float32(sparsity)) * weights)
        for expected in by_argsort(group, removed):
            np.testing.assert_array_equal(next(kept), ~expected)


@pytest.mark.usefixtures("without_checked_types")
def test_counts_that_no_whole_number_is():
    values = jnp.array([3.0, 1.0, 2.0])
    for count, expected in ((1.5, 2), (np.float32(1.5), 2), (jnp.float32(1.5), 2), (np.inf, 3), (jnp.inf, 3), (-1, 0)):
        assert prune.smallest(values, count).sum() == expected
    assert prune.smallest(np.array([3, 1, 2]), 1).tolist() == [False, True, False]
    assert prune.smallest(jnp.array([True, False]), 1).tolist() == [False, True]


@pytest.mark.usefixtures("without_checked_types")
def test_complex_values():
    with pytest.raises(ValueError, match="values are complex64; they must be real numbers to be ranked"):
        prune.smallest(jnp.array([1j, 2.0]), 1)


@pytest.mark.usefixtures("words_of_8_bits", "without_checked_types")
def test_an_axis_that_is_too_long():
    with pytest.raises(ValueError, match=r"values of shape \(256,\): no axis may be longer than 255"):
        prune.smallest(jnp.zeros(256), 1)


def test_float64_where_jax_has_none():
    with jax.enable_x64(True):
        values = jnp.array([1.0 + 1e-12, 1.0, -2.0])
    assert prune.smallest(values, 2).tolist() == [True, False, True]  # both ones are equal in float32
