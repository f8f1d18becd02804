"""How time and memory are measured: by turns with a call to compare with, and without the compilation."""

import ctypes
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np


def by_turns(call: Callable, reference: Callable, *, rounds: int, seconds: float) -> tuple[float, float, float]:
    """The median seconds of two calls, and by how many bytes the first raises the resident memory of the process.

    They run by turns, so that a slow moment of the machine hits both: what is worth quoting is the ratio. After a first
    time for the compiler they run so many rounds, but not again after so many seconds in all.
    """
    times, memory = [], math.nan
    _seconds(call), _seconds(reference)
    while not times or (len(times) < rounds and np.sum(times) < seconds):
        before = math.nan if times else _reset_peak()
        taken = _seconds(call)
        if not math.isnan(before):
            memory = max(_status("VmHWM") - before, 0)
        times.append((taken, taken if reference is call else _seconds(reference)))
    return *np.median(times, axis=0).tolist(), memory


def _seconds(call: Callable) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _reset_peak() -> float:
    """Sets the peak of the resident memory back to what is in use now, and says what; NaN where Linux is not."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or what an earlier call has freed would be there already
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return math.nan


def _status(field: str) -> int:
    """A field of the process's status, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def compiler_bytes(call: Callable, *arguments: Any) -> float:
    """Temporary memory and results of one call, by XLA's own account; NaN where it gives none."""
    analysis = jax.jit(call).lower(*arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes if analysis else math.nan
