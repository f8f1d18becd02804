import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ecjax import graph, networks
from tests import examples

pytestmark = pytest.mark.usefixtures("float64")


def tapped(example, taps=None):
    reading = graph.read(*example)
    taps = graph.zero_taps(reading.layers, example.params, len(example.inputs)) if taps is None else taps
    return graph.tapped(reading, example.params, example.inputs, taps)


@pytest.mark.parametrize("name", examples.DENSE_EXAMPLES)
def test_zero_taps_change_nothing(name):
    example = examples.DENSE_EXAMPLES[name]()
    outputs, layer_inputs = tapped(example)
    np.testing.assert_allclose(outputs, example.network(example.params, example.inputs), rtol=1e-12, atol=1e-14)
    kernels = networks.by_path(examples.kernels(example.params))
    assert {path: a.shape for path, a in layer_inputs.items()} == {
        path: (len(example.inputs), kernel.shape[0]) for path, kernel in kernels.items()
    }


@pytest.mark.parametrize("name", examples.DENSE_EXAMPLES)
def test_a_tap_acts_like_the_bias_next_to_it(name):
    example = examples.DENSE_EXAMPLES[name]()
    leaves = networks.by_path(example.params)
    for path in networks.by_path(examples.kernels(example.params)):
        bias = examples.bias_path(path)
        shift = jnp.linspace(-1, 1, leaves[bias].size)
        outputs, _ = tapped(example, {path: jnp.broadcast_to(shift, (len(example.inputs), shift.size))})
        shifted = networks.replace(example.params, {bias: leaves[bias] + shift})
        np.testing.assert_allclose(outputs, example.network(shifted, example.inputs), rtol=1e-12, atol=1e-12)


def test_layer_inputs_are_what_the_kernels_multiply():
    example = examples.mlp(activation=jnp.tanh)
    _, layer_inputs = tapped(example)
    first = example.params["Dense_0"]
    np.testing.assert_array_equal(layer_inputs["Dense_0/kernel"], example.inputs)
    np.testing.assert_allclose(
        layer_inputs["Dense_1/kernel"], jnp.tanh(example.inputs @ first["kernel"] + first["bias"]), rtol=1e-12
    )


def test_bfloat16_compute_keeps_float32_taps():
    with jax.enable_x64(False):
        example = examples.of_module(networks.MLP((6, 3), dtype=jnp.bfloat16), examples.inputs())
        taps = graph.zero_taps(networks.layers(*example), example.params, len(example.inputs))
        assert {tap.dtype for tap in taps.values()} == {jnp.dtype("float32")}
        outputs, layer_inputs = tapped(example, taps)
        assert layer_inputs["Dense_1/kernel"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            np.asarray(outputs, np.float32), np.asarray(example.network(example.params, example.inputs), np.float32)
        )


def test_walks_under_vmap_over_seeds():
    example = examples.mlp()
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), example.params)
    outputs, _ = jax.vmap(lambda params: tapped(example._replace(params=params), {}))(stacked)
    expected = jax.vmap(example.network, in_axes=(0, None))(stacked, example.inputs)
    np.testing.assert_allclose(outputs, expected, rtol=1e-12)


def layer(width=4, features=5, **leaves):
    generator = np.random.default_rng(0)
    return {"kernel": jnp.asarray(generator.normal(size=(features, width))), "bias": jnp.zeros(width)} | leaves


@pytest.mark.parametrize(
    "network",
    [
        lambda p, x: (p["kernel"].T @ x.T).T + p["bias"],
        lambda p, x: (lax.dot_general(p["kernel"], x.T, (((0,), (0,)), ((), ())))).T + p["bias"],
        lambda p, x: lax.dot_general(x.T, p["kernel"].T, (((0,), (1,)), ((), ()))) + p["bias"],
        jax.vmap(lambda p, x: p["kernel"].T @ x + p["bias"], in_axes=(None, 0)),
    ],
    ids=["kernel.T @ x.T", "kernel on the left", "both transposed", "vmap of kernel.T @ x"],
)
def test_follows_a_transposed_kernel(network):
    params, inputs = layer(), examples.inputs()
    tap = examples.inputs(features=4, seed=1)
    outputs, layer_inputs = tapped(examples.Example(network, params, inputs), {"kernel": tap})
    np.testing.assert_allclose(outputs, inputs @ params["kernel"] + tap + params["bias"], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(layer_inputs["kernel"], inputs)
