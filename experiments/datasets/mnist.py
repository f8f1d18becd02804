"""MNIST in memory, from its four idx files: a folder's, or those that were fetched and prepared once.

Source: Y. LeCun, C. Cortes and C. J. C. Burges, "The MNIST database of handwritten digits".
"""

import contextlib
import http.client
import shutil
import tempfile
import threading
import urllib.request
from pathlib import Path

import numpy as np

from experiments.datasets import Dataset, idx

URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_SHA256 = (
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
)
FILES = {
    "test_labels": idx.IdxFile("t10k-labels-idx1-ubyte", (10_000,), _SHA256[0]),  # the smallest, fetched first
    "train_labels": idx.IdxFile("train-labels-idx1-ubyte", (60_000,), _SHA256[1]),
    "test_images": idx.IdxFile("t10k-images-idx3-ubyte", (10_000, 28, 28), _SHA256[2]),
    "train_images": idx.IdxFile("train-images-idx3-ubyte", (60_000, 28, 28), _SHA256[3]),
}


class UnavailableError(Exception):
    """MNIST is not on this machine and can't be fetched."""


def load(folder: Path | None = None, *, prepared_in: Path | None = None, seconds: float = 3.0) -> Dataset:
    """MNIST with pixels scaled to [0, 1] and images as rows of 784.

    Args:
        folder: holds the four idx files, gzipped or not; None to fetch them, once.
        prepared_in: where TensorFlow Datasets keeps what it prepared; None for its usual place.
        seconds: how long to wait for a network before giving up with an UnavailableError.
    """
    from experiments.datasets.mnist_builder import MnistIdx  # tfds is slow to import, so only here

    prepared = Path(MnistIdx(data_dir=prepared_in).data_path)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        if folder is None and not prepared.exists():
            folder = fetch(Path(temporary), seconds)
        try:
            arrays = {part: idx.read(idx.locate(folder or prepared, file), file) for part, file in FILES.items()}
        except (FileNotFoundError, ValueError) as error:
            if folder is not None:
                raise
            raise ValueError(f"{error}. Delete {prepared}, and start again") from error
        # Does nothing where it is prepared already; while it prepares, the folder has another name.
        MnistIdx(folder=folder, data_dir=prepared_in).download_and_prepare()
    images = {part: array.reshape(len(array), -1).astype(np.float32) / 255 for part, array in arrays.items()}
    labels = {part: array.astype(np.int32) for part, array in arrays.items()}
    train, test = ((images[f"{split}_images"], labels[f"{split}_labels"]) for split in ("train", "test"))
    return Dataset("MNIST", *train, *test)


def fetch(folder: Path, seconds: float) -> Path:
    """Downloads the four files into a folder; without the first within so many seconds, no other is tried.

    An UnavailableError names a file that did not come, or in whose place something else came, as from a portal.
    """

    def download(name: str) -> None:
        with (
            contextlib.suppress(OSError, http.client.HTTPException),  # what came is checked below
            urllib.request.urlopen(URL + name, timeout=seconds) as answer,
            (folder / name).open("wb") as file,
        ):
            shutil.copyfileobj(answer, file)

    for number, file in enumerate(FILES.values()):
        # The time-out of a socket does not bound the name look-up, and the program's end does not wait for a daemon.
        thread = threading.Thread(target=download, args=(f"{file.name}.gz",), daemon=True)
        thread.start()
        thread.join(None if number else seconds)
        try:
            idx.read(folder / f"{file.name}.gz", file)
        except ValueError as error:
            raise UnavailableError(f"no {file.name}.gz from {URL}") from error
    return folder
