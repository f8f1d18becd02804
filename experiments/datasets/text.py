"""Text as whole numbers, one for each character: a file's, tiny_shakespeare's, or that of Python's own help.

Source of tiny_shakespeare: A. Karpathy, "The unreasonable effectiveness of recurrent neural networks", 2015; 1.1 MB.
"""

import hashlib
import os
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

from experiments.datasets import fetched, unpacked

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Text(NamedTuple):
    """A text in three parts, as tensorflow-datasets splits tiny_shakespeare: 90, 5 and 5 %."""

    name: str  # in tables, figures and files
    alphabet: str  # the character of each number
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def load(file: Path | None = None, characters: int | None = None, *, prepared_in: Path | None = None) -> Text:
    """The text of a file, plain or gzipped, or of that in ``ECJAX_TEXT``; else tiny_shakespeare, fetched once.

    Where that can't be had, this says so in one line on stderr and gives the half a megabyte that Python's ``help()``
    knows of the language. A file that can't be read is an OSError, one that holds no text a ValueError. Only the first
    ``characters`` are taken. tiny_shakespeare is ``prepared_in`` a folder of TensorFlow Datasets, or its usual place.
    """
    file = file or (Path(named) if (named := os.environ.get("ECJAX_TEXT")) else None)
    name, text = (file.name.split(".")[0], _read(file)) if file else ("tiny_shakespeare", _fetched_once(prepared_in))
    if text is None:
        words = "tiny_shakespeare could not be fetched, so this runs on the language reference in Python's own help()"
        print(f"{words}; to provide a text, name its file with --text or ECJAX_TEXT", file=sys.stderr)
        name, text = "python-help", "\n\n".join(topics.values()).encode("ascii", "ignore").decode()
    text = text[:characters]
    alphabet = "".join(sorted(set(text)))
    codes = np.searchsorted(list(alphabet), list(text)).astype(np.int32)
    train = int(0.9 * len(codes))
    return Text(name, alphabet, *np.split(codes, [train, (train + len(codes)) // 2]))


def sequences(codes: np.ndarray, length: int, offset: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sequences side by side and, for each of their characters, the next; as many for each offset below the length."""
    count = (len(codes) - length) // length
    if count < 1:
        raise ValueError(f"the text is too short: a part of {len(codes)} characters holds no sequence of {length}")
    cut = codes[offset : offset + count * length + 1]
    return cut[:-1].reshape(count, length), cut[1:].reshape(count, length)


def _read(file: Path) -> str:
    try:
        return unpacked(file).decode()
    except ValueError as error:
        raise ValueError(f"{file} is no text, plain or gzipped: {error}") from error


def _fetched_once(prepared_in: Path | None) -> str | None:
    """What TensorFlow Datasets has prepared, or what is fetched within two seconds and prepared; else None."""
    from experiments.datasets.prepared import Builder  # tfds is slow to import, so only here

    builder = Builder("tiny_shakespeare_text", {"text": ((), np.str_)}, prepared_in)
    if not Path(builder.data_path).exists():
        content = fetched(URL, seconds=2.0)
        if hashlib.sha256(content).hexdigest() != SHA256:
            return None
        builder.prepare({"train": [{"text": content.decode()}]})
    return "".join(part[0]["text"].decode() for part in builder.as_data_source().values())
