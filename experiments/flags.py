"""The flags that the experiments on handwritten digits share."""

from dataclasses import dataclass
from pathlib import Path

from experiments.datasets import Dataset, choose, hold_out


@dataclass(frozen=True)
class Digits:
    """What classifiers of handwritten digits are trained, pruned and tested on, how many, and where the results go."""

    data: choose.Name = "mnist"  # MNIST, or the 8x8 digits bundled with scikit-learn.
    data_dir: Path | None = None
    """Folder with the four idx files of MNIST, gzipped or not. Default: $ECJAX_DATA_DIR, else they are downloaded."""
    validation: bool = False  # Measure on a held-out sixth of the training images instead, to choose settings by.
    seeds: int = 3  # How many networks to train, prune and average over.
    output: Path | None = None
    """Folder for the results. Default: results/ and the names of the experiment and the data."""

    def load(self) -> Dataset:
        """The data that these flags name."""
        data = choose.load_or_exit(self.data, self.data_dir)
        return held_out(data) if self.validation else data


def held_out(data: Dataset) -> Dataset:
    """The training part alone, named after it: what is not trained on takes the place of the test part."""
    return hold_out(data)._replace(name=f"{data.name}-validation")


def widths(data: Dataset, hidden: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
    """The widths of an MLP's hidden and last layers, and its name, which starts with the inputs: "784-300-100-10"."""
    features = (*hidden, int(data.train_targets.max()) + 1)
    return features, "-".join(map(str, (data.train_inputs.shape[1], *features)))
