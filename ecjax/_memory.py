"""What to do where a device runs out of memory."""

import contextlib
from collections.abc import Iterator

import jax

FEWER_ROWS = "or give probes=1 and a key where there are many outputs"  # of the metric, of scores


@contextlib.contextmanager
def enough(advice: str) -> Iterator[None]:
    """Turns the error of a device that runs out of memory into a MemoryError that says which size to lower.

    Args:
        advice: what to do, in words that follow "ran out of memory: ".
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        # CPUs and GPUs say it in different words, and raise it where a result is waited for.
        if not any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory")):
            raise
        raise MemoryError(f"a device ran out of memory: {advice}. Nothing that was given has changed") from error
