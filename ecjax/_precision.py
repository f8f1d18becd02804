"""The precision of matrix products, chosen on purpose.

JAX leaves it to the device: GPUs round the factors of a float32 product to TF32, ten bits, and TPUs to bfloat16, seven.
An importance is a variance, whose digits cancel; what is computed here is computed in full. A network whose layers
compute in bfloat16 (``dtype``) or that names a precision for a product of its own keeps it.
"""

import functools
from collections.abc import Callable

import jax


def in_full(function: Callable) -> Callable:
    """The function with all products of float32 in float32 on every device, whatever ``jax_default_matmul_precision``.

    A network that is called in it is traced again under that setting, even where it was jitted before.
    """

    @functools.wraps(function)
    def call(*arguments, **options):
        with jax.default_matmul_precision("highest"):
            return function(*arguments, **options)

    return call


def compiled(*static: str) -> Callable[[Callable], Callable]:
    """Decorates a function that computes in full precision and is compiled once for each of its static arguments."""
    return lambda function: jax.jit(in_full(function), static_argnames=static)
