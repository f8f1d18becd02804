"""Damaged and hostile files: each is refused by name, at once and without allocating what it declares."""

import contextlib
import gzip
import hashlib
import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from ecjax import compact
from ecjax.compact import files
from experiments.datasets import choose, mnist

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
NAME = "images-idx3-ubyte"
MEGABYTE = 2**20


def header(shape: tuple[int, ...]) -> bytes:
    """The header of an idx file of unsigned bytes."""
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 0x08, len(shape), *shape)


CONTENT = header(IMAGES.shape) + IMAGES.tobytes()


@pytest.fixture(autouse=True, scope="module")
def small_images():
    """Puts a small file in place of those of MNIST."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist, "FILES", {NAME: (IMAGES.shape, hashlib.sha256(CONTENT).hexdigest())})
        yield


@contextlib.contextmanager
def promptly(most_bytes: int):
    """Fails what takes more than that much memory, or five seconds of processor time."""
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most_bytes
        assert time.process_time() - start < 5
    finally:
        tracemalloc.stop()


def refuses(call: Callable[[Path], object], path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}"):
        call(path)


def read(path: Path) -> np.ndarray:
    """Reads the one file of its folder."""
    for other in {NAME, f"{NAME}.gz"} - {path.name}:
        (path.parent / other).unlink(missing_ok=True)
    return mnist.read(path.parent, NAME)


def with_flipped(content: bytes, bit: int) -> bytes:
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


@pytest.mark.parametrize("name", [NAME, f"{NAME}.gz"])
def test_idx_truncated_at_every_length(name, tmp_path):
    whole = gzip.compress(CONTENT) if name.endswith("gz") else CONTENT
    (tmp_path / name).write_bytes(whole)
    np.testing.assert_array_equal(read(tmp_path / name), IMAGES)
    for length in range(len(whole)):
        refuses(read, tmp_path / name, whole[:length])


def test_idx_with_any_flipped_bit(tmp_path):
    for bit in range(8 * len(CONTENT)):
        refuses(read, tmp_path / NAME, with_flipped(CONTENT, bit))


def test_gzipped_idx_with_any_flipped_bit_is_refused_or_holds_the_same(tmp_path):
    """A few bits of a gzip file say nothing of what is in it: its time, its system, what fills the last byte."""
    whole, path, passed = gzip.compress(CONTENT), tmp_path / f"{NAME}.gz", []
    for bit in range(8 * len(whole)):
        path.write_bytes(with_flipped(whole, bit))
        try:
            np.testing.assert_array_equal(read(path), IMAGES)
            passed.append(bit)
        except ValueError as error:
            assert str(error).startswith(f"{path} ")  # noqa: PT017
    assert len(passed) < 80


@given(content=st.binary(max_size=200))
def test_idx_of_anything_else(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("idx")
    refuses(read, folder / NAME, content)
    refuses(read, folder / f"{NAME}.gz", content)
    refuses(read, folder / f"{NAME}.gz", gzip.compress(content))


@pytest.mark.parametrize("dimensions", [(2**31, 2**31, 1), (2**32 - 1,) * 3, (0, 4, 3), (5, 3, 4), (60,)])
def test_idx_that_declares_other_dimensions(dimensions, tmp_path):
    with promptly(MEGABYTE):
        refuses(read, tmp_path / NAME, header(dimensions) + IMAGES.tobytes())


@pytest.mark.parametrize("magic", [b"\0\0\x0d\3", b"\1\0\x08\3", b"\0\0\x08\2", b"\x89PNG", b"PK\3\4", b"<htm"])
def test_idx_of_another_magic(magic, tmp_path):
    refuses(read, tmp_path / NAME, magic + CONTENT[4:])


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    bomb = gzip.compress(CONTENT + bytes(200 * MEGABYTE), 1)
    with promptly(4 * MEGABYTE):
        refuses(read, tmp_path / f"{NAME}.gz", bomb)
        refuses(read, tmp_path / f"{NAME}.gz", gzip.compress(CONTENT) * 2)


def test_a_command_names_the_damaged_file(tmp_path, monkeypatch):
    name = "train-images-idx3-ubyte"
    monkeypatch.setattr(mnist, "FILES", {name: mnist.FILES[NAME]})
    (tmp_path / name).write_bytes(CONTENT[:-1])
    message = f"{tmp_path / name} is not {name}, but truncated, corrupt or another file; fetch it again"
    with pytest.raises(SystemExit, match=message):
        choose.load_or_exit("mnist", tmp_path)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A file of one sparse and one dense kernel."""
    sparse = np.zeros((40, 30), np.float32)
    sparse[::7, ::3] = 1.5
    params = {
        "Dense_0": {"kernel": sparse, "bias": np.ones(30, np.float32)},
        "Dense_1": {"kernel": np.ones((30, 2), np.float32), "bias": np.zeros(2, np.float32)},
    }
    path = tmp_path_factory.mktemp("files") / "net.safetensors"
    compact.save(path, params, "relu")
    return path.read_bytes()


