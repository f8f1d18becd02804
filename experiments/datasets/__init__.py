"""Data for the experiments: what they are handed, and training samples held out for choices."""

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
