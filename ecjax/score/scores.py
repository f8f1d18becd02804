"""What every criterion returns."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, PyTree

from ecjax import _checks, _memory, _trees, graph
from ecjax._types import Kernels, Params
from ecjax.graph import Layers
from ecjax.graph.layers import NO_LAYERS
from ecjax.graph.taps import tap_dtype


@functools.partial(jax.tree_util.register_dataclass, data_fields=["importance", "bias_shift"], meta_fields=["layers"])
@dataclasses.dataclass(frozen=True)
class Scores:
    """What removing each weight costs, and what makes up for it.

    Attributes:
        importance: Kernels; the smallest go first. All criteria of this library give numbers of at least 0.
        bias_shift: Kernels; for each weight, what its neuron's bias gains when the weight is removed. None for a
            criterion that compensates nothing.
        layers: of the network (``networks.layers``): which bias belongs to which kernel, and which of its axes are
            inputs. Static; needed with bias shifts, and where weights compete within a neuron.

    Example:
        >>> squares = jax.tree.map(jnp.square, score.magnitude(network, params, inputs).importance)
        >>> scores = score.Scores(squares)  # a criterion of one's own
        >>> prune.sparsity(prune.one_shot(params, scores, sparsity=0.5).masks)
        0.5
    """

    importance: Kernels
    bias_shift: Kernels | None = None
    layers: Layers = NO_LAYERS


@functools.partial(jax.tree_util.register_dataclass, data_fields=["importance", "constant"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class NeuronScores:
    """What removing each unit costs, and what to put in its place: a neuron, a channel, an attention head.

    Attributes:
        importance: by the name of a group (``networks.groups(...).named``), one number for each of its units, of shape
            (units,); the smallest go first. Groups that are not there stay whole.
        constant: likewise, the constants that take the place of a removed unit: the biases of those that read it gain
            ``constant · W``. Of shape (units,), or (units, values) where each unit has several values that biases can
            make up for, as a head has features. None for a criterion that compensates nothing.

    Example:
        >>> scores = score.NeuronScores({"Dense_0/kernel": jnp.arange(8.0)})  # a criterion of one's own gives these
        >>> pruned = prune.neurons(network, params, inputs, fraction=0.25, criterion=lambda *_: scores)
        >>> pruned.masks["Dense_0"]["kernel"].any(0).tolist()
        [False, False, True, True, True, True, True, True]
    """

    importance: PyTree  # not checked here: a pytree is also mapped to what is no array
    constant: PyTree | None = None


AnyScores = TypeVar("AnyScores", bound=Scores | NeuronScores)


def checked(scores: AnyScores) -> AnyScores:
    """The same scores, of weights or of neurons.

    Raises:
        ValueError: an importance or what makes up for it is NaN or infinite: the params are, or squares overflow.
        MemoryError: a device ran out of memory for them.
    """
    with _memory.enough(f"lower batch_size, {_memory.FEWER_ROWS}"):
        for field in dataclasses.fields(scores):
            if field.name != "layers":
                _checks.require_finite(getattr(scores, field.name), f"{field.name.replace('_', ' ')}s")
    return scores


def times_square(value: Float[Array, "..."], factor: Float[Array, "..."]) -> Float[Array, "..."]:
    """``value · factor²``, also where ``factor²`` alone is too small for the dtype and the product is not."""
    square = factor**2
    return jnp.where(square < jnp.finfo(square.dtype).tiny, factor * (factor * value), square * value)


def least(remainder: Callable[[Array], Array], zero: Array) -> tuple[Array, Array]:
    """The minimum of a parabola and where it is, by one Newton step from ``zero``; there if the parabola is flat.

    Both are NaN if the curvature overflows: it would pass for a minimum at zero.
    """
    slope, curvature = jax.jvp(jax.grad(remainder), (zero,), (jnp.ones_like(zero),))
    best = jnp.where(curvature > 0, -slope / jnp.where(curvature > 0, curvature, 1), 0)
    best = jnp.where(curvature < jnp.inf, best, jnp.nan)
    return jnp.maximum(remainder(best), 0), best  # rounding may take it below


def of_each_weight(
    params: Params,
    layers: Layers,
    importance_and_shift: Callable[[graph.Layer, Array], tuple[Array, Array]],
    *,
    weights_at_once: int,
) -> Scores:
    """Scores from a function of one weight, given as its layer and its flat index in the kernel as a matrix.

    So many weights at once go through ``vmap``; it bounds the memory.
    """
    leaves = _trees.by_path(params)
    importance, shift = {}, {}
    for layer in layers:
        found = of_each(
            functools.partial(importance_and_shift, layer),
            leaves[layer.kernel],
            layer.weights,
            at_once=weights_at_once,
        )
        importance[layer.kernel], shift[layer.kernel] = (
            graph.as_leaf(part.reshape(layer.layout.sizes), layer.layout) for part in found
        )
    return scores_of(params, layers, importance, shift)


def scores_of(
    params: Params, layers: Layers, importance: Mapping[str, Array], shift: Mapping[str, Array] | None = None
) -> Scores:
    """Scores from what each kernel has, by its path."""
    shifts = None if shift is None else _trees.as_kernels(params, shift)
    return Scores(_trees.as_kernels(params, importance), shifts, layers)


def of_each(
    importance_and_shift: Callable[[Array], tuple[Array, Array]],
    kernel: Array | np.ndarray,
    count: int,
    *,
    at_once: int,
) -> tuple[Float[Array, " count"], Float[Array, " count"]]:
    """A function of each index below ``count``, so many at once; without any, it is not even traced."""
    if count == 0:
        nothing = jnp.zeros(0, tap_dtype(kernel))
        return nothing, nothing
    return lax.map(importance_and_shift, jnp.arange(count), batch_size=at_once)
