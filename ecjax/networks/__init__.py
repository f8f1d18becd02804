"""What a network is here, and the doors to it from Flax Linen and Flax NNX."""

from ecjax.networks.linen import MLP, pure
from ecjax.networks.nnx import from_nnx, to_nnx
from ecjax.networks.params import (
    Inputs,
    Kernels,
    Loss,
    Network,
    Params,
    Targets,
    bias_path,
    by_number,
    by_path,
    kernels,
    layers,
    replace,
)

__all__ = [
    "MLP",
    "Inputs",
    "Kernels",
    "Loss",
    "Network",
    "Params",
    "Targets",
    "bias_path",
    "by_number",
    "by_path",
    "from_nnx",
    "kernels",
    "layers",
    "pure",
    "replace",
    "to_nnx",
]
