"""The moments of a kernel that is used once, taken inside the backward pass of its product.

There the product's inputs a and the slopes g of one row of the metric are at hand, one batch and one layer at a time:
nothing of the size of samples by weights is made, and what the network scans or rematerialises stays so. The moments
leave as the cotangent of arrays of their shapes, whose values do not matter.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.shard_alike import shard_alike
from jaxtyping import Float, Shaped

from ecjax import _batches
from ecjax._batches import Placement
from ecjax.graph.convolutions import all_channels_last, channels_last, has_patches, kernel_gradient
from ecjax.graph.evaluate import in_full, run
from ecjax.graph.samples import Place
from ecjax.graph.values import Product
from ecjax.moments.additive import LayerMoments, divide, together


def with_moments(
    equation,
    product: Product,
    operands: list[Array],
    given: tuple[LayerMoments, Array],
    placement: Placement = Placement(),  # noqa: B008 a NamedTuple
) -> Array:
    """The product, which in a backward pass gives the moments of the batch as the cotangent of those that are given.

    Args:
        equation: of the product.
        product: what is known of it.
        operands: the kernel and what it is multiplied with, in the order of the equation.
        given: any moments, of shapes (*stack, in, out), and which of the (*stack, out) neurons have a bias that moves.
        placement: how the samples lie on devices.
    """
    side, (held, moves) = product.side, given

    def multiply(other, kernel, run=channels_last):
        (result,) = run(equation, [other, kernel] if side else [kernel, other])
        return result

    @jax.custom_vjp
    def multiplied(other, kernel, held, moves):  # noqa: ARG001 what a backward pass gives and needs
        return multiply(other, kernel)

    def forward(other, kernel, held, moves):  # noqa: ARG001
        return multiply(other, kernel), (other, kernel, moves)

    def backward(kept, slope):
        other, kernel, moves = kept
        pull = jax.linear_transpose(lambda other: multiply(other, kernel, run), other)
        of_other = all_channels_last(lambda slope: pull(slope)[0])(slope)
        whole = lambda array: array.astype(jnp.promote_types(array.dtype, jnp.float32))  # noqa: E731

        def of_kernel(other, slope):
            if has_patches(equation):
                return kernel_gradient(equation, other, slope, kernel.shape)
            like = jax.ShapeDtypeStruct(kernel.shape, whole(kernel).dtype)
            pull = jax.linear_transpose(lambda kernel: multiply(other, kernel, in_full), like)
            return all_channels_last(lambda slope: pull(slope)[0])(slope)

        found = _moments(of_kernel, product, whole(other), kernel.shape, whole(slope), moves, placement)
        if placement.mesh is not None:
            found = found._replace(
                mean=_alike(found.mean, kernel, product), scatter=_alike(found.scatter, kernel, product)
            )
        found = jax.tree.map(lambda leaf, like: leaf.reshape(like.shape).astype(like.dtype), found, held)
        return of_other, None, found, None

    multiplied.defvjp(forward, backward)
    return multiplied(operands[1 - side], operands[side], held, moves)


def _moments(
    of_kernel, product: Product, other: Array, shape, slope: Array, moves: Array, placement: Placement
) -> LayerMoments:
    """The moments of one batch, with the gradient of a sample by ``of_kernel`` where it has several rows."""
    order = [axis for part in product.kernel for axis in part]
    stack, inputs, neurons = sizes = tuple(math.prod(shape[axis] for axis in part) for part in product.kernel)
    moves, (reads, gives) = moves.reshape(stack, neurons), product.rows
    slopes, others = _by_sample(slope, gives.samples), _by_sample(other, reads.samples)
    if reads.features and slopes[0].size == stack * neurons:
        rows = _rows(others, reads, (stack, inputs)), _rows(slopes, gives, (stack, neurons))
        return jax.vmap(_of_one_row, in_axes=(1, 1, 0))(*rows, moves)

    def of_sample(seen: LayerMoments, sample) -> tuple[LayerMoments, None]:
        other, slope = sample
        of_bias = _neurons_first(slope, gives, (stack, neurons)).sum(-1)
        gradient = of_kernel(other, slope).transpose(order).reshape(sizes)
        return updated(seen, gradient, jnp.where(moves, of_bias, 0)), None

    def of_samples(others, slopes) -> LayerMoments:
        zero = jnp.zeros(sizes, slope.dtype)
        start = LayerMoments(zero[:, 0], zero, zero)
        # Two samples a turn: what adds their gradients up goes over the moments once.
        return lax.scan(of_sample, start, (others, slopes), unroll=2)[0]

    if placement.mesh is None:
        return of_samples(others, slopes)
    # A scan over samples that lie on several devices would gather them: each device goes over those of its block.
    return together(jax.vmap(of_samples)(*(_batches.by_block(array, placement) for array in (others, slopes))))


def _alike(found: Array, kernel: Array, product: Product) -> Array:
    """The same, spread over devices as the kernel is: its entries are what is summed there."""
    order = [axis for part in product.kernel for axis in part]
    shaped = found.reshape([kernel.shape[axis] for axis in order]).transpose(np.argsort(order))
    return shard_alike(kernel, shaped)[1].transpose(order).reshape(found.shape)


def updated(
    seen: LayerMoments, of_kernel: Float[Array, "*stack in out"], of_bias: Float[Array, "*stack out"]
) -> LayerMoments:
    """The moments with one more row of one more sample, by its gradients: West (1979); nothing cancels.

    Args:
        seen: so far.
        of_kernel: A, the gradient with respect to the kernel as a matrix.
        of_bias: B, the one with respect to its bias; 0 where there is none that moves.
    """
    total = seen.sensitivity + of_bias**2
    gap = of_kernel - seen.mean * of_bias[..., None, :]
    step, left = divide(of_bias, total), 1 - divide(of_bias**2, total)
    return LayerMoments(
        sensitivity=total,
        mean=seen.mean + gap * step[..., None, :],
        scatter=seen.scatter + gap**2 * left[..., None, :],
    )


def of_one_row(layer_inputs: Float[Array, "samples in"], sensitivities: Float[Array, "samples out"]) -> LayerMoments:
    """The moments of a layer that sees one row of each sample, on one batch.

    A weighted variance does not change when ``a`` is shifted, and the difference of raw moments cancels least around
    the mean, so the batch is centred first, on the plain mean of the samples that count: of padding it could lie
    anywhere. That the mean may be a little off does not matter.

    Args:
        layer_inputs: a.
        sensitivities: S; 0 for samples that do not count.
    """
    raw = layer_inputs.astype(sensitivities.dtype)
    counting = (sensitivities > 0).any(1, keepdims=True)
    centre = divide(jnp.where(counting, raw, 0).sum(0), counting.sum())
    centred = raw - centre
    total = sensitivities.sum(0)
    first, second = centred.T @ sensitivities, (centred**2).T @ sensitivities
    offset = divide(first, total)
    return LayerMoments(
        sensitivity=total,
        mean=jnp.where(total > 0, centre[:, None] + offset, 0),
        scatter=jnp.maximum(second - offset * first, 0),
    )


def _of_one_row(layer_inputs: Array, slopes: Array, moves: Array) -> LayerMoments:
    """The same, with what a bias that does not move would have taken up left in the scatter."""
    found = of_one_row(layer_inputs, slopes**2)
    second = found.scatter + found.sensitivity * found.mean**2
    return LayerMoments(
        sensitivity=jnp.where(moves, found.sensitivity, 0),
        mean=jnp.where(moves, found.mean, 0),
        scatter=jnp.where(moves, found.scatter, second),
    )


def _by_sample(array: Array, place: Place) -> Shaped[Array, "samples ..."]:
    """The samples along a first axis; each keeps the axis that they were in, with its own positions."""
    before, after = array.shape[: place.axis], array.shape[place.axis + 1 :]
    split = array.reshape(*before, place.before, -1, place.after, *after)
    first = jnp.moveaxis(split, place.axis + 1, 0)
    return first.reshape(first.shape[0], *before, place.before * place.after, *after)


def _neurons_first(slope: Array, rows, sizes: tuple[int, int]) -> Float[Array, "stack out rows"]:
    """Of one sample: its rows last."""
    order = (*rows.stacked, *rows.features)
    others = [axis for axis in range(slope.ndim) if axis not in order]
    return slope.transpose(*order, *others).reshape(*sizes, -1)


def _rows(array: Array, rows, sizes: tuple[int, int]) -> Float[Array, "samples stack features"]:
    """Of every sample the one row of each member."""
    return jax.vmap(lambda sample: _neurons_first(sample, rows, sizes)[..., 0])(array)
