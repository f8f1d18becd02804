"""Text as whole numbers, one for each character: a file's, tiny_shakespeare's, or that of Python's own help.

Source of tiny_shakespeare: A. Karpathy, "The unreasonable effectiveness of recurrent neural networks", 2015; 1.1 MB.
"""

import contextlib
import gzip
import hashlib
import http.client
import os
import sys
import threading
import urllib.request
import zlib
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

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
    """The text of a file, plain or gzipped, or of that in ``ECJAX_TEXT``; else tiny_shakespeare.

    Where that is not on this machine and can't be fetched, this says so in one line on stderr and gives the half a
    megabyte that Python's ``help()`` knows of the language. A file that can't be read is an OSError, one that holds no
    text a ValueError. Of a longer text only so many ``characters`` are taken. tiny_shakespeare is ``prepared_in`` a
    folder of TensorFlow Datasets, or in its usual place.
    """
    if file is None and os.environ.get("ECJAX_TEXT"):
        file = Path(os.environ["ECJAX_TEXT"])
    name, text = (file.name.split(".")[0], _read(file)) if file else ("tiny_shakespeare", _fetched_once(prepared_in))
    if text is None:
        words = "tiny_shakespeare could not be fetched, so this runs on the language reference in Python's own help()"
        print(f"{words}; to provide a text, name its file with --text or ECJAX_TEXT", file=sys.stderr)
        name, text = "python-help", "\n\n".join(topics.values()).encode("ascii", "ignore").decode()
    text = text[:characters]
    alphabet = "".join(sorted(set(text)))
    codes = np.searchsorted(list(alphabet), list(text)).astype(np.int32)
    return Text(name, alphabet, *(codes[part] for part in parts(len(codes))))


def parts(characters: int) -> tuple[slice, slice, slice]:
    """Where the three parts of a text of so many characters lie."""
    train = int(0.9 * characters)
    middle = train + (characters - train) // 2
    return slice(train), slice(train, middle), slice(middle, characters)


def sequences(codes: np.ndarray, length: int, offset: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sequences side by side and, for each of their characters, the next; as many for each offset below the length."""
    count = (len(codes) - length) // length
    if count < 1:
        raise ValueError(f"the text is too short: a part of {len(codes)} characters holds no sequence of {length}")
    cut = codes[offset : offset + count * length + 1]
    return cut[:-1].reshape(count, length), cut[1:].reshape(count, length)


def _read(file: Path) -> str:
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            return stream.read().decode()
    except (EOFError, zlib.error, UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} is no text, plain or gzipped: {error}") from error


def _fetched_once(prepared_in: Path | None, seconds: float = 2.0) -> str | None:
    """What TensorFlow Datasets has prepared, or what is fetched within so many seconds and prepared; else None."""
    from experiments.datasets.text_builder import TinyShakespeareText  # tfds is slow to import, so only here

    builder = TinyShakespeareText(data_dir=prepared_in)
    if not Path(builder.data_path).exists():
        content = _fetched(seconds)
        if hashlib.sha256(content).hexdigest() != SHA256:
            return None
        builder = TinyShakespeareText(content.decode(), data_dir=prepared_in)
        builder.download_and_prepare()
    return "".join(part[0]["text"].decode() for part in builder.as_data_source(["train", "validation", "test"]))


def _fetched(seconds: float) -> bytes:
    """What came; a name look-up that hangs is given up as well, and the program's end does not wait for a daemon."""
    found = []

    def download() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            found.append(urllib.request.urlopen(URL, timeout=seconds).read())

    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(seconds)
    return b"".join(found)
