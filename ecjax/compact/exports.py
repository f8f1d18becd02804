"""A network and its params as one program, which runs where neither ecjax nor the network's code is installed."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import numpy as np

from ecjax import _checks, _precision, _trees
from ecjax._types import Inputs, Network, Params
from ecjax._writing import write_whole
from ecjax.compact import answers

_HOW = "flatbuffers is not installed: pip install 'ecjax[files]'"
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_MOST_BYTES = 2**31 - 2**24  # what flatbuffers hold, with room for the program itself


def export(
    path: str | os.PathLike,
    network: Network,
    params: Params,
    inputs: Inputs,
    *,
    samples: int | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> int:
    """Writes a program that holds a network and its params, for any number of samples.

    It is what ``jax.export`` makes. Three lines run it where jax and flatbuffers are installed, and ecjax is not::

        from jax import export
        program = export.deserialize(bytearray(open("pruned.jax", "rb").read()))
        outputs = program.call(inputs)

    The program takes inputs of the shape of a sample and of the dtype that the network was given, and computes what the
    network computes, on 1 and on a few samples up to rounding: this is compared before the file is written. It holds
    params dense, and no derivatives. ``save`` keeps params that are to be trained or pruned on.

    Args:
        path: of the file; its folder must exist.
        network: traced with a number of samples that is not known, so its code may use ``inputs.shape[0]`` in shapes
            and not otherwise; the networks of ``compact`` are traced sample by sample.
        inputs: a few are enough, any that the network takes.
        samples: how many the program takes, exactly, for a network that depends on their number; any number if None.
        platforms: on which the program runs: some of "cpu", "cuda", "rocm" and "tpu".

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: a network that can't be traced for any number of samples, or answers otherwise then; one with
            operations that no file holds, such as calls back to Python; params without values, or of 2 GiB and more;
            an unknown platform.
        ModuleNotFoundError: flatbuffers is not installed.

    Example:
        >>> size = compact.export("pruned.jax", network, pruned.params, inputs)
        >>> from jax import export
        >>> program = export.deserialize(bytearray(open("pruned.jax", "rb").read()))
        >>> bool(jnp.allclose(program.call(inputs), network(pruned.params, inputs), atol=1e-5))
        True
    """
    _require_flatbuffers()
    _checks.require_inputs(inputs)
    if samples is not None:
        _checks.require_positive(samples, "samples")
    if isinstance(platforms, str) or not platforms or not set(platforms) <= set(_PLATFORMS):
        raise ValueError(f"platforms is {platforms!r}; it must be a list of some of {', '.join(map(repr, _PLATFORMS))}")
    inner, arrays, _ = _trees.split(network, params)
    if not _checks.are_known((arrays, inputs)):
        raise ValueError("a program holds the values of the params: call this outside of jit, vmap and grad")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    if size > _MOST_BYTES:
        raise ValueError(
            f"the params take {size:,} bytes, and a program holds at most {_MOST_BYTES:,}; use compact.save"
        )
    # Arrays that are spread over devices would make it a program for as many.
    arrays, few = jax.device_put((arrays, answers.few(inputs)), jax.local_devices()[0])
    counts = (1, few.shape[0]) if samples is None else (samples,)
    batches = [few[np.arange(count) % few.shape[0]] for count in counts]
    expected = [answers.of(inner, arrays, batch) for batch in batches]
    call = lambda inputs: inner(arrays, inputs)  # noqa: E731
    shape = _shape(batches[-1], samples)
    # Compared in full precision, whatever the device rounds products to; the program keeps what the network asks for.
    compared = _program(_precision.in_full(call), shape, (jax.default_backend(),))
    for batch, outputs in zip(batches, expected, strict=True):
        name = (
            f"the network depends on the number of samples, and the program gives other outputs for {batch.shape[0]} "
            "of them. Give samples= for a program that takes exactly that many"
        )
        answers.require_same(name, np.asarray(compared.call(batch)), outputs, (inner, arrays, batch))
    return write_whole(path, _bytes(_program(call, shape, platforms)))


def _require_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_HOW) from error


def _shape(inputs: jax.Array, samples: int | None) -> jax.ShapeDtypeStruct:
    """The shape of the inputs that a program takes; of any number of samples if that is None."""
    count = jax.export.symbolic_shape("samples")[0] if samples is None else samples
    return jax.ShapeDtypeStruct((count, *inputs.shape[1:]), inputs.dtype)


def _program(call: Callable, shape: jax.ShapeDtypeStruct, platforms: Sequence[str]) -> jax.export.Exported:
    try:
        jax.eval_shape(call, shape)
    except Exception as error:
        raise ValueError(
            f"the network can't be traced for any number of samples: {_words(error)}. Use inputs.shape[0] in shapes "
            "alone: no len(inputs), no loop and no branch over the number of samples; or give samples= for a program "
            "that takes exactly that many"
        ) from error
    try:
        return jax.export.export(jax.jit(call), platforms=tuple(platforms))(shape)
    except Exception as error:
        raise ValueError(
            f"the network can't be exported for {', '.join(platforms)}: {_words(error)}. Name other platforms=, give "
            "samples= if an operation needs their number, or leave out of the network what is not computed in JAX"
        ) from error


def _bytes(program: jax.export.Exported) -> bytes:
    try:
        return bytes(program.serialize())
    except Exception as error:
        raise ValueError(
            f"the network holds an operation that no file can hold: {_words(error)}. Leave calls back to Python, such "
            "as jax.debug.print and jax.pure_callback, out of it"
        ) from error


def _words(error: Any) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
