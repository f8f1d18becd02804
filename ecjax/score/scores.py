"""What every criterion returns."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from ecjax import capture, checks, networks
from ecjax.networks import Kernels, Params

AnyScores = TypeVar("AnyScores", bound=tuple)


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


def checked(scores: AnyScores) -> AnyScores:
    """The same scores, of weights or of neurons.

    Raises:
        ValueError: an importance or what makes up for it is NaN or infinite: the params are, or squares overflow.
    """
    for name, tree in zip(scores._fields, scores, strict=True):
        checks.require_finite(tree, f"{name.replace('_', ' ')}s")
    return scores


def times_square(value: Float[Array, "..."], factor: Float[Array, "..."]) -> Float[Array, "..."]:
    """``value · factor²``, also where ``factor²`` alone is too small for the dtype and the product is not."""
    square = factor**2
    return jnp.where(square < jnp.finfo(square.dtype).tiny, factor * (factor * value), square * value)


def as_kernels(params: Params, leaves: Mapping[str, Array]) -> Kernels:
    """Kernels of ``params`` with the leaf for each kernel taken from ``leaves``, by path."""
    return networks.replace(networks.kernels(params), leaves)


def least(remainder: Callable[[Array], Array], zero: Array) -> tuple[Array, Array]:
    """The minimum of a parabola and where it is, by one Newton step from ``zero``; there if the parabola is flat.

    Both are NaN if the curvature overflows: it would pass for a minimum at zero.
    """
    slope, curvature = jax.jvp(jax.grad(remainder), (zero,), (jnp.ones_like(zero),))
    best = jnp.where(curvature > 0, -slope / jnp.where(curvature > 0, curvature, 1), 0)
    best = jnp.where(curvature < jnp.inf, best, jnp.nan)
    return remainder(best), best


def of_each_weight(
    params: Params, importance_and_shift: Callable[[str, Array], tuple[Array, Array]], *, weights_at_once: int
) -> Scores:
    """Scores from a function of one weight, given as the path of its kernel and its flat index there.

    So many weights at once go through ``vmap``; it bounds the memory.
    """
    kernels = networks.by_path(networks.kernels(params))
    found = {
        path: of_each(functools.partial(importance_and_shift, path), kernel, kernel.size, at_once=weights_at_once)
        for path, kernel in kernels.items()
    }
    importance, shift = ({path: found[path][part].reshape(kernels[path].shape) for path in kernels} for part in (0, 1))
    return Scores(as_kernels(params, importance), as_kernels(params, shift))


def of_each(
    importance_and_shift: Callable[[Array], tuple[Array, Array]],
    kernel: Array | np.ndarray,
    count: int,
    *,
    at_once: int,
) -> tuple[Float[Array, " count"], Float[Array, " count"]]:
    """A function of each index below ``count``, so many at once; without any, it is not even traced."""
    if count == 0:
        nothing = jnp.zeros(0, capture.tap_dtype(kernel))
        return nothing, nothing
    return lax.map(importance_and_shift, jnp.arange(count), batch_size=at_once)
