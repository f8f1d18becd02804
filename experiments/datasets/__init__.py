"""Data for the experiments: MNIST, the digits bundled with scikit-learn, and what both are handed on as."""

from typing import NamedTuple

import numpy as np


class Dataset(NamedTuple):
    """A supervised data set in memory.

    Attributes:
        name: what tables, figures and files call it.
        train_inputs: float32, shape (samples, features).
        train_targets: class labels, shape (samples,), or values of shape (samples, outputs).
        test_inputs: as train_inputs.
        test_targets: as train_targets.
    """

    name: str
    train_inputs: np.ndarray
    train_targets: np.ndarray
    test_inputs: np.ndarray
    test_targets: np.ndarray
