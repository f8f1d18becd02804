"""What every criterion returns."""

from collections.abc import Mapping
from typing import NamedTuple

from jax import Array

from ecjax import networks
from ecjax.networks import Kernels, Params


class Scores(NamedTuple):
    """What removing each weight costs, and what makes up for it.

    Attributes:
        importance: Kernels; at least 0, the smallest go first.
        bias_shift: Kernels; for each weight, what its neuron's bias gains when the weight is removed. None for a
            criterion that compensates nothing.
    """

    importance: Kernels
    bias_shift: Kernels | None = None


def as_kernels(params: Params, leaves: Mapping[str, Array]) -> Kernels:
    """Kernels of ``params`` with the leaf for each kernel taken from ``leaves``, by path."""
    return networks.replace(networks.kernels(params), leaves)
