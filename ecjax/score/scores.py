"""What every criterion returns."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ecjax import networks
from ecjax.networks import Kernels, Params


class Scores(NamedTuple):
    """What removing each weight costs, and what makes up for it.

    Attributes:
        importance: Kernels; at least 0, the smallest go first.
        bias_shift: Kernels; for each weight, what its neuron's bias gains when the weight is removed. None for a
            criterion that compensates nothing.

    Example:
        >>> squares = score.Scores(jax.tree.map(jnp.square, networks.kernels(params)))  # a criterion of one's own
        >>> prune.sparsity(prune.one_shot(params, squares, sparsity=0.5).masks)
        0.5
    """

    importance: Kernels
    bias_shift: Kernels | None = None


def as_kernels(params: Params, leaves: Mapping[str, Array]) -> Kernels:
    """Kernels of ``params`` with the leaf for each kernel taken from ``leaves``, by path."""
    return networks.replace(networks.kernels(params), leaves)


def least(remainder: Callable[[Array], Array], zero: Array) -> tuple[Array, Array]:
    """The minimum of a parabola and where it is, by one Newton step from ``zero``; there if the parabola is flat."""
    slope, curvature = jax.jvp(jax.grad(remainder), (zero,), (jnp.ones_like(zero),))
    best = jnp.where(curvature > 0, -slope / jnp.where(curvature > 0, curvature, 1), 0)
    return remainder(best), best


def of_each_weight(
    params: Params, importance_and_shift: Callable[[str, Array], tuple[Array, Array]], *, weights_at_once: int
) -> Scores:
    """Scores from a function of one weight, given as the path of its kernel and its flat index there.

    So many weights at once go through ``vmap``; it bounds the memory.
    """
    kernels = networks.by_path(networks.kernels(params))
    found = {
        path: lax.map(
            functools.partial(importance_and_shift, path), jnp.arange(kernel.size), batch_size=weights_at_once
        )
        for path, kernel in kernels.items()
    }
    importance, shift = ({path: found[path][part].reshape(kernels[path].shape) for path in kernels} for part in (0, 1))
    return Scores(as_kernels(params, importance), as_kernels(params, shift))
