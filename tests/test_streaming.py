"""Moments of batches that come one after another are the moments of all samples at once."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecjax import _checksum, moments, prune, score
from tests import examples

pytestmark = pytest.mark.usefixtures("float64")


def assert_equal(first, second, rtol=1e-9):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12), first, second)


def parts(inputs, sizes):
    return np.split(np.asarray(inputs), np.cumsum(sizes)[:-1])


@given(ends=st.sets(st.integers(1, 22), max_size=4))
def test_batches_of_any_sizes_are_one_array(ends):
    example = examples.mlp((6, 3))
    batches = np.split(np.asarray(example.inputs), sorted(ends))
    streamed = moments.of_batches(example.network, example.params, batches, metric="fisher")
    whole = moments.of_inputs(*example, metric="fisher", batch_size=7)
    assert streamed.samples == 23
    assert_equal(streamed, whole)


def test_scores_of_a_generator():
    example = examples.mlp(samples=100)
    batches = (jnp.asarray(part) for part in parts(example.inputs, [50, 13, 37]))
    seen = moments.of_batches(example.network, example.params, batches, batch_size=16)
    damage = score.optimal_brain_damage_from_moments(example.params, seen)
    assert_equal(damage, score.optimal_brain_damage(*example))
    scores = score.elimination_compensation_from_moments(example.params, seen)
    assert_equal(scores, score.elimination_compensation(*example))
    masks, expected = (
        prune.one_shot(example.params, found, 0.7).masks for found in (scores, score.elimination_compensation(*example))
    )
    jax.tree.map(np.testing.assert_array_equal, masks, expected)


def test_scores_of_neurons():
    example = examples.mlp(samples=30)
    seen = moments.of_batches(example.network, example.params, parts(example.inputs, [11, 19]), of_weights=False)
    found = score.neuron_elimination_compensation_from_moments(example.params, seen)
    assert_equal(found, score.neuron_elimination_compensation(*example))


def test_one_layer_has_no_neurons_to_score():
    example = examples.mlp((3,))
    seen = moments.of_batches(example.network, example.params, parts(example.inputs, [11, 12]), of_weights=False)
    assert seen.samples == 23
    assert score.neuron_elimination_compensation_from_moments(example.params, seen).importance == {}


def test_two_machines_and_a_file_between():
    example = examples.mlp(samples=40)
    first, second, third = parts(example.inputs, [9, 20, 11])
    update = functools.partial(moments.update, network=example.network, params=example.params)
    here = update(moments.start(*example), inputs=first)
    stored = flax.serialization.to_bytes(here)
    here = update(flax.serialization.from_bytes(moments.start(*example), stored), inputs=second)
    there = update(moments.start(*example), inputs=third)
    assert_equal(moments.merge(here, there), moments.of_inputs(*example))


def test_probes_of_one_key_differ_from_batch_to_batch():
    example = examples.mlp(samples=2)
    options = {"probes": 1, "key": jax.random.key(3)}
    twice = moments.of_batches(example.network, example.params, [example.inputs, example.inputs], **options)
    once = moments.of_inputs(*example, **options)
    doubled, single = (seen.layers["Dense_0/kernel"].sensitivity for seen in (twice, once))
    assert not np.allclose(doubled, 2 * single)
    again = moments.of_batches(example.network, example.params, [example.inputs, example.inputs], **options)
    assert_equal(twice, again, rtol=0)


def test_many_sizes_compile_few_functions(compilations):
    example = examples.mlp(samples=64)
    arrays = [np.asarray(example.inputs[:size]) for size in range(33, 65)]
    moments.of_batches(example.network, example.params, arrays[:1])
    before = compilations()
    moments.of_batches(example.network, example.params, arrays)
    assert compilations() == before


def test_bad_moments_are_refused():
    example, other = examples.mlp(), examples.mlp(widths=(8, 3))
    nothing = moments.start(*example)
    with pytest.raises(ValueError, match="moments are of no samples; update them"):
        score.elimination_compensation_from_moments(example.params, nothing)
    with pytest.raises(ValueError, match="not a single batch"):
        moments.of_batches(example.network, example.params, [])
    with pytest.raises(ValueError, match=r"moments of other layers: .*'Dense_2/kernel'"):
        score.optimal_brain_damage_from_moments(example.params, moments.of_inputs(*other))
    with pytest.raises(ValueError, match="moments of other layers"):
        moments.update(nothing, other.network, other.params, other.inputs)
    of_neurons = moments.of_inputs(*example, of_weights=False)
    with pytest.raises(ValueError, match="moments of other layers"):
        score.elimination_compensation_from_moments(example.params, of_neurons)
    dirty = example.inputs[:21].at[4, 2].set(np.nan)
    wrong = (
        r"batch 2: inputs of shape \(21, 5\) hold NaN or infinity, at first in sample 4; .* call moments.update in a"
    )
    with pytest.raises(ValueError, match=wrong):
        moments.of_batches(example.network, example.params, [example.inputs, dirty])
    with pytest.raises(ValueError, match=r"batches is one array, of shape \(23, 5\); give a list"):
        moments.of_batches(*example)


def test_moments_of_other_params_are_refused():
    """What samples say holds for the params that they went through, to the last bit; bits are told by their place."""
    network, params, inputs = examples.mlp(samples=20)
    other = jax.tree.map(lambda leaf: leaf, params)
    other["Dense_0"]["kernel"] = params["Dense_0"]["kernel"][::-1]
    seen = moments.of_inputs(network, params, inputs)
    begun = moments.start(network, params, inputs)
    message = "these moments are of other params"
    with pytest.raises(ValueError, match=message):
        moments.update(seen, network, other, inputs)
    with pytest.raises(ValueError, match=message):
        moments.merge(seen, moments.update(begun, network, other, inputs))
    for call in (score.elimination_compensation_from_moments, score.optimal_brain_damage_from_moments):
        with pytest.raises(ValueError, match=message):
            call(other, seen)
    whole = moments.of_inputs(network, params, inputs, of_weights=False)
    with pytest.raises(ValueError, match=message):
        score.neuron_elimination_compensation_from_moments(other, whole)
    same = jax.tree.map(np.asarray, params)
    merged = moments.merge(moments.merge(begun, seen), moments.update(begun, network, same, inputs))
    assert score.elimination_compensation_from_moments(params, merged).importance is not None
    traced = jax.jit(lambda params, inputs: moments.of_inputs(network, params, inputs))(params, inputs)
    assert traced.params == 0
    assert moments.update(traced, network, other, inputs).params > 0  # nothing tells what was traced


@pytest.mark.parametrize("dtype", [jnp.int4, jnp.bfloat16, jnp.int8, bool, jnp.complex64])
def test_arrays_of_any_numbers_have_a_sum(dtype):
    one = jnp.arange(8).astype(dtype)
    assert _checksum.of_array(one) != _checksum.of_array(one[::-1])
    assert _checksum.of_params([one, one[:2]]) != _checksum.of_params([one[:2], one])
