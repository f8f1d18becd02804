"""Networks of Flax Linen modules, and the MLP."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from flax import errors
from jax import Array
from jaxtyping import PRNGKeyArray

from ecjax._types import Inputs, Network, Params


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


def from_linen(module: Any, *, variables: Mapping[str, Any] | None = None, **call: Any) -> Network:
    """The pure function ``(params, inputs) -> outputs`` of a Flax Linen module.

    Make it once and pass the same function everywhere: everything in ecjax is compiled once per network function.

    Args:
        module: a ``flax.linen.Module`` that takes inputs of shape (samples, *features).
        variables: its collections besides "params", which keep these values: ``{"batch_stats": ...}``. All that
            ``module.init`` gives may be passed; what it has under "params" is left out.
        **call: further arguments of the module's call, such as ``train=False``.

    Raises:
        ValueError: no Linen module; or when the network is called, and the module misses a collection or a random key,
            or changes a collection, as batch statistics in training mode do.

    Example:
        >>> network = networks.from_linen(nn.Dense(3))
        >>> network({"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, jnp.ones((1, 2))).tolist()
        [[2.0, 2.0, 2.0]]
        >>> norm = nn.BatchNorm()
        >>> variables = norm.init(jax.random.key(0), inputs, use_running_average=True)
        >>> network = networks.from_linen(norm, variables=variables, use_running_average=True)
        >>> network(variables["params"], inputs).shape
        (200, 4)
    """
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"from_linen takes a flax.linen.Module, got {type(module).__name__}; for Flax NNX there is "
            "networks.from_nnx, and any pure function (params, inputs) -> outputs is a network as it stands"
        )
    fixed = {name: values for name, values in (variables or {}).items() if name != "params"}

    def network(params: Params, inputs: Inputs) -> Array:
        try:
            return cast("Array", module.apply({"params": params, **fixed}, inputs, **call))
        except (errors.ModifyScopeVariableError, errors.ScopeCollectionNotFound, errors.InvalidRngError) as error:
            raise ValueError(
                f"{type(module).__name__} can't be called as a pure function of its params: {error} Give its other "
                "collections to networks.from_linen(module, variables=...), and the arguments that put it into "
                "evaluation mode, such as train=False"
            ) from error

    # compact.compact builds it again, with smaller widths; a function may have attributes, which no type can say.
    network.module = module  # pyright: ignore[reportFunctionMemberAccess]
    return network
