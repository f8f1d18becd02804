"""What a computation costs: seconds, bytes, and multiply-adds.

All candidates run in turn, round after round, so that a slow moment of the machine hits them alike; what is worth
quoting is the ratio of two medians.
"""

import ctypes
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Candidate(NamedTuple):
    """Something to time.

    Attributes:
        call: ``call(*arguments)``, from arrays to arrays.
        arguments: of the call.
        multiply_adds: how many it takes, counted on paper.
        scale: what to multiply its time by, where it runs on a part of the samples and its cost is linear in them.
        traceable: whether it can be compiled as a whole, to ask the compiler for its memory.
    """

    call: Callable[..., Any]
    arguments: tuple
    multiply_adds: float
    scale: float = 1.0
    traceable: bool = True


class Cost(NamedTuple):
    """What a candidate took; None where it can't be known.

    Attributes:
        seconds: median over the rounds, scaled up to all samples.
        multiply_adds: as many as the candidate says.
        compiler_bytes: temporary memory and results of one call, by XLA's own account.
        process_bytes: how far the resident memory of the process rose above what it was before the call.
    """

    seconds: float
    multiply_adds: float
    compiler_bytes: int | None
    process_bytes: int | None


def measure(
    candidates: Mapping[str, Candidate], *, rounds: int, seconds: float, advance: Callable[[str], None]
) -> dict[str, Cost]:
    """The cost of each candidate; compilation is not counted.

    Args:
        candidates: by name.
        rounds: how many times each runs at most.
        seconds: a candidate that has run for so long is not run again.
        advance: called with the name of each candidate and round when it begins.
    """
    times, peaks = {name: [] for name in candidates}, {}
    for name, candidate in candidates.items():
        advance(name)
        _run(candidate)
    for number, (name, candidate) in itertools.product(range(rounds), candidates.items()):
        if sum(times[name]) > seconds:
            continue
        advance(name)
        before = _reset_peak() if number == 0 else None
        times[name].append(_run(candidate))
        if number == 0:
            peaks[name] = None if before is None else max(_status("VmHWM") - before, 0)
    return {
        name: Cost(
            statistics.median(times[name]) * candidate.scale,
            candidate.multiply_adds * candidate.scale,
            compiler_bytes(candidate),
            peaks[name],
        )
        for name, candidate in candidates.items()
    }


def _run(candidate: Candidate) -> float:
    start = time.perf_counter()
    jax.block_until_ready(candidate.call(*candidate.arguments))
    return time.perf_counter() - start


def compiler_bytes(candidate: Candidate) -> int | None:
    """Temporary memory and results of one call, by XLA's own account."""
    if not candidate.traceable:
        return None
    analysis = jax.jit(candidate.call).lower(*candidate.arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes if analysis else None


def _reset_peak() -> int | None:
    """Sets the peak of the resident memory back to what is in use now, and says what; None where Linux is not."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or what an earlier call has freed would be there already
        _RESET.write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def _status(field: str) -> int:
    """A field of the process's status, in bytes."""
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def weights(widths: tuple[int, ...]) -> int:
    """How many weights an MLP of these widths has: the multiply-adds of one sample's forward pass."""
    return sum(map(math.prod, itertools.pairwise(widths)))


def forward_pass(widths: tuple[int, ...], samples: int) -> int:
    """Multiply-adds of the outputs."""
    return samples * weights(widths)


def gradient_pass(widths: tuple[int, ...], samples: int) -> int:
    """Multiply-adds of the gradient of a loss: forward, back to the first layer's neurons, and to every weight."""
    return samples * (2 * weights(widths) + weights(widths[1:]))


def moments(widths: tuple[int, ...], samples: int, rows: int) -> int:
    """Multiply-adds of EC or optimal brain damage: forward, so many times back, and two products a layer."""
    return samples * (3 * weights(widths) + rows * weights(widths[1:]))


def jacobians(widths: tuple[int, ...], samples: int) -> int:
    """Multiply-adds of all outputs' gradients of every sample: as many numbers as samples × outputs × weights."""
    return samples * (weights(widths) + widths[-1] * (weights(widths) + weights(widths[1:])))


def definition(widths: tuple[int, ...], samples: int) -> int:
    """Multiply-adds of one forward pass for every weight."""
    return weights(widths) * forward_pass(widths, samples)