def test_networks_truncated_at_every_length(network, tmp_path):
    for length in range(len(network)):
        refuses(compact.load, tmp_path / "net", network[:length])


def test_networks_with_a_flipped_bit_in_every_byte(network, tmp_path):
    for byte in range(len(network)):
        refuses(compact.load, tmp_path / "net", with_flipped(network, 8 * byte + byte % 8))


@given(content=st.binary(max_size=200))
def test_networks_of_anything_else(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "net"
    refuses(compact.load, path, content)
    refuses(compact.load, path, struct.pack("<Q", len(content)) + content)


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": TENSOR | {"shape": [2**31, 2**31]}},
        {"a": TENSOR | {"shape": [2**62, 0], "data_offsets": [0, 0]}},
        {"a": TENSOR | {"shape": [-1]}},
        {"a": TENSOR | {"data_offsets": [0, 2**62]}},
        {"a": TENSOR | {"data_offsets": [4, 0]}},
        {"a": TENSOR | {"dtype": "F8_E4M3", "shape": [4]}},
        {"a": TENSOR | {"dtype": "BF16", "shape": [2]}},
        {"a": TENSOR},
        {"__metadata__": {"format": "ecjax.compact"}, "a": TENSOR},
        {"__metadata__": {"format": "ecjax.compact", "version": "1"}, "a": TENSOR},
        {"__metadata__": ["ecjax.compact"], "a": TENSOR},
        [],
        None,
    ],
)
def test_networks_with_another_header(header, tmp_path):
    text = json.dumps(header).encode()
    with promptly(MEGABYTE):
        refuses(compact.load, tmp_path / "net", struct.pack("<Q", len(text)) + text + b"abcd")


@pytest.mark.parametrize("length", [2, 10**8, 2**31, 2**63, 2**64 - 1])
def test_networks_that_declare_a_huge_header(length, tmp_path):
    with promptly(MEGABYTE):
        refuses(compact.load, tmp_path / "net", struct.pack("<Q", length) + b"{}")


def forged(content: str | dict, tensors: dict[str, np.ndarray]) -> bytes:
    """A file whose sha256 is right, whatever is in it."""
    content = content if isinstance(content, str) else json.dumps(content)
    digest = files._digest(content, tensors)
    return save(tensors, {"format": "ecjax.compact", "version": "1", "content": content, "sha256": digest})


