"""The handwritten digits bundled with scikit-learn: 1,797 images of 8×8 pixels, there without a network."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from experiments.datasets import Dataset


def load(_folder: object = None) -> Dataset:
    """All 1,797 digits, scaled to [0, 1]; every fifth is for testing, classes balanced, always the same split."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return Dataset("digits", images[train], labels[train], images[test], labels[test])
