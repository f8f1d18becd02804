"""The flags that the experiments on handwritten digits share, and what is asked of the flags of all."""

from dataclasses import dataclass
from pathlib import Path

from experiments.datasets import Dataset, choose, hold_out


@dataclass(frozen=True)
class Digits:
    """What classifiers of handwritten digits are trained, pruned and tested on, how many, and where the results go."""

    data: choose.Name = "mnist"  # MNIST, or the 8x8 digits bundled with scikit-learn.
    data_dir: Path | None = None  # Folder with MNIST's four idx files. Default: $ECJAX_DATA_DIR, else they are fetched.
    validation: bool = False  # Measure on a held-out sixth of the training images instead, to choose settings by.
    seeds: int = 3  # How many networks to train, prune and average over.
    output: Path | None = None  # Folder for the results. Default: results/ and the names of experiment and data.

    def load(self) -> Dataset:
        """The data that these flags name; a missing or corrupt file ends the program with its one-line message."""
        try:
            data = choose.load(self.data, self.data_dir)
        except (FileNotFoundError, ValueError) as error:
            raise SystemExit(str(error)) from error
        return hold_out(data) if self.validation else data


def widths(data: Dataset, hidden: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
    """The widths of an MLP's hidden and last layers, and its name, which starts with the inputs: "784-300-100-10"."""
    features = (*hidden, int(data.train_targets.max()) + 1)
    return features, "-".join(map(str, (data.train_inputs.shape[1], *features)))


def require(config: object, *, repeating: tuple[str, ...] = ()) -> None:
    """Refuses counts below 1, fractions outside [0, 1], and lists that repeat anything, but those in ``repeating``."""
    for name, value in vars(config).items():
        flag, least = f"--{name.replace('_', '-')}", 0 if name == "fine_tuning_epochs" else 1
        if type(value) is int and value < least:
            raise SystemExit(f"{flag} must be at least {least}, got {value}")
        if isinstance(value, tuple) and name not in repeating and len(set(value)) < len(value):
            raise SystemExit(f"{flag} must not repeat anything, got {list(value)}")
        fractions = value if name.endswith(("sparsities", "fractions")) else ()
        if outside := [part for part in fractions if not 0 <= part <= 1]:
            raise SystemExit(f"{flag} must lie in [0, 1], got {outside}")
