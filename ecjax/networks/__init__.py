"""What a network is here, what its leaves do, and the doors to it from Flax Linen and Flax NNX."""

from ecjax._trees import by_path, replace
from ecjax.graph import Layer, Layers
from ecjax.networks.linen import MLP, pure
from ecjax.networks.nnx import from_nnx, to_nnx
from ecjax.networks.params import Inputs, Kernels, Loss, Network, Params, Patterns, Targets, layers

__all__ = [
    "MLP",
    "Inputs",
    "Kernels",
    "Layer",
    "Layers",
    "Loss",
    "Network",
    "Params",
    "Patterns",
    "Targets",
    "by_path",
    "from_nnx",
    "layers",
    "pure",
    "replace",
    "to_nnx",
]
