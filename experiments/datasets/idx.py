"""The idx format of the original MNIST release, read with every byte accounted for.

A file is a big-endian header (two zero bytes, the type code 0x08 for unsigned bytes, the number of dimensions, then
each dimension as an unsigned 32-bit number) and the raw bytes, often gzipped.
"""

import gzip
import hashlib
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

_UNSIGNED_BYTES = 0x08


class IdxFile(NamedTuple):
    """What a file must hold: its shape, and the sha256 of the decompressed bytes, header included."""

    name: str
    shape: tuple[int, ...]
    sha256: str


def header(shape: tuple[int, ...]) -> bytes:
    """The header of an idx file of unsigned bytes."""
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, _UNSIGNED_BYTES, len(shape), *shape)


def locate(folder: Path, file: IdxFile) -> Path:
    """The path of a file in a folder, gzipped or not.

    Raises:
        FileNotFoundError: neither is there.
    """
    candidates = [folder / file.name, folder / f"{file.name}.gz"]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} holds neither {candidates[0].name} nor {candidates[1].name}")


def read(path: Path, file: IdxFile) -> np.ndarray:
    """Reads and checks one file.

    Raises:
        ValueError: the file is truncated, corrupt or another file; the message names it.
    """
    start = header(file.shape)
    size = len(start) + int(np.prod(file.shape))
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as stream:
            payload = stream.read(size + 1)  # never more than it should hold, whatever it declares
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} can't be read: {error}; fetch it again") from error
    if len(payload) != size:
        amount = "more" if len(payload) > size else f"only {len(payload):,}"
        raise ValueError(f"{path} should hold {size:,} bytes decompressed and holds {amount}; fetch it again")
    check(payload[len(start) :], payload[: len(start)], path, file)
    return np.frombuffer(payload, np.uint8, offset=len(start)).reshape(file.shape)


def check(content: bytes | memoryview, start: bytes, path: Path, file: IdxFile) -> None:
    """Raises a ValueError that names ``path`` unless header and content have the sha256 of ``file``."""
    digest = hashlib.sha256(start)
    digest.update(content)
    if digest.hexdigest() != file.sha256:
        raise ValueError(f"{path} is corrupt or not {file.name}: its sha256 is {digest.hexdigest()}; fetch it again")
