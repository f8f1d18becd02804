"""MNIST as a TensorFlow Datasets builder that needs no TensorFlow, which the stock one imports to encode PNGs.

Reading 70,000 records one by one takes seconds, so the idx files themselves are kept beside the records.
"""

import shutil
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets import mnist


class MnistIdx(tfds.core.GeneratorBasedBuilder):
    """The 70,000 digits of MNIST from the four idx files in a folder."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, folder: Path | None = None, **arguments):
        self._folder = folder
        super().__init__(file_format="array_record", **arguments)

    def _info(self):
        pixels = tfds.features.Tensor(shape=mnist.FILES["train-images-idx3-ubyte"][0][1:], dtype=np.uint8)
        features = tfds.features.FeaturesDict({"image": pixels, "label": tfds.features.Scalar(dtype=np.uint8)})
        return tfds.core.DatasetInfo(builder=self, features=features, citation=mnist.__doc__, disable_shuffling=True)

    def _split_generators(self, _manager):  # which tries a dead network for minutes
        test_labels, labels, test_images, images = (mnist.read(self._folder, name) for name in mnist.FILES)
        for name in mnist.FILES:
            shutil.copy(mnist.find(self._folder, name), self.data_path)  # another folder's name until all is prepared
        examples = self._generate_examples
        return {"train": examples(images, labels), "test": examples(test_images, test_labels)}

    def _generate_examples(self, images, labels):
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": image, "label": label}
