"""What tells arrays from others without keeping them: a sum of their bits, the same on any devices."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

from ecjax import _trees

_ODD = 2654435761


@jax.jit
def of_array(array: Array) -> Array:
    """The sum of the bits of all entries, each times another odd number, modulo 2³²."""
    array = jnp.stack([array.real, array.imag]) if jnp.iscomplexobj(array) else jnp.asarray(array)
    if jax.dtypes.itemsize_bits(array.dtype) < 8 and array.dtype != bool:
        array = array.astype(jnp.float32)  # which holds every number of four bits
    if jnp.issubdtype(array.dtype, jnp.bool_):
        bits = array.astype(jnp.uint32)
    else:
        words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(array, words).astype(jnp.uint32)
    odd = jnp.ones(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        odd = odd * jnp.uint32(_ODD) + 2 * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return (bits * odd).sum(dtype=jnp.uint32)


@jax.jit
def of_params(params: PyTree) -> Array:
    """That of all leaves, which are arrays, in their order; never 0, which stands for no params."""
    total = jnp.uint32(1)
    for leaf in jax.tree.leaves(params):
        numbers = jax.random.key_data(leaf) if _trees.is_key(leaf) else leaf
        total = total * jnp.uint32(_ODD) + of_array(numbers)
    return jnp.maximum(total, 1)
