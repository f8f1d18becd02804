"""Batches of samples inside a compiled loop.

Samples that are spread over devices lie in equal blocks, one a device. A batch takes as many samples of each block, so
every device works on its own part of every batch and no inputs travel. The size of a batch is what one device holds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Int, PyTree, Shaped

DATA = "data"  # the axis of a mesh along which samples are spread


class Placement(NamedTuple):
    """How samples lie on devices.

    Attributes:
        blocks: how many equal blocks the devices hold; 1 for an array on one device.
        axes: of the mesh, over which they are spread.
        mesh: None where there is one block, or where the devices are no mesh.
    """

    blocks: int = 1
    axes: tuple[str, ...] = ()
    mesh: Mesh | AbstractMesh | None = None


def placement(inputs: Shaped[Array | np.ndarray, "samples *features"]) -> Placement:
    """How samples lie on devices.

    Where an array lies is not known while tracing; there the axis "data" of the mesh that is set says it.
    """
    if not isinstance(inputs, Array) or inputs.shape[0] == 0:
        return Placement()
    if isinstance(inputs, Tracer):
        mesh = jax.sharding.get_abstract_mesh()
        parts = dict(mesh.shape).get(DATA, 1)
        return Placement() if parts == 1 or inputs.shape[0] % parts else Placement(parts, (DATA,), mesh)
    sharding = inputs.sharding
    blocks = inputs.shape[0] // sharding.shard_shape(inputs.shape)[0]
    if blocks == 1 or not isinstance(sharding, NamedSharding):
        return Placement(blocks)
    axes = sharding.spec[0]
    return Placement(blocks, (axes,) if isinstance(axes, str) else tuple(axes), sharding.mesh)


def blocks(inputs: Shaped[Array | np.ndarray, "samples *features"]) -> int:
    """How many equal blocks of samples the devices hold."""
    return placement(inputs).blocks


def placed(arrays: PyTree) -> PyTree:
    """The same arrays, where they lie, with the compiler free to place what is computed from them.

    A mesh of ``jax.make_mesh`` has explicit axes unless told otherwise: every product over samples that are spread over
    one would have to name where its result goes, in a user's network too.
    """

    def of_leaf(leaf):
        if not isinstance(leaf, Array) or isinstance(leaf, Tracer):
            return leaf
        sharding = leaf.sharding
        given = getattr(sharding, "mesh", None)
        if not isinstance(sharding, NamedSharding) or not isinstance(given, Mesh):
            return leaf
        if AxisType.Explicit not in given.axis_types:
            return leaf
        mesh = Mesh(given.devices, given.axis_names, axis_types=(AxisType.Auto,) * len(given.axis_names))
        return jax.device_put(leaf, NamedSharding(mesh, sharding.spec))

    return jax.tree.map(of_leaf, arrays)


def count(samples: int, size: int, blocks: int = 1) -> int:
    """How many batches of at most ``size`` samples a block cover all of them.

    Args:
        samples: how many there are.
        size: of a batch, on each device.
        blocks: how they lie on devices.
    """
    of_block = samples // blocks
    return -(-of_block // min(size, of_block))


def take(
    arrays: PyTree[Shaped[Array, "samples ..."]], index: int | Int[Array, ""], size: int, blocks: int = 1
) -> tuple[PyTree, Bool[Array, " batch"]]:
    """One batch of at most ``size`` samples a block, of arrays that share their samples, and which of them count.

    The last batch reaches back to be as long as the others; the samples that were in the one before it don't count.

    Args:
        arrays: a pytree of arrays, samples along the first axis.
        index: of the batch, below ``count``; may be traced.
        size: of a batch, at most, on each device.
        blocks: how the samples lie on devices.
    """
    of_block = jax.tree.leaves(arrays)[0].shape[0] // blocks
    share = min(size, of_block)
    start = jnp.minimum(index * share, of_block - share)
    counted = start + jnp.arange(share) >= index * share

    def of_array(array):
        blocked = array.reshape(blocks, of_block, *array.shape[1:])
        return lax.dynamic_slice_in_dim(blocked, start, share, 1).reshape(blocks * share, *array.shape[1:])

    return jax.tree.map(of_array, arrays), jnp.tile(counted, blocks)


def by_block(array: Shaped[Array, "samples ..."], placement: Placement) -> Shaped[Array, "blocks block ..."]:
    """The samples of each block along an axis of their own, on the device where they lie.

    Args:
        array: samples, block after block.
        placement: how they lie on devices.
    """
    split = array.reshape(placement.blocks, -1, *array.shape[1:])
    if placement.mesh is None:
        return split
    spec = PartitionSpec(placement.axes, *[PartitionSpec.UNCONSTRAINED] * (split.ndim - 1))
    return lax.with_sharding_constraint(split, NamedSharding(placement.mesh, spec))


def spread(inputs: Shaped[Array | np.ndarray, "samples ..."], count: int) -> Shaped[Array | np.ndarray, "few ..."]:
    """So many samples at most, spread over all: to look at, not to compute with.

    Args:
        inputs: samples along the first axis.
        count: how many to take, at most.
    """
    return inputs[:: max(inputs.shape[0] // count, 1)][:count]


def counting(
    weights: Shaped[Array | np.ndarray, "samples ..."] | None, blocks: int = 1
) -> Int[np.ndarray, " some"] | None:
    """Which samples have a weight above 0, somewhere; None where all are to be taken.

    So without weights, where all have one or where they are traced, and of several blocks, which have to stay equal.

    Args:
        weights: of samples or of their positions.
        blocks: how the samples lie on devices.
    """
    if weights is None or blocks > 1 or isinstance(weights, Tracer):
        return None
    found = np.asarray(weights).reshape(weights.shape[0], -1).any(1)
    return None if found.all() else np.flatnonzero(found)


def every(
    array: Shaped[Array, "samples ..."], size: int, offset: Int[Array, ""], blocks: int = 1
) -> Shaped[Array, "batch ..."]:
    """About ``size`` samples of all, evenly spaced; over successive offsets each sample gets its turn.

    Args:
        array: samples along the first axis.
        size: how many to take, at most, on all devices together.
        offset: any whole number, which counts on round the spacing; may be traced.
        blocks: how the samples lie on devices.
    """
    of_block = array.shape[0] // blocks
    share = min(max(size // blocks, 1), of_block)
    spaced = np.arange(share, dtype=np.int64) * of_block // share  # in whole numbers of Python's size
    spacing = -(-of_block // share)
    chosen = (jnp.asarray(spaced, jnp.int32) + offset % spacing) % of_block
    blocked = array.reshape(blocks, of_block, *array.shape[1:])
    return jnp.take(blocked, chosen, 1).reshape(blocks * share, *array.shape[1:])


def filled_up(inputs: Shaped[Array | np.ndarray, "samples ..."], size: int) -> Shaped[Array | np.ndarray, "more ..."]:
    """The inputs with their last sample repeated, up to a power of two below ``size`` or a multiple of it above.

    Args:
        inputs: at least one sample.
        size: of a batch.
    """
    samples = inputs.shape[0]
    filled = -(-samples // size) * size if samples > size else min(1 << (samples - 1).bit_length(), size)
    backend = np if isinstance(inputs, np.ndarray) else jnp
    return backend.pad(inputs, ((0, filled - samples), *((0, 0),) * (inputs.ndim - 1)), mode="edge")
