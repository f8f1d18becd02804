"""Which images an experiment runs on: MNIST where it can be had, else the digits bundled with scikit-learn."""

import os
import sys
from pathlib import Path
from typing import Literal

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from experiments.datasets import Dataset, mnist


def digits(_folder: Path | None = None) -> Dataset:
    """All 1,797 digits, 8×8 pixels in [0, 1]; every fifth is for testing, classes balanced, always the same split."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return Dataset("digits", images[train], labels[train], images[test], labels[test])


# By the name that --data takes; called with the folder of --data-dir, or None. Another data set is one more entry.
LOADERS = {"mnist": mnist.load, "digits": digits}
Name = Literal[tuple(LOADERS)]


def load(name: str, folder: Path | None = None) -> Dataset:
    """Loads a data set from a folder, or from that in ``ECJAX_DATA_DIR``.

    Where MNIST is not on this machine and can't be fetched, this says so in one line on stderr and gives the digits. A
    file that is missing in the folder is a FileNotFoundError, a truncated or corrupt one a ValueError.
    """
    if name not in LOADERS:
        raise ValueError(f"data is {name!r}; it must be {' or '.join(map(repr, LOADERS))}")
    named = folder or os.environ.get("ECJAX_DATA_DIR")
    try:
        return LOADERS[name](Path(named) if named else None)
    except ConnectionError as reason:
        words = f"MNIST could not be fetched ({reason}), so this runs on scikit-learn's digits; to provide it, put its"
        print(f"{words} four idx files in a folder and name that with --data-dir or ECJAX_DATA_DIR", file=sys.stderr)
        return digits()
