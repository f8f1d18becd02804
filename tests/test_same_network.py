"""A convnet and a transformer in Linen, NNX and Equinox, with the same weights: the same scores."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ecjax import networks, score
from tests import zoo

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.slow]
WIDTH, HEADS, CHANNELS = 6, 2, 4


class LinenConvnet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(CHANNELS, (3, 3), name="first")(x))
        x = x + nn.relu(nn.Conv(CHANNELS, (3, 3), name="second")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class NNXConvnet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(2, CHANNELS, (3, 3), rngs=rngs)
        self.second = nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=rngs)
        self.head = nnx.Linear(CHANNELS, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(x))
        x = x + nnx.relu(self.second(x))
        return self.head(x.mean((1, 2)))


class EquinoxConvnet(eqx.Module):
    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        self.first = eqx.nn.Conv2d(2, CHANNELS, 3, padding=1, key=key)
        self.second = eqx.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, key=key)
        self.head = eqx.nn.Linear(CHANNELS, 3, key=key)

    def __call__(self, x):
        x = jax.nn.relu(self.first(jnp.moveaxis(x, -1, 0)))
        x = x + jax.nn.relu(self.second(x))
        return self.head(x.mean((1, 2)))


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="mix")(nn.LayerNorm(name="norm", epsilon=1e-5)(x))
        return nn.Dense(3, name="head")(x.mean(1))


class NNXTransformer(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.mix = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        return self.head((x + self.mix(self.norm(x))).mean(1))


class EquinoxTransformer(eqx.Module):
    norm: eqx.nn.LayerNorm
    mix: eqx.nn.MultiheadAttention
    head: eqx.nn.Linear

    def __init__(self, key):
        biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.mix = eqx.nn.MultiheadAttention(HEADS, WIDTH, **biases, key=key)
        self.head = eqx.nn.Linear(WIDTH, 3, key=key)

    def __call__(self, x):
        y = jax.vmap(self.norm)(x)
        return self.head((x + self.mix(y, y, y)).mean(0))


# What Equinox calls each module of Linen's, and how a kernel of Linen's becomes a weight of Equinox's.
PROJECTION = lambda kernel: kernel.reshape(WIDTH, WIDTH).T  # noqa: E731
IMAGE = lambda kernel: jnp.transpose(kernel, (3, 2, 0, 1))  # noqa: E731
EQUINOX = {
    "first": ("first", IMAGE),
    "second": ("second", IMAGE),
    "head": ("head", jnp.transpose),
    "mix/query": ("mix/query_proj", PROJECTION),
    "mix/key": ("mix/key_proj", PROJECTION),
    "mix/value": ("mix/value_proj", PROJECTION),
    "mix/out": ("mix/output_proj", PROJECTION),
    "norm": ("norm", None),
}


def in_equinox(leaves):
    """Leaves by Linen's paths as leaves of the shapes and the paths of Equinox's."""
    found = {}
    for path, leaf in leaves.items():
        module, name = path.rsplit("/", 1)
        there, kernel = EQUINOX[module]
        if name == "bias":
            channels = (-1, 1, 1) if module in ("first", "second") else (-1,)
            found[f"{there}/bias"] = leaf.reshape(channels)
        else:
            found[f"{there}/weight"] = leaf if kernel is None else kernel(leaf)
    return found


@pytest.mark.parametrize(
    ("linen", "of_nnx", "equinox", "shape"),
    [
        (LinenConvnet, NNXConvnet, EquinoxConvnet, (5, 5, 2)),
        (LinenTransformer, NNXTransformer, EquinoxTransformer, (4, WIDTH)),
    ],
    ids=["convnet", "transformer"],
)
def test_the_same_scores_by_every_door(linen, of_nnx, equinox, shape):
    inputs = zoo.array(zoo.N, *shape)
    network, params, _ = zoo.linen(linen(), inputs).example
    wanted = score.elimination_compensation(network, params, inputs)
    assert all(leaf.any() for leaf in jax.tree.leaves(wanted.importance))

    network, theirs = networks.from_nnx(of_nnx(nnx.Rngs(0)))
    found = score.elimination_compensation(network, networks.replace(theirs, networks.by_path(params)), inputs)
    for part in ("importance", "bias_shift"):
        same(networks.by_path(getattr(found, part)), networks.by_path(getattr(wanted, part)))

    module = networks.replace(equinox(jax.random.key(0)), in_equinox(networks.by_path(params)))
    found = score.elimination_compensation(lambda module, x: jax.vmap(module)(x), module, inputs)
    for part in ("importance", "bias_shift"):
        same(networks.by_path(getattr(found, part)), in_equinox(networks.by_path(getattr(wanted, part))))


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        # Equinox computes the softmax of attention in float32.
        np.testing.assert_allclose(found[path], leaf, rtol=1e-6, atol=1e-7 * float(jnp.abs(leaf).max()))
