"""The moments of one batch whose samples lie on several devices: each takes those of its own block.

Where samples are gone over one at a time, a scan over samples on several devices would gather them. In a product of
matrices, what maps over blocks of samples does not (``products``), and params that are spread over the same devices
stay so. It would turn a convolution into a grouped one, which XLA's partitioner gets wrong where its kernel is spread
as well (jaxlib 0.10.2): there ``shard_map`` gives each device its block, with params that are whole along these axes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, PRNGKeyArray

from ecjax._batches import Placement
from ecjax._types import Inputs, Network, Params
from ecjax.moments.additive import Moments, together
from ecjax.moments.batch import of_batch


def of_blocks(
    placement: Placement,
    seen: Moments,
    network: Network,
    params: Params,
    inputs: Inputs,
    counted: Bool[Array, " samples"],
    key: PRNGKeyArray,
    weights: Float[Array, "samples ..."] | None,
    ignored: dict[str, Bool[Array, "stack out"]],
) -> Moments:
    """``of_batch``, on each device for its own block.

    Layers that see one row of each sample need no care: their sums over samples are the compiler's to spread.

    Args:
        placement: how the samples lie on devices.
    """
    if placement.mesh is None or all(layer.outer or (layer.once and layer.window == 1) for layer in seen.read):
        return of_batch(seen, network, params, inputs, counted, key, weights, ignored, placement)
    taken = dataclasses.replace(seen, samples=jnp.zeros(()), layers={})

    def of_block(params, inputs, counted, key, weights, ignored, metric):
        own = jax.random.fold_in(key, lax.axis_index(placement.axes))
        here = dataclasses.replace(taken, metric=metric)
        found = of_batch(here, network, params, inputs, counted, own, weights, ignored)
        return jax.tree.map(lambda leaf: leaf[None], (found.samples, found.layers))

    of_samples, everywhere = PartitionSpec(placement.axes), PartitionSpec()
    samples, layers = jax.shard_map(
        of_block,
        mesh=placement.mesh,
        in_specs=(everywhere, of_samples, of_samples, everywhere, of_samples, everywhere, everywhere),
        out_specs=of_samples,
        axis_names=set(placement.axes),
        check_vma=False,
    )(params, inputs, counted, key, weights, ignored, seen.metric)
    of_all = {path: together(of_blocks) for path, of_blocks in layers.items()}
    return dataclasses.replace(seen, samples=samples.sum(), layers=of_all)
