import itertools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecjax import metrics, moments, networks
from tests import examples

pytestmark = pytest.mark.usefixtures("float64")


def assert_equal(first, second, rtol=1e-9):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12), first, second)


def direct(example, metric="euclidean"):
    """The moments of an MLP's first layer in plain NumPy, from the sensitivities of explicit Jacobians."""
    from tests.jacobians import jacobians

    by_bias = jacobians(example, metric).of("Dense_0/bias")
    weights = np.sum(by_bias**2, axis=1)
    a = np.asarray(example.inputs)
    mean = np.stack([np.average(a, axis=0, weights=w) for w in weights.T], axis=1)
    scatter = np.einsum("ni,nji->ji", weights, (a[:, :, None] - mean) ** 2)
    return moments.LayerMoments(weights.sum(0), mean, scatter)


@pytest.mark.parametrize("metric", ["euclidean", "fisher"])
def test_moments_are_what_they_say(metric):
    example = examples.mlp()
    found = moments.of_inputs(*example, metric=metric, batch_size=7)
    assert found.samples == 23
    assert_equal(found.layers["Dense_0/kernel"], direct(example, metric))


@pytest.mark.parametrize("batch_size", [1, 2, 7, 22, 24])
def test_the_batch_size_does_not_matter(batch_size):
    example = examples.mlp(activation=jnp.tanh)
    assert_equal(moments.of_inputs(*example, batch_size=batch_size), moments.of_inputs(*example, batch_size=23))


@given(split=st.sampled_from([1, 9, 22]), seed=st.integers(0, 99))
def test_merging_parts_gives_the_whole(split, seed):
    example = examples.mlp(seed=seed)
    first = moments.of_inputs(example.network, example.params, example.inputs[:split])
    second = moments.of_inputs(example.network, example.params, example.inputs[split:])
    whole = moments.of_inputs(*example)
    assert_equal(moments.merge(first, second), whole)
    assert_equal(moments.merge(second, first), whole)
    assert_equal(moments.merge(moments.start(*example), whole), whole)


def test_moments_taken_in_different_ways_are_not_merged():
    example, key = examples.mlp(), jax.random.key(0)
    taken = {
        "euclidean": {},
        "fisher": {"metric": "fisher"},
        "temperature": {"metric": metrics.Fisher(2.0)},
        "probes": {"probes": 2, "key": key},
        "other probes": {"probes": 3, "key": key},
        "excluded": {"exclude": "Dense_1/*"},
        "neurons": {"of_weights": False},
    }
    found = {name: moments.of_inputs(*example, **options) for name, options in taken.items()}
    for first, second in itertools.combinations(found, 2):
        with pytest.raises(ValueError, match="these moments were taken in different ways"):
            moments.merge(found[first], found[second])
        if {first, second} != {"fisher", "temperature"}:  # numbers can't be seen there
            with pytest.raises(ValueError, match="these moments were taken in different ways"):
                jax.jit(moments.merge)(found[first], found[second])
    for name, seen in found.items():
        assert float(jax.jit(moments.merge)(seen, seen).samples) == 46
        stored = flax.serialization.to_bytes(seen)
        other = found["fisher" if name != "fisher" else "temperature"]
        assert_equal(flax.serialization.from_bytes(seen, stored), seen, rtol=0)
        with pytest.raises(ValueError, match="these moments were taken in different ways"):
            flax.serialization.from_bytes(other, stored)


def test_one_sample_has_no_scatter():
    example = examples.mlp()
    found = moments.of_inputs(example.network, example.params, example.inputs[:1])
    layer = found.layers["Dense_0/kernel"]
    np.testing.assert_array_equal(layer.scatter, 0)
    np.testing.assert_allclose(layer.mean, jnp.broadcast_to(example.inputs[0][:, None], layer.mean.shape), rtol=1e-12)


