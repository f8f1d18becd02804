import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ecjax import capture, networks
from tests import examples

pytestmark = pytest.mark.usefixtures("float64")


def tapped(example, taps=None, biased=True):
    taps = capture.zero_taps(example.params, len(example.inputs)) if taps is None else taps
    return capture.tapped(example.network, example.params, example.inputs, taps, biased=biased)


@pytest.mark.parametrize("name", examples.DENSE_EXAMPLES)
def test_zero_taps_change_nothing(name):
    example = examples.DENSE_EXAMPLES[name]()
    outputs, layer_inputs = tapped(example)
    np.testing.assert_allclose(outputs, example.network(example.params, example.inputs), rtol=1e-12, atol=1e-14)
    kernels = networks.by_path(networks.kernels(example.params))
    assert {path: a.shape for path, a in layer_inputs.items()} == {
        path: (len(example.inputs), kernel.shape[0]) for path, kernel in kernels.items()
    }


@pytest.mark.parametrize("name", examples.DENSE_EXAMPLES)
def test_a_tap_acts_like_the_bias_next_to_it(name):
    example = examples.DENSE_EXAMPLES[name]()
    leaves = networks.by_path(example.params)
    for path in networks.by_path(networks.kernels(example.params)):
        bias = networks.bias_path(path)
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
        taps = capture.zero_taps(example.params, len(example.inputs))
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


def refused(network, params, match, inputs=None, biased=True):
    example = examples.Example(network, params, examples.inputs() if inputs is None else inputs)
    with pytest.raises(ValueError, match=match):
        tapped(example, {}, biased)


def test_refuses_a_network_without_kernels():
    refused(lambda params, x: x * params["scale"], {"scale": jnp.ones(5)}, "no dense layer.*scale")


def test_refuses_a_missing_or_misshapen_bias():
    params = {"only": {"kernel": layer()["kernel"]}}
    message = "'only/kernel' needs a sibling bias of shape .4,.*missing.*optimal_brain_damage"
    refused(lambda params, x: x @ params["only"]["kernel"], params, message)
    scalar = {"only": layer(bias=jnp.zeros(()))}
    refused(lambda p, x: x @ p["only"]["kernel"] + p["only"]["bias"], scalar, "'only/bias' has shape")
    outputs, _ = tapped(
        examples.Example(lambda p, x: x @ p["only"]["kernel"], params, examples.inputs()), {}, biased=False
    )
    assert outputs.shape == (23, 4)


def test_refuses_a_kernel_used_twice():
    params = {"shared": layer(5)}

    def network(params, x):
        for _ in range(2):
            x = jnp.tanh(x @ params["shared"]["kernel"] + params["shared"]["bias"])
        return x

    refused(network, params, "'shared/kernel' is used twice.*by_definition")


def test_refuses_a_convolution():
    example = examples.convolution()
    refused(example.network, example.params, "'conv/kernel' enters the operation 'conv_gen.*by_def", example.inputs)


def test_refuses_a_scan():
    params = {"cell": layer(5)}

    def network(params, x):
        def step(state, _):
            return jnp.tanh(state @ params["cell"]["kernel"] + params["cell"]["bias"]), None

        return lax.scan(step, x, length=3)[0]

    refused(network, params, "'cell/kernel' enters the operation 'scan'.*by_definition")


def test_refuses_inputs_of_another_rank():
    params = {"head": layer(2, features=3)}

    def network(params, x):
        return (x @ params["head"]["kernel"] + params["head"]["bias"]).mean(1)

    sequences = examples.inputs(features=12).reshape(23, 4, 3)
    refused(network, params, r"'head/kernel' multiplies an array of shape \(23, 4, 3\).*by_definition", sequences)


def test_refuses_more_rows_than_samples():
    params = {"head": layer(2, features=3)}

    def network(params, x):
        rows = x.reshape(-1, 3) @ params["head"]["kernel"] + params["head"]["bias"]
        return rows.reshape(len(x), -1)

    refused(network, params, "with 23 samples", examples.inputs(features=12).reshape(23, 4, 3))


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


def test_refuses_products_that_only_look_like_a_layer():
    square, few = layer(5), examples.inputs(samples=5)
    along_outputs = lambda p, x: x @ p["kernel"].T + p["bias"]  # noqa: E731
    refused(along_outputs, square, r"'kernel' multiplies .* takes \(samples, in\) @ kernel.*by_definition")
    across_samples = lambda p, x: p["kernel"].T @ x.T + p["bias"]  # noqa: E731
    refused(across_samples, square, "its bias 'bias' is not simply added", few)


def test_refuses_a_kernel_that_is_changed_first():
    scaled = lambda params, x: x @ (params["kernel"] * 2) + params["bias"]  # noqa: E731
    refused(scaled, layer(), "'kernel' enters the operation 'mul'")


def test_refuses_a_kernel_that_is_not_used():
    params = {"used": layer(), "unused": layer()}
    refused(
        lambda p, x: x @ p["used"]["kernel"] + p["used"]["bias"],
        params,
        "'unused/kernel' is not multiplied by anything",
    )


@pytest.mark.parametrize(
    "network",
    [
        lambda p, x: x @ p["kernel"] + 2 * p["bias"],
        lambda p, x: jnp.tanh(x @ p["kernel"]) + p["bias"],
        lambda p, x: x @ p["kernel"] + p["bias"] + p["bias"].sum(),
        lambda p, x: (z := x @ p["kernel"]) + p["bias"] + z**2,
        lambda p, x: x @ p["kernel"],
    ],
    ids=["scaled bias", "bias after the activation", "bias used twice", "product used twice", "bias not used"],
)
def test_refuses_a_bias_that_is_not_simply_added(network):
    refused(network, layer(), "its bias 'bias' is not simply added to its product.*by_definition")


def test_refuses_outputs_that_are_not_one_matrix():
    network = lambda p, x: (x @ p["kernel"] + p["bias"])[:, 0]  # noqa: E731
    refused(network, layer(), r"one array of shape \(samples, outputs\).*\(23,\)")
    pair = lambda p, x: (x @ p["kernel"] + p["bias"], x)  # noqa: E731
    refused(pair, layer(), r"one array of shape \(samples, outputs\)")


def test_a_network_without_hidden_layers():
    example = examples.of_module(nn.Dense(3), examples.inputs())
    _, layer_inputs = tapped(example)
    assert list(layer_inputs) == ["kernel"]
