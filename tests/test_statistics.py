"""Batch statistics taken anew, against the activations themselves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ecjax import compact, networks, prune, repair
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

    with pytest.raises(ValueError, match=r"takes a flax.linen.Module, and this is one of flax.nnx"):
        networks.batch_statistics(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), {}, {}, inputs)

    class Other(nn.Module):
        @nn.compact
        def __call__(self, x):
            seen = self.variable("batch_stats", "largest", jnp.zeros, (x.shape[-1],))
            seen.value = jnp.sqrt(seen.value + jnp.abs(x).max(0))
            return x / seen.value

    variables = Other().init(jax.random.key(0), inputs[:, 0, 0])
    with pytest.raises(ValueError, match="the statistics of Other do not move by s ← m s"):
        networks.batch_statistics(Other(), {}, variables, inputs[:, 0, 0])


class InNNX(nnx.Module):
    def __init__(self):
        self.hidden = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(1))
        self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(2))

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.hidden(x))))


def of_linen():
    module, inputs = Normed(), zoo.array(6, 4, 4, 2)
    variables = module.init(jax.random.key(0), inputs, train=False)
    return lambda variables, x: module.apply(variables, x, train=False), variables, inputs


def of_nnx():
    module = InNNX()
    module.eval()
    return lambda module, x: module(x), module, zoo.array(6, 3)


@pytest.mark.parametrize(("make", "path"), [(of_linen, "batch_stats/first/mean"), (of_nnx, "norm/mean/value")])
def test_a_repair_moves_none_that_are_among_the_params(make, path):
    network, params, inputs = make()
    with pytest.raises(ValueError, match=f"the params hold batch statistics, '{path}', which a repair would move"):
        prune.staged(network, params, inputs, 0.5, stages=1)
    still = repair.Survivors(frozen=("batch_stats/*",) if make is of_linen else ("norm/mean/*", "norm/var/*"))
    pruned = prune.staged(network, params, inputs, 0.5, stages=1, repair=still)
    before, after = (networks.by_path(tree)[path] for tree in (params, pruned.params))
    np.testing.assert_array_equal(before, after)
    assert prune.staged(network, params, inputs, 0.5, stages=1, repair="biases").masks is not None


def test_a_module_does_not_take_fewer_units_than_its_statistics_have():
    module = InNNX()
    module.eval()
    network, params = networks.from_nnx(module)
    inputs = zoo.array(6, 3)
    pruned = prune.neurons(network, params, inputs, 0.5)
    smaller, small = compact.compact(network, pruned.params, inputs)
    assert small["norm"]["scale"].shape == (2,)
    np.testing.assert_allclose(smaller(small, inputs), network(pruned.params, inputs), rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match="the statistics 'norm/mean' of 4 units, and 'norm/bias' is of 2 now; call the"
    ):
        networks.to_nnx(module, small)
    assert networks.to_nnx(module, pruned.params)(inputs).shape == (6, 2)
