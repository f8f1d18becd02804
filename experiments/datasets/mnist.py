"""MNIST in memory, from its four idx files, which are a short header each, and the raw bytes.

Source: Y. LeCun, C. Cortes and C. J. C. Burges, "The MNIST database of handwritten digits".
"""

import hashlib
import math
import tempfile
from pathlib import Path

import numpy as np

from experiments.datasets import Dataset, fetched, unpacked

URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
FILES = {  # shape, and sha256 of the unpacked file; the smallest first, as they are fetched in this order
    "t10k-labels-idx1-ubyte": ((10_000,), "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    "train-labels-idx1-ubyte": ((60_000,), "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": ((10_000, 28, 28), "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "train-images-idx3-ubyte": ((60_000, 28, 28), "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
}


def load(folder: Path | None = None, *, prepared_in: Path | None = None) -> Dataset:
    """MNIST with pixels scaled to [0, 1] and images as rows of 784, from a folder with the four files, gzipped or not.

    Without a folder they are fetched, once; a ConnectionError if no network answers within three seconds. They are
    ``prepared_in`` a folder of TensorFlow Datasets, or in its usual place, and kept there: records take long to read.
    """
    from experiments.datasets.prepared import Builder  # tfds is slow to import, so only here

    (_, *pixels), _ = FILES["train-images-idx3-ubyte"]
    builder = Builder("mnist_idx", {"image": (pixels, np.uint8), "label": ((), np.uint8)}, prepared_in)
    kept = Path(builder.data_path)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        if folder is None and not kept.exists():
            folder = fetch(Path(temporary))
        try:
            test_labels, labels, test_images, images = (read(folder or kept, name) for name in FILES)
        except (FileNotFoundError, ValueError) as error:
            if folder is not None:
                raise
            raise ValueError(f"{error}. Delete {kept}, and start again") from error
        if not kept.exists():
            parts = {"train": zip(images, labels, strict=True), "test": zip(test_images, test_labels, strict=True)}
            splits = {name: [{"image": image, "label": label} for image, label in part] for name, part in parts.items()}
            builder.prepare(splits, [find(folder, name) for name in FILES])
    train, test = (array.reshape(len(array), -1).astype(np.float32) / 255 for array in (images, test_images))
    return Dataset("MNIST", train, labels.astype(np.int32), test, test_labels.astype(np.int32))


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
    content = unpacked(path, size + 100)  # not much more than it should hold, whatever it unpacks to
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path} is not {name}, but truncated, corrupt or another file; fetch it again")
    return np.frombuffer(content[-size:], np.uint8).reshape(shape)


def fetch(folder: Path, seconds: float = 3.0) -> Path:
    """Downloads the four files into a folder; without the first within so many seconds, no other is tried.

    A ConnectionError names a file that did not come, or in whose place something else came, as from a portal.
    """
    for number, name in enumerate(FILES):
        content = fetched(f"{URL}{name}.gz", seconds, to_the_end=number > 0)
        (folder / f"{name}.gz").write_bytes(content)
        try:
            read(folder, name)
        except ValueError as error:
            raise ConnectionError(f"no {name}.gz from {URL}") from error
    return folder