def test_probes_estimate_the_sensitivities_without_bias():
    example = examples.mlp(widths=(6, 40), samples=8)
    exact = moments.of_inputs(*example).layers["Dense_0/kernel"].sensitivity
    keys = jax.random.split(jax.random.key(0), 200)
    draws = jax.vmap(lambda key: moments.of_inputs(*example, probes=4, key=key).layers["Dense_0/kernel"].sensitivity)(
        keys
    )
    error = draws.std(0) / np.sqrt(len(keys))
    assert np.all(error > 0)
    assert np.all(np.abs(draws.mean(0) - exact) < 5 * error)


def test_probes_repeat_for_a_key_and_differ_between_batches():
    example = examples.mlp(samples=2)
    twice = example._replace(inputs=jnp.concatenate([example.inputs, example.inputs]))
    key = jax.random.key(3)
    first = moments.of_inputs(*twice, probes=1, key=key, batch_size=2)
    assert_equal(first, moments.of_inputs(*twice, probes=1, key=key, batch_size=2), rtol=0)
    halves = moments.of_inputs(*example, probes=1, key=key, batch_size=2)
    doubled = first.layers["Dense_0/kernel"].sensitivity / 2
    assert not np.allclose(doubled, halves.layers["Dense_0/kernel"].sensitivity)


def mnist_shaped(samples):
    mlp = networks.MLP((300, 100, 10))
    inputs = jax.ShapeDtypeStruct((samples, 784), jnp.float32)
    params = jax.eval_shape(lambda key: mlp.init(key, jnp.zeros((1, 784), jnp.float32))["params"], jax.random.key(0))
    return networks.from_linen(mlp), params, inputs


def test_operations_are_two_gradient_passes():
    with jax.enable_x64(False):
        network, params, inputs = mnist_shaped(1024)
        labels = jax.ShapeDtypeStruct((1024,), jnp.int32)

        def loss(params, inputs, labels):
            return optax.softmax_cross_entropy_with_integer_labels(network(params, inputs), labels).mean()

        gradient = jax.jit(jax.grad(loss)).lower(params, inputs, labels).compile().cost_analysis()
        found = (
            jax.jit(lambda params, inputs: moments.of_inputs(network, params, inputs))
            .lower(params, inputs)
            .compile()
            .cost_analysis()
        )
    assert 1.8 < found["flops"] / gradient["flops"] < 2.1


def test_memory_does_not_grow_with_the_samples():
    def temporary_bytes(samples):
        network, params, inputs = mnist_shaped(samples)
        compiled = jax.jit(lambda params, inputs: moments.of_inputs(network, params, inputs)).lower(params, inputs)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    with jax.enable_x64(False):
        few, many = temporary_bytes(2_048), temporary_bytes(65_536)
    assert many < 1.01 * few
    assert many < 1_024 * 266_200  # no array of samples times weights, not even within a batch


def test_a_second_call_compiles_nothing(compilations):
    example = examples.mlp(samples=50)
    moments.of_inputs(*example)
    before = compilations()
    assert before > 0
    others = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.5, example.params)
    moments.of_inputs(example.network, others, example.inputs)
    assert compilations() == before


@pytest.mark.parametrize("of_weights", [True, False])
def test_padding_counts_for_nothing_however_large_it_is(of_weights):
    """In float32, where the spread around a mean that padding had moved would be lost to rounding."""
    with jax.enable_x64(False):
        network, params, inputs = examples.mlp(samples=250)
        padded = jnp.concatenate([inputs, 1e5 * jnp.ones((50, inputs.shape[1]))])
        weights = jnp.concatenate([jnp.ones(250), jnp.zeros(50)])
        alone = moments.of_inputs(network, params, inputs, of_weights=of_weights)
        among = moments.of_inputs(network, params, padded, weights=weights, of_weights=of_weights)
    assert alone.layers.keys() == among.layers.keys()
    for kernel, layer in alone.layers.items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), layer, among.layers[kernel])
