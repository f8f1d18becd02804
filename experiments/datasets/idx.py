"""The idx format of the original MNIST release, read with every byte accounted for.

A file is a big-endian header (two zero bytes, the type code 0x08 for unsigned bytes, the number of dimensions, then
each dimension as an unsigned 32-bit number) and the raw bytes, often gzipped.
"""

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np


class IdxFile(NamedTuple):
    """What a file must hold: its shape, and the sha256 of the decompressed bytes, header included."""

    name: str
    shape: tuple[int, ...]
    sha256: str


def header(shape: tuple[int, ...]) -> bytes:
    """The header of an idx file of unsigned bytes."""
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 0x08, len(shape), *shape)


def locate(folder: Path, file: IdxFile) -> Path:
    """The path of a file in a folder, gzipped or not; a FileNotFoundError where neither is there."""
    for path in (folder / file.name, folder / f"{file.name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} holds neither {file.name} nor {file.name}.gz")


def read(path: Path, file: IdxFile) -> np.ndarray:
    """Reads and checks one file; a ValueError names one that is truncated, corrupt or another file."""
    start = len(header(file.shape))
    size = start + math.prod(file.shape)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as stream:
            payload = stream.read(size + 1)  # never more than it should hold, whatever it declares
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} can't be read: {error}; fetch it again") from error
    if len(payload) != size:
        amount = "more" if len(payload) > size else f"only {len(payload):,}"
        raise ValueError(f"{path} should hold {size:,} bytes decompressed and holds {amount}; fetch it again")
    digest = hashlib.sha256(payload).hexdigest()
    if digest != file.sha256:
        raise ValueError(f"{path} is corrupt or not {file.name}: its sha256 is {digest}; fetch it again")
    return np.frombuffer(payload, np.uint8, offset=start).reshape(file.shape)
