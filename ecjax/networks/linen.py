"""Networks of Flax Linen modules, and the MLP."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import PRNGKeyArray

from ecjax.networks.params import Inputs, Network, Params


class MLP(nn.Module):
    """A multilayer perceptron: dense layers with an activation between them.

    Attributes:
        features: width of each layer; the last one is the number of outputs.
        activation: elementwise function after every layer but the last.
        dtype: what the layers compute in; None for the dtype of params and inputs.
        use_bias: whether the layers have biases.

    Example:
        >>> mlp = networks.MLP(features=(8, 2), activation=jnp.tanh)
        >>> mlp.init(jax.random.key(0), inputs)["params"]["Dense_0"]["kernel"].shape
        (4, 8)
    """

    features: Sequence[int]
    activation: Callable[[Array], Array] = nn.relu
    dtype: Any = None
    use_bias: bool = True

    @nn.compact
    def __call__(self, inputs: Inputs) -> Array:
        """The outputs, of shape (samples, features[-1])."""
        hidden = inputs
        for width in self.features[:-1]:
            hidden = self.activation(self._dense(width)(hidden))
        return self._dense(self.features[-1])(hidden)

    def _dense(self, width: int) -> nn.Dense:
        return nn.Dense(width, self.use_bias, self.dtype, kernel_init=_initial_kernel)


def _initial_kernel(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
    """Flax's own initialisation, which fails on layers without neurons: what ``compact`` leaves when all are pruned."""
    return nn.initializers.lecun_normal()(key, shape, dtype) if math.prod(shape) else jnp.zeros(shape, dtype)


def pure(module: nn.Module) -> Network:
    """The pure function ``(params, inputs) -> outputs`` of a Flax Linen module.

    Make it once and pass the same function everywhere: everything in ecjax is compiled once per network function.

    Example:
        >>> network = networks.pure(nn.Dense(3))
        >>> network({"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, jnp.ones((1, 2))).tolist()
        [[2.0, 2.0, 2.0]]
    """

    def network(params: Params, inputs: Inputs) -> Array:
        return module.apply({"params": params}, inputs)

    network.module = module  # compact.compact builds it again, with smaller widths
    return network
