import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, freeze

from ecjax import networks


def test_mlp_is_dense_layers_with_activations_between():
    mlp = networks.MLP(features=(4, 3), activation=jnp.tanh)
    inputs = jax.random.normal(jax.random.key(0), (6, 5))
    params = mlp.init(jax.random.key(1), inputs)["params"]
    hidden = jnp.tanh(inputs @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    expected = hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    np.testing.assert_allclose(networks.pure(mlp)(params, inputs), expected, rtol=1e-6)


def test_kernels_keep_the_nesting_and_leave_the_rest_out():
    params = {
        "block": {"Dense_0": {"kernel": 1, "bias": 2}, "LayerNorm_0": {"scale": 3}},
        "list": [{"kernel": 4}, {"bias": 5}, (6, {"kernel": 7})],
        "kernel": {"kernel": 8},
    }
    assert networks.kernels(params) == {
        "block": {"Dense_0": {"kernel": 1}},
        "list": [{"kernel": 4}, {}, (None, {"kernel": 7})],
        "kernel": {"kernel": 8},
    }


def test_kernels_of_a_frozen_dict_are_frozen():
    kernels = networks.kernels(freeze({"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}))
    assert isinstance(kernels, FrozenDict)
    assert list(networks.by_path(kernels)) == ["Dense_0/kernel"]


def test_replace_copies():
    params = {"a": {"kernel": 1, "bias": 2}}
    assert networks.replace(params, {"a/kernel": 5}) == {"a": {"kernel": 5, "bias": 2}}
    assert params == {"a": {"kernel": 1, "bias": 2}}


def test_bias_path():
    assert networks.bias_path("Dense_0/kernel") == "Dense_0/bias"
    assert networks.bias_path("kernel") == "bias"


def test_a_single_dense_module():
    params = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    assert list(networks.by_path(networks.kernels(params))) == ["kernel"]
