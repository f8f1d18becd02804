"""MNIST as a TensorFlow Datasets builder that needs no TensorFlow.

The stock builder imports TensorFlow to unzip and to encode PNGs. This one reads the idx files itself, keeps the pixels
as a ``Tensor`` feature and is prepared as ``array_record``.
"""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets import idx
from experiments.datasets.mnist_files import FILES, URL


class MnistIdx(tfds.core.GeneratorBasedBuilder):
    """The 70,000 digits of MNIST from the four idx files: in a folder of the caller's, or downloaded."""

    VERSION = tfds.core.Version("1.0.0")
    FILES = FILES

    def __init__(self, *, folder: Path | None = None, **arguments):
        self._folder = folder
        super().__init__(file_format="array_record", **arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        pixels = self.FILES["train_images"].shape[1:]
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=pixels, dtype=np.uint8),
                    "label": tfds.features.Scalar(dtype=np.uint8),
                }
            ),
            citation="Y. LeCun, C. Cortes and C. J. C. Burges, The MNIST database of handwritten digits",
            disable_shuffling=True,  # so that what was prepared can be checked against the original bytes
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        if self._folder is None:
            paths = dl_manager.download({part: f"{URL}{file.name}.gz" for part, file in self.FILES.items()})
        else:
            paths = {part: idx.locate(self._folder, file) for part, file in self.FILES.items()}
        arrays = {part: idx.read(Path(path), self.FILES[part]) for part, path in paths.items()}
        return {
            split: self._generate_examples(arrays[f"{split}_images"], arrays[f"{split}_labels"])
            for split in ("train", "test")
        }

    def _generate_examples(self, images, labels):
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": image, "label": label}
