"""MNIST as a TensorFlow Datasets builder that needs no TensorFlow.

The stock builder imports TensorFlow to unzip and to encode PNGs. This one reads the idx files itself, keeps the pixels
as a ``Tensor`` feature and is prepared as ``array_record``. Reading 70,000 records one by one takes seconds, so the
files themselves are kept beside the records.
"""

import shutil
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets import idx, mnist


class MnistIdx(tfds.core.GeneratorBasedBuilder):
    """The 70,000 digits of MNIST from the four idx files in a folder."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, folder: Path | None = None, **arguments):
        self._folder = folder
        super().__init__(file_format="array_record", **arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        pixels = tfds.features.Tensor(shape=mnist.FILES["train_images"].shape[1:], dtype=np.uint8)
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"image": pixels, "label": tfds.features.Scalar(dtype=np.uint8)}),
            citation=mnist.__doc__,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # it tries a dead network for minutes
        paths = {part: idx.locate(self._folder, file) for part, file in mnist.FILES.items()}
        arrays = {part: idx.read(path, mnist.FILES[part]) for part, path in paths.items()}
        for path in paths.values():
            shutil.copy(path, self.data_path)  # another folder's name until all is prepared
        return {
            split: self._generate_examples(arrays[f"{split}_images"], arrays[f"{split}_labels"])
            for split in ("train", "test")
        }

    def _generate_examples(self, images, labels):
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": image, "label": label}