KERNEL = {"kernel": {"dtype": "float32", "shape": [4, 2]}}
DENSE = {"kernel": np.zeros((4, 2), np.uint32)}
SPARSE = {
    "kernel.values": np.ones(2, np.uint32),
    "kernel.inputs": np.array([1, 3], np.uint8),
    "kernel.starts": np.array([0, 1, 2], np.uint32),
}
HUGE = 2**40
WRONG_CONTENT = {
    "no JSON": "{",
    "nested too deeply": "[" * 10**5,
    "a list": [],
    "a number": "12",
    "no leaves": {"activation": "relu"},
    "a list of leaves": {"activation": "relu", "leaves": []},
    "no network": {"activation": "relu", "leaves": {}},
    "no activation": {"leaves": KERNEL},
    "an activation that is no name": {"activation": {}, "leaves": KERNEL},
    "a leaf in a leaf": {"activation": "relu", "leaves": KERNEL | {"kernel/kernel": KERNEL["kernel"]}},
    "no shape": {"activation": "relu", "leaves": {"kernel": {"dtype": "float32"}}},
}
WRONG_FACTS = {
    "another shape": {"shape": [4, 3]},
    "a shape that is no list": {"shape": 8},
    "a shape of words": {"shape": ["4", "2"]},
    "a negative shape": {"shape": [-4, -2]},
    "no matrix": {"shape": [8]},
    "huge": {"shape": [HUGE, 2]},
    "huge twice": {"shape": [HUGE, HUGE]},
    "infinite": {"shape": [float("inf"), 2]},
    "another dtype": {"dtype": "float16"},
    "objects": {"dtype": "object"},
    "text": {"dtype": "U1"},
    "times": {"dtype": "datetime64[s]"},
    "an unknown dtype": {"dtype": "float31"},
}
WRONG_ROWS = {
    "starts that fall": {"kernel.starts": np.array([0, 5, 2], np.uint32)},
    "starts past the end": {"kernel.starts": np.array([0, 1, 2**32 - 1], np.uint32)},
    "starts of another number": {"kernel.starts": np.array([0, 2], np.uint32)},
    "no starts": {"kernel.starts": np.zeros(0, np.uint32)},
    "inputs out of bounds": {"kernel.inputs": np.array([1, 4], np.uint8)},
    "negative inputs": {"kernel.inputs": np.array([1, -1], np.int8)},
    "fewer inputs": {"kernel.inputs": np.array([1], np.uint8)},
    "fewer values": {"kernel.values": np.ones(1, np.uint32)},
    "wider values": {"kernel.values": np.ones((2, 2), np.uint32)},
}


@pytest.mark.parametrize("kind", WRONG_CONTENT)
def test_a_right_checksum_of_wrong_content(kind, tmp_path):
    refuses(compact.load, tmp_path / "net", forged(WRONG_CONTENT[kind], DENSE))


@pytest.mark.parametrize("tensors", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", WRONG_FACTS)
def test_a_right_checksum_of_wrong_facts(kind, tensors, tmp_path):
    content = {"activation": "relu", "leaves": {"kernel": KERNEL["kernel"] | WRONG_FACTS[kind]}}
    with promptly(MEGABYTE):
        refuses(compact.load, tmp_path / "net", forged(content, tensors))


@pytest.mark.parametrize("kind", WRONG_ROWS)
def test_a_right_checksum_of_wrong_rows(kind, tmp_path):
    content = {"activation": "relu", "leaves": KERNEL}
    (tmp_path / "right").write_bytes(forged(content, SPARSE))
    kept = compact.load(tmp_path / "right").params["kernel"] != 0
    np.testing.assert_array_equal(kept, [[0, 0], [1, 0], [0, 0], [0, 1]])
    with promptly(MEGABYTE):
        refuses(compact.load, tmp_path / "net", forged(content, SPARSE | WRONG_ROWS[kind]))


def test_a_small_file_may_not_ask_for_more_memory_than_allowed(tmp_path):
    content = {"activation": "relu", "leaves": {"kernel": {"dtype": "float32", "shape": [10**6, 2]}}}
    (tmp_path / "net").write_bytes(forged(content, SPARSE))
    assert compact.load(tmp_path / "net", most_bytes=8 * 10**6).params["kernel"].shape == (10**6, 2)
    with promptly(MEGABYTE), pytest.raises(ValueError, match="8,000,000 bytes, more than most_bytes=7,999,999"):
        compact.load(tmp_path / "net", most_bytes=8 * 10**6 - 1)
