"""Which digits an experiment runs on: MNIST where it can be had, else the ones bundled with scikit-learn."""

import os
import sys
from pathlib import Path

from experiments.datasets import Dataset, digits, mnist


def load(name: str, folder: Path | None = None) -> Dataset:
    """Loads "mnist" or "digits".

    Without a folder, without the environment variable ``ECJAX_DATA_DIR``, with nothing prepared earlier and without a
    network, "mnist" says so in one line on stderr and gives the digits, named as such.

    Args:
        name: "mnist" or "digits".
        folder: holds the four idx files of MNIST; None for ``ECJAX_DATA_DIR``, if set.

    Raises:
        FileNotFoundError: the folder lacks one of the four files.
        ValueError: a file is truncated or corrupt, or a name that is neither.
    """
    if name == "digits":
        return digits.load()
    if name != "mnist":
        raise ValueError(f"data is {name!r}; it must be 'mnist' or 'digits'")
    if folder is None and os.environ.get("ECJAX_DATA_DIR"):
        folder = Path(os.environ["ECJAX_DATA_DIR"])
    try:
        return mnist.load(folder)
    except mnist.UnavailableError as reason:
        print(
            f"MNIST could not be fetched ({reason}), so this runs on scikit-learn's digits; to provide it, put its "
            "four idx files in a folder and name that with --data-dir or ECJAX_DATA_DIR",
            file=sys.stderr,
        )
        return digits.load()


def load_or_exit(name: str, folder: Path | None) -> Dataset:
    """As ``load``, for a command line: a missing or corrupt file ends the program with its one-line message."""
    try:
        return load(name, folder)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
