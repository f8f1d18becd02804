"""MNIST in memory, from its four idx files: a folder's, or those that were fetched and prepared once.

Source: Y. LeCun, C. Cortes and C. J. C. Burges, "The MNIST database of handwritten digits". An idx file is a short
header with the shape, and the raw bytes.
"""

import contextlib
import gzip
import hashlib
import http.client
import math
import tempfile
import threading
import urllib.request
import zlib
from pathlib import Path

import numpy as np

from experiments.datasets import Dataset

URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
FILES = {  # shape, and sha256 of the unpacked file; the smallest first, as they are fetched in this order
    "t10k-labels-idx1-ubyte": ((10_000,), "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    "train-labels-idx1-ubyte": ((60_000,), "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": ((10_000, 28, 28), "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "train-images-idx3-ubyte": ((60_000, 28, 28), "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
}


class UnavailableError(Exception):
    """MNIST is not on this machine and can't be fetched."""


def load(folder: Path | None = None, *, prepared_in: Path | None = None, seconds: float = 3.0) -> Dataset:
    """MNIST with pixels scaled to [0, 1] and images as rows of 784, from a folder with the four files, gzipped or not.

    Without a folder they are fetched, once; an UnavailableError if no network answers within so many seconds. They are
    ``prepared_in`` a folder of TensorFlow Datasets, or in its usual place.
    """
    from experiments.datasets.mnist_builder import MnistIdx  # tfds is slow to import, so only here

    prepared = Path(MnistIdx(data_dir=prepared_in).data_path)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        if folder is None and not prepared.exists():
            folder = fetch(Path(temporary), seconds)
        try:
            test_labels, train_labels, test_images, train_images = (read(folder or prepared, name) for name in FILES)
        except (FileNotFoundError, ValueError) as error:
            if folder is not None:
                raise
            raise ValueError(f"{error}. Delete {prepared}, and start again") from error
        # Does nothing where it is prepared already; while it prepares, the folder has another name.
        MnistIdx(folder=folder, data_dir=prepared_in).download_and_prepare()
    train, test = (images.reshape(len(images), -1).astype(np.float32) / 255 for images in (train_images, test_images))
    return Dataset("MNIST", train, train_labels.astype(np.int32), test, test_labels.astype(np.int32))


def find(folder: Path, name: str) -> Path:
    """The path of a file in a folder, gzipped or not."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} holds neither {name} nor {name}.gz")


def read(folder: Path, name: str) -> np.ndarray:
    """The labels or pixels in one file; a ValueError names a file that is truncated, corrupt or another."""
    path, (shape, sha256) = find(folder, name), FILES[name]
    size = math.prod(shape)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
            content = stream.read(size + 100)  # not much more than it should hold, whatever it unpacks to
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} can't be read: {error}; fetch it again") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path} is not {name}, but truncated, corrupt or another file; fetch it again")
    return np.frombuffer(content[-size:], np.uint8).reshape(shape)


def fetch(folder: Path, seconds: float) -> Path:
    """Downloads the four files into a folder; without the first within so many seconds, no other is tried.

    An UnavailableError names a file that did not come, or in whose place something else came, as from a portal.
    """

    def download(name: str) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):  # what came is checked below
            (folder / name).write_bytes(urllib.request.urlopen(URL + name, timeout=seconds).read())

    for number, name in enumerate(FILES):
        # The time-out of a socket does not bound the name look-up, and the program's end does not wait for a daemon.
        thread = threading.Thread(target=download, args=(f"{name}.gz",), daemon=True)
        thread.start()
        thread.join(None if number else seconds)
        try:
            read(folder, name)
        except (FileNotFoundError, ValueError) as error:
            raise UnavailableError(f"no {name}.gz from {URL}") from error
    return folder
