"""Batches of samples inside a compiled loop.

Samples that are spread over devices lie in equal blocks, one a device. A batch takes as many samples of each block, so
every device works on its own part of every batch and no inputs travel.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Int, PyTree, Shaped


def blocks(inputs: Shaped[Array | np.ndarray, "samples *features"]) -> int:
    """How many equal blocks of samples the devices hold; 1 for an array on one device, or while tracing."""
    if isinstance(inputs, jax.core.Tracer) or not isinstance(inputs, Array):
        return 1
    return inputs.shape[0] // max(inputs.sharding.shard_shape(inputs.shape)[0], 1)


def count(samples: int, size: int, blocks: int = 1) -> int:
    """How many batches of about ``size`` samples cover all of them."""
    of_block = samples // blocks
    return -(-of_block // _share(of_block, size, blocks))


def take(
    arrays: PyTree[Shaped[Array, "samples ..."]], index: int | Int[Array, ""], size: int, blocks: int = 1
) -> tuple[PyTree, Bool[Array, " batch"]]:
    """One batch of arrays that share their samples, and which of its samples count.

    The last batch reaches back to be as long as the others; the samples that were in the one before it don't count.
    """
    of_block = jax.tree.leaves(arrays)[0].shape[0] // blocks
    share = _share(of_block, size, blocks)
    start = jnp.minimum(index * share, of_block - share)
    counted = start + jnp.arange(share) >= index * share

    def of_array(array):
        blocked = array.reshape(blocks, of_block, *array.shape[1:])
        return lax.dynamic_slice_in_dim(blocked, start, share, 1).reshape(blocks * share, *array.shape[1:])

    return jax.tree.map(of_array, arrays), jnp.tile(counted, blocks)


def every(
    array: Shaped[Array, "samples ..."], size: int, offset: Int[Array, ""], blocks: int = 1
) -> Shaped[Array, "batch ..."]:
    """About ``size`` samples, evenly spaced; the offset says which of them, and counts on round the spacing."""
    of_block = array.shape[0] // blocks
    share = _share(of_block, size, blocks)
    spacing = of_block // share
    spaced = array.reshape(blocks, of_block, *array.shape[1:])[:, : share * spacing]
    spaced = spaced.reshape(blocks, share, spacing, *array.shape[1:])
    of_batch = lax.dynamic_index_in_dim(spaced, offset % spacing, 2, keepdims=False)
    return of_batch.reshape(blocks * share, *array.shape[1:])


def _share(of_block: int, size: int, blocks: int) -> int:
    """How many samples of each block a batch takes."""
    return min(max(size // blocks, 1), of_block)
