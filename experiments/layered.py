"""Networks for the benchmark whose kernels see several rows of a sample: fresh, with random inputs."""

import functools
from typing import Literal

import flax.linen as nn
import jax

from ecjax import networks
from ecjax.networks import Network, Params
from experiments import convnet, language


class Block(nn.Module):
    """A block of a transformer, as a scan over layers takes it."""

    @nn.compact
    def __call__(self, stream: jax.Array, _: None) -> tuple[jax.Array, None]:
        """The stream after the block."""
        stream += nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(stream))
        return stream + nn.Dense(128)(nn.gelu(nn.Dense(512)(nn.LayerNorm()(stream)))), None


class Scanned(nn.Module):
    """24 blocks, scanned and rematerialised."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The outputs at each position."""
        blocks = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=24)
        return nn.Dense(10)(blocks()(inputs, None)[0])


# By name: the module, its inputs, and the arguments of its call.
NETWORKS = {
    "character transformer": (language.GPT(65, 3, 128, 4), lambda key, n: jax.random.randint(key, (n, 64), 0, 65), {}),
    "convnet": (
        convnet.ConvNet((32, 64, 64), 10, "layer"),
        lambda key, n: jax.random.uniform(key, (n, 784)),
        {"train": False},
    ),
    "24 scanned layers": (Scanned(), lambda key, n: jax.random.normal(key, (n, 64, 128)), {}),
}


Name = Literal[tuple(NETWORKS)]


@functools.lru_cache(maxsize=1)
def problem(name: str, samples: int) -> tuple[Network, Params, jax.Array]:
    """A fresh network of more than dense layers of one row, with random inputs."""
    module, draw, call = NETWORKS[name]
    inputs = draw(jax.random.key(0), samples)
    return networks.from_linen(module, **call), module.init(jax.random.key(2), inputs[:1], **call)["params"], inputs
