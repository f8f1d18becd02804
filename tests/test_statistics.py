"""Batch statistics taken anew, against the activations themselves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecjax import networks
from tests import zoo

pytestmark = pytest.mark.usefixtures("float64")


class Normed(nn.Module):
    momentum: float = 0.99

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(3, (2, 2), name="conv")(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=self.momentum, name="first")(x))
        return nn.Dense(2, name="head")(nn.BatchNorm(not train, momentum=0.5, name="second")(x).mean((1, 2)))


@pytest.mark.parametrize("momentum", [0.99, 0.0])
def test_they_are_those_of_the_batch(momentum):
    module, inputs = Normed(momentum), 100 + zoo.array(6, 4, 4, 2)
    variables = module.init(jax.random.key(0), inputs, train=False)
    found = networks.batch_statistics(module, variables["params"], variables, inputs, train=True)
    z = nn.Conv(3, (2, 2)).apply({"params": variables["params"]["conv"]}, inputs)
    first = found["batch_stats"]["first"]
    np.testing.assert_allclose(first["mean"], z.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(first["var"], z.var((0, 1, 2)), rtol=1e-6)
    network = networks.from_linen(module, variables=found, train=False)
    in_training = module.apply(variables, inputs, train=True, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(network(variables["params"], inputs), in_training, rtol=1e-5, atol=1e-8)
    assert "params" not in found


def test_the_mean_over_batches_is_taken(compilations):
    norm, inputs = nn.BatchNorm(use_running_average=False), zoo.array(7, 3)
    variables = norm.init(jax.random.key(0), inputs)
    found = networks.batch_statistics(norm, variables["params"], variables, inputs, batch_size=2)["batch_stats"]
    np.testing.assert_allclose(found["mean"], inputs[:6].mean(0), rtol=1e-6)
    before = compilations()
    networks.batch_statistics(norm, variables["params"], variables, inputs, batch_size=2)
    assert compilations() == before
    variances = jnp.stack([inputs[i : i + 2].var(0) for i in (0, 2, 4)])
    np.testing.assert_allclose(found["var"], variances.mean(0), rtol=1e-5)


def test_what_is_refused():
    module, inputs = Normed(), zoo.array(6, 4, 4, 2)
    variables = module.init(jax.random.key(0), inputs, train=False)
    with pytest.raises(ValueError, match="does not move the batch statistics of Normed; give those that put it into"):
        networks.batch_statistics(module, variables["params"], variables, inputs, train=False)
    with pytest.raises(ValueError, match="no collection 'batch_stats' with anything in it, but: 'params'"):
        networks.batch_statistics(module, variables["params"], {"params": variables["params"]}, inputs, train=True)

    class Other(nn.Module):
        @nn.compact
        def __call__(self, x):
            seen = self.variable("batch_stats", "largest", jnp.zeros, (x.shape[-1],))
            seen.value = jnp.sqrt(seen.value + jnp.abs(x).max(0))
            return x / seen.value

    variables = Other().init(jax.random.key(0), inputs[:, 0, 0])
    with pytest.raises(ValueError, match="the statistics of Other do not move by s ← m s"):
        networks.batch_statistics(Other(), {}, variables, inputs[:, 0, 0])
