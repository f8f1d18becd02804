"""MNIST in memory: prepared once by TensorFlow Datasets, checked against the original release, fast from then on."""

import contextlib
import os
import tempfile
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np

from experiments.datasets import Dataset, idx
from experiments.datasets.mnist_files import FILES, URL


class UnavailableError(Exception):
    """MNIST is not on this machine and can't be fetched."""


def load(folder: Path | None = None, *, prepared_in: Path | None = None, seconds: float = 3.0) -> Dataset:
    """MNIST with pixels scaled to [0, 1] and images as rows of 784.

    Args:
        folder: holds the four idx files, gzipped or not; None to download them.
        prepared_in: where TensorFlow Datasets keeps what it prepared; None for its usual place.
        seconds: how long to look for a network before giving up.

    Raises:
        UnavailableError: no folder, nothing prepared, and no network.
        FileNotFoundError: the folder lacks a file.
        ValueError: a file is truncated or corrupt; the message names it.
    """
    arrays = _arrays(folder, prepared_in, seconds)
    images = [arrays[f"{split}_images"].reshape(-1, 784).astype(np.float32) / 255 for split in ("train", "test")]
    labels = [arrays[f"{split}_labels"].astype(np.int32) for split in ("train", "test")]
    return Dataset("MNIST", images[0], labels[0], images[1], labels[1])


def _arrays(folder: Path | None, prepared_in: Path | None, seconds: float) -> dict[str, np.ndarray]:
    from experiments.datasets.mnist_builder import MnistIdx  # tfds is slow to import, so only here

    if folder is not None:
        for file in FILES.values():  # a bad file of the caller's is refused even where MNIST is prepared already
            idx.read(idx.locate(folder, file), file)
    builder = MnistIdx(folder=folder, data_dir=prepared_in)
    if folder is None and not Path(builder.data_path).exists() and not reachable(URL, seconds):
        raise UnavailableError(f"no answer from {URL} within {seconds:g} s")
    builder.download_and_prepare()  # into a folder of another name until it is whole
    return read_prepared(builder)


def reachable(url: str, seconds: float) -> bool:
    """Whether a server answers at all within so many seconds, name look-up included."""
    answered = threading.Event()

    def ask():
        with contextlib.suppress(OSError):
            with contextlib.suppress(urllib.error.HTTPError):  # which is an answer all the same
                urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            answered.set()

    threading.Thread(target=ask, daemon=True).start()  # the timeout of a socket does not bound the name look-up
    return answered.wait(seconds)


def read_prepared(builder) -> dict[str, np.ndarray]:
    """The four arrays of a prepared builder, by the names in its FILES.

    Reading 70,000 records one by one takes seconds, so what was read is kept beside them, as the original idx files.
    Either way the arrays are checked against the sha256 of these.

    Raises:
        ValueError: the records are not what the original files hold; the message names the folder to delete.
    """
    records = Path(builder.data_path)
    with contextlib.suppress(OSError, ValueError):
        return {part: idx.read(records / file.name, file) for part, file in builder.FILES.items()}
    arrays = {}
    for split in ("train", "test"):
        examples = list(builder.as_data_source(split=split))
        arrays[f"{split}_images"] = np.stack([example["image"] for example in examples])
        arrays[f"{split}_labels"] = np.array([example["label"] for example in examples], np.uint8)
    for part, file in builder.FILES.items():
        start, content = idx.header(arrays[part].shape), arrays[part].tobytes()
        idx.check(content, start, records, file)
        _save_atomically(records / file.name, start + content)
    return arrays


def _save_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is either whole or not there; a folder that can't be written to costs only time."""
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as stream:
            stream.write(content)
        os.replace(stream.name, path)
