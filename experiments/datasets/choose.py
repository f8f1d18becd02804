"""Which images an experiment runs on: MNIST where it can be had, else the digits bundled with scikit-learn."""

import os
import sys
from pathlib import Path
from typing import Literal

from experiments.datasets import Dataset, digits, mnist

# By the name that --data takes; called with the folder of --data-dir, or None. Another data set is one more entry.
LOADERS = {"mnist": mnist.load, "digits": digits.load}
Name = Literal[tuple(LOADERS)]


def load(name: str, folder: Path | None = None) -> Dataset:
    """Loads a data set from a folder, or from that in ``ECJAX_DATA_DIR``.

    Where MNIST is not on this machine and can't be fetched, this says so in one line on stderr and gives the digits. A
    file that is missing in the folder is a FileNotFoundError, a truncated or corrupt one a ValueError.
    """
    if name not in LOADERS:
        raise ValueError(f"data is {name!r}; it must be {' or '.join(map(repr, LOADERS))}")
    if folder is None and os.environ.get("ECJAX_DATA_DIR"):
        folder = Path(os.environ["ECJAX_DATA_DIR"])
    try:
        return LOADERS[name](folder)
    except mnist.UnavailableError as reason:
        words = f"MNIST could not be fetched ({reason}), so this runs on scikit-learn's digits; to provide it, put its"
        print(f"{words} four idx files in a folder and name that with --data-dir or ECJAX_DATA_DIR", file=sys.stderr)
        return digits.load()
