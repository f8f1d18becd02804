"""Networks to test on, as users write them: each a pure function with its params, and its inputs."""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import freeze
from jax import Array

from ecjax import networks


def kernels(params):
    """Kernels of params whose kernels are called so: None in place of every other leaf."""
    called = lambda path: jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-1]  # noqa: E731
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf if called(path) == "kernel" else None, params)


def bias_path(path):
    """Where the bias of a kernel lies, in params that name them so."""
    return path.removesuffix("kernel") + "bias"


class Example(NamedTuple):
    network: networks.Network
    params: networks.Params
    inputs: Array


def inputs(samples=23, features=5, seed=0, dtype=None):
    """Correlated inputs with a mean of their own, like real features."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(features, features))
    return jnp.asarray(generator.normal(size=(samples, features)) @ mixing + 0.5, dtype)


def of_module(module: nn.Module, x: Array, seed=0) -> Example:
    params = module.init(jax.random.key(seed), x)["params"]
    return Example(networks.from_linen(module), with_random_biases(params, seed), x)


def with_random_biases(params, seed=0):
    """Fresh biases are zero, which would hide mistakes that involve them; everything in the default precision."""
    generator = np.random.default_rng(seed)

    def change(path, leaf):
        is_bias = "bias" in jax.tree_util.keystr(path)
        values = 0.3 * generator.normal(size=leaf.shape) if is_bias else leaf
        return jnp.asarray(values, jnp.zeros(()).dtype)

    return jax.tree_util.tree_map_with_path(change, params)


@functools.cache
def _mlp(widths, activation):
    """One network function for each shape, so that it is compiled once for all seeds."""
    module = networks.MLP(widths, activation)
    return module, networks.from_linen(module)


def mlp(widths=(7, 6, 3), activation: Callable = nn.gelu, samples=23, features=5, seed=0) -> Example:
    module, network = _mlp(widths, activation)
    return of_module(module, inputs(samples, features, seed), seed)._replace(network=network)


class ResidualMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = jnp.tanh(nn.Dense(6, name="stem")(x))
        hidden = hidden + jnp.tanh(nn.Dense(6, name="block")(nn.LayerNorm()(hidden)))
        return nn.Dense(3, name="head")(hidden)


class FourierMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        frequencies = jax.random.normal(jax.random.key(7), (x.shape[-1], 4), x.dtype)
        waves = x @ frequencies
        hidden = nn.silu(nn.Dense(6)(jnp.concatenate([jnp.sin(waves), jnp.cos(waves)], -1)))
        return nn.Dense(3)(hidden)


class Rematerialised(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.remat(networks.MLP)((6, 6), name="block")
        return nn.Dense(2)(nn.relu(block(x)))


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, images):
        hidden = jnp.tanh(nn.Conv(3, (2, 2), name="conv")(images))
        return nn.Dense(2, name="head")(hidden.reshape(len(images), -1))


def residual() -> Example:
    return of_module(ResidualMLP(), inputs())


def fourier() -> Example:
    return of_module(FourierMLP(), inputs())


def rematerialised() -> Example:
    return of_module(Rematerialised(), inputs())


def jitted_before() -> Example:
    example = mlp()
    network = jax.jit(example.network)
    network(example.params, example.inputs)
    return example._replace(network=network)


def frozen() -> Example:
    example = mlp()
    return example._replace(params=freeze(example.params))


def plain_jax() -> Example:
    """Params as a list, as in JAX's own tutorials, with a jitted layer and a custom derivative between them."""
    x, generator = inputs(), np.random.default_rng(3)
    widths = (5, 6, 4, 2)
    params = [
        {"kernel": jnp.asarray(generator.normal(size=shape)), "bias": jnp.asarray(generator.normal(size=shape[1]))}
        for shape in itertools.pairwise(widths)
    ]

    @jax.custom_jvp
    def square(z):
        return z * z

    square.defjvp(lambda primals, tangents: (primals[0] ** 2, 2 * primals[0] * tangents[0]))

    def network(params, x):
        hidden = square(x @ params[0]["kernel"] + params[0]["bias"]) / 10
        hidden = jax.jit(lambda layer, x: jnp.tanh(layer["bias"] + jnp.dot(x, layer["kernel"])))(params[1], hidden)
        return jnp.einsum("ni,io->no", hidden, params[2]["kernel"]) + params[2]["bias"]

    return Example(network, params, x)


def reverse_mode_only() -> Example:
    """An activation with a custom_vjp, which forward-mode differentiation refuses."""

    @jax.custom_vjp
    def clipped(z):
        return jnp.clip(z, -1, 1)

    clipped.defvjp(lambda z: (jnp.clip(z, -1, 1), z), lambda z, cotangent: (jnp.tanh(z) * cotangent,))
    return mlp(activation=clipped)


def one_sample_at_a_time() -> Example:
    """A network of one sample, vmapped over samples by the caller; one kernel on the right, one on the left."""

    def of_one_sample(params, x):
        hidden = jnp.sin(x @ params[0]["kernel"] + params[0]["bias"])
        return jnp.tanh(params[1]["kernel"].T @ hidden + params[1]["bias"])

    example = plain_jax()
    return example._replace(network=jax.vmap(of_one_sample, in_axes=(None, 0)), params=example.params[:2])


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(5, 6, rngs=rngs)
        self.second = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def flax_nnx() -> Example:
    network, params = networks.from_nnx(NnxMLP(nnx.Rngs(0)))
    return Example(network, with_random_biases(params), inputs())


def convolution() -> Example:
    images = inputs(samples=9, features=16).reshape(9, 4, 4, 1)
    return of_module(ConvNet(), images)


DENSE_EXAMPLES = {
    example.__name__: example
    for example in (
        mlp,
        residual,
        fourier,
        rematerialised,
        jitted_before,
        frozen,
        plain_jax,
        one_sample_at_a_time,
        flax_nnx,
    )
}
