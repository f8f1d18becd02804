"""Data for the experiments: what they are handed, samples held out for choices, and how files are had and read."""

import contextlib
import gzip
import http.client
import threading
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Dataset(NamedTuple):
    """A supervised data set in memory: inputs of shape (samples, features), float32, and what to predict from them."""

    name: str  # in tables, figures and files
    train_inputs: np.ndarray
    train_targets: np.ndarray  # class labels, shape (samples,), or values of shape (samples, outputs)
    test_inputs: np.ndarray
    test_targets: np.ndarray


def hold_out(data: Dataset) -> Dataset:
    """The training part alone: its last sixth to test on, the rest to train on, so that no choice sees the test part.

    Of MNIST's 60,000 training images the last 10,000 are held out, as is usual; the name is then "MNIST-validation".
    """
    kept = len(data.train_inputs) - len(data.train_inputs) // 6
    inputs, targets = data.train_inputs, data.train_targets
    return Dataset(f"{data.name}-validation", inputs[:kept], targets[:kept], inputs[kept:], targets[kept:])


def fetched(url: str, seconds: float, *, to_the_end: bool = False) -> bytes:
    """What an address gives within so many seconds, or nothing; if it is to go on to the end, they are for an answer.

    The time-out of a socket does not bound the name look-up, and the program's end does not wait for a daemon.
    """
    found = []

    def download() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            found.append(urllib.request.urlopen(url, timeout=seconds).read())

    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(None if to_the_end else seconds)
    return b"".join(found)


def unpacked(path: Path, size: int = -1) -> bytes:
    """The first bytes of a file, of what it was before if it is gzipped; a ValueError if it is truncated or corrupt."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
            return stream.read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} can't be read: {error}; fetch it again") from error
