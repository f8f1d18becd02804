import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

from ecjax import networks


def test_mlp_is_dense_layers_with_activations_between():
    mlp = networks.MLP(features=(4, 3), activation=jnp.tanh)
    inputs = jax.random.normal(jax.random.key(0), (6, 5))
    params = mlp.init(jax.random.key(1), inputs)["params"]
    hidden = jnp.tanh(inputs @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    expected = hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    np.testing.assert_allclose(networks.from_linen(mlp)(params, inputs), expected, rtol=1e-6)


def test_replace_copies():
    params = freeze({"a": {"kernel": 1, "bias": 2}})
    assert networks.replace(params, {"a/kernel": 5}) == freeze({"a": {"kernel": 5, "bias": 2}})
    assert params == freeze({"a": {"kernel": 1, "bias": 2}})


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        networks.by_path({"a": {"b": 1}, "a/b": 2})
