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

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from ecjax import compact
from ecjax.compact import files
from experiments import flags
from experiments.datasets import mnist

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


@pytest.fixture(autouse=True, scope="module")
def refused_before(tmp_path_factory):
    """What the first refusal of a process imports is not counted."""
    refuses(compact.load, tmp_path_factory.mktemp("before") / "net", forged(WRONG_CONTENT["a path of words"], DENSE))


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


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


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
        flags.Digits(data_dir=tmp_path).load()


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A file of sparse and dense kernels of two and four axes, of random keys, and of examples of tokens."""
    sparse = np.zeros((40, 30), np.float32)
    sparse[::7, ::3] = 1.5
    convolution = np.zeros((3, 2, 5, 10), jnp.bfloat16)
    convolution[1, 1, ::2] = 0.5
    params = {
        "layers": [{"kernel": sparse, "bias": np.ones(30, np.float32)}, {"kernel": np.ones((30, 2), np.float32)}],
        "convolution": convolution,
        "key": jax.random.key(0),
        "empty": np.zeros((0, 3), np.int8),
    }
    path = tmp_path_factory.mktemp("files") / "net.safetensors"
    tokens = np.arange(8, dtype=np.uint8).reshape(4, 2)
    compact.save(path, params, network=embedded, inputs=tokens)
    return path.read_bytes()


def embedded(params, tokens):
    """A network of tokens, of those params."""
    first, second = params["layers"]
    return (first["kernel"][tokens].sum(1) + first["bias"]) @ second["kernel"]


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
        {"__metadata__": {"format": "ecjax.compact", "version": "2"}, "a": TENSOR},
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
    return save(tensors, {"format": "ecjax.compact", "version": "2", "content": content, "sha256": digest})


KERNEL = {"path": ["kernel"], "dtype": "float32", "shape": [4, 2]}
ANSWERS = {"inputs": {"dtype": "float32", "shape": [3, 4]}, "outputs": {"dtype": "float32", "shape": [3, 2]}}
RIGHT = {"leaves": [KERNEL], "widths": [2], "examples": ANSWERS}
GIVEN = {"example:inputs": np.zeros((3, 4), np.uint32), "example:outputs": np.zeros((3, 2), np.uint32)}
DENSE = GIVEN | {"dense:kernel": np.zeros((4, 2), np.uint32)}
SPARSE = GIVEN | {
    "values:kernel": np.ones(2, np.uint32),
    "rows:kernel": np.array([1, 3], np.uint8),
    "starts:kernel": np.array([0, 1, 2], np.uint32),
}
HUGE = 2**40
WRONG_CONTENT = {
    "no JSON": "{",
    "nested too deeply": "[" * 10**5,
    "a list": [],
    "a number": "12",
    "no leaves": RIGHT | {"leaves": []},
    "leaves by name": RIGHT | {"leaves": {"kernel": KERNEL}},
    "random keys of an unknown kind": RIGHT | {"leaves": [KERNEL | {"random_keys": "dice"}]},
    "random keys of numbers": RIGHT | {"leaves": [KERNEL | {"random_keys": 1}]},
    "random keys of a list": RIGHT | {"leaves": [KERNEL | {"random_keys": ["threefry2x32"]}]},
    "random keys of floating-point numbers": RIGHT | {"leaves": [KERNEL | {"random_keys": "threefry2x32"}]},
    "nothing of leaves": {"widths": [2], "examples": ANSWERS},
    "nothing of widths": {"leaves": [KERNEL], "examples": ANSWERS},
    "nothing of examples": {"leaves": [KERNEL], "widths": [2]},
    "widths of words": RIGHT | {"widths": ["2"]},
    "widths below zero": RIGHT | {"widths": [-1]},
    "widths that are no list": RIGHT | {"widths": 2},
    "true widths": RIGHT | {"widths": [True]},
    "the same leaf twice": RIGHT | {"leaves": [KERNEL, KERNEL]},
    "a leaf in a leaf": RIGHT | {"leaves": [KERNEL, KERNEL | {"path": ["kernel", "kernel"]}]},
    "a leaf around a leaf": RIGHT | {"leaves": [KERNEL | {"path": ["kernel", "kernel"]}, KERNEL]},
    "a leaf that is the whole": RIGHT | {"leaves": [KERNEL, KERNEL | {"path": []}]},
    "a path of words": RIGHT | {"leaves": [KERNEL | {"path": "kernel"}]},
    "a path of lists": RIGHT | {"leaves": [KERNEL | {"path": [["kernel"]]}]},
    "no shape": RIGHT | {"leaves": [{"path": ["kernel"], "dtype": "float32"}]},
    "examples that are no dict": RIGHT | {"examples": [1]},
    "examples of inputs alone": RIGHT | {"examples": {"inputs": ANSWERS["inputs"]}},
    "more examples": RIGHT | {"examples": ANSWERS | {"labels": ANSWERS["outputs"]}},
    "examples of another shape": RIGHT | {"examples": ANSWERS | {"inputs": ANSWERS["outputs"]}},
    "huge examples": RIGHT | {"examples": ANSWERS | {"inputs": {"dtype": "float32", "shape": [HUGE, HUGE]}}},
    "examples of objects": RIGHT | {"examples": ANSWERS | {"inputs": {"dtype": "object", "shape": [3, 4]}}},
}
WRONG_FACTS = {
    "another shape": {"shape": [4, 3]},
    "a shape that is no list": {"shape": 8},
    "a shape of words": {"shape": ["4", "2"]},
    "a negative shape": {"shape": [-4, -2]},
    "no matrix": {"shape": [9]},
    "more axes": {"shape": [4, 1, 3]},
    "an empty matrix": {"shape": [4, 0]},
    "sixteen bytes each": {"dtype": "complex128"},
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
    "starts that fall": {"starts:kernel": np.array([0, 5, 2], np.uint32)},
    "starts past the end": {"starts:kernel": np.array([0, 1, 2**32 - 1], np.uint32)},
    "starts of another number": {"starts:kernel": np.array([0, 1, 2, 2, 2], np.uint32)},
    "no starts": {"starts:kernel": np.zeros(0, np.uint32)},
    "one start": {"starts:kernel": np.zeros(1, np.uint32)},
    "starts of no columns that there are": {"starts:kernel": np.array([0, 1, 2, 2], np.uint32)},
    "starts in a matrix": {"starts:kernel": np.array([[0, 1, 2]], np.uint32)},
    "negative starts": {"starts:kernel": np.array([0, -1, 2], np.int32)},
    "starts that are no whole numbers": {"starts:kernel": np.array([0, 1, 2], np.float32)},
    "inputs that are no whole numbers": {"rows:kernel": np.array([1, 3], np.float32)},
    "inputs out of bounds": {"rows:kernel": np.array([1, 4], np.uint8)},
    "negative inputs": {"rows:kernel": np.array([1, -1], np.int8)},
    "fewer inputs": {"rows:kernel": np.array([1], np.uint8)},
    "fewer values": {"values:kernel": np.ones(1, np.uint32)},
    "wider values": {"values:kernel": np.ones((2, 2), np.uint32)},
}


@pytest.mark.parametrize("kind", WRONG_CONTENT)
def test_a_right_checksum_of_wrong_content(kind, tmp_path):
    assert compact.load(written(tmp_path / "right", forged(RIGHT, DENSE))).widths == (2,)
    with promptly(MEGABYTE):
        refuses(compact.load, tmp_path / "net", forged(WRONG_CONTENT[kind], DENSE))


@pytest.mark.parametrize("tensors", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", WRONG_FACTS)
def test_a_right_checksum_of_wrong_facts(kind, tensors, tmp_path):
    content = RIGHT | {"leaves": [KERNEL | WRONG_FACTS[kind]]}
    with promptly(MEGABYTE):
        refuses(compact.load, tmp_path / "net", forged(content, tensors))


@pytest.mark.parametrize("kind", WRONG_ROWS)
def test_a_right_checksum_of_wrong_rows(kind, tmp_path):
    kept = compact.load(written(tmp_path / "right", forged(RIGHT, SPARSE))).params["kernel"] != 0
    np.testing.assert_array_equal(kept, [[0, 0], [1, 0], [0, 0], [0, 1]])
    with promptly(MEGABYTE):
        refuses(compact.load, tmp_path / "net", forged(RIGHT, SPARSE | WRONG_ROWS[kind]))


@pytest.mark.parametrize(
    ("shape", "starts"), [([2, 2, 2], 2), ([2, 2, 2], 4), ([8], 1), ([2, 1, 4], 4), ([4, 2, 1], 2)]
)
def test_a_sparse_array_of_more_axes_is_a_matrix_however_they_are_cut(shape, starts, tmp_path):
    rows = {"starts:kernel": np.array([0, *[2] * starts], np.uint32), "rows:kernel": np.array([0, 1], np.uint8)}
    content = RIGHT | {"leaves": [KERNEL | {"shape": shape}]}
    found = compact.load(written(tmp_path / "net", forged(content, SPARSE | rows))).params["kernel"]
    assert found.shape == tuple(shape)
    np.testing.assert_array_equal(np.flatnonzero(found), [0, starts])
    with promptly(MEGABYTE):
        wrong = {"rows:kernel": np.array([0, 8 // starts], np.uint8)}
        refuses(compact.load, tmp_path / "net", forged(content, SPARSE | rows | wrong))


def test_a_small_file_may_not_ask_for_more_memory_than_allowed(tmp_path):
    content = {"leaves": [KERNEL | {"shape": [10**6, 2]}], "widths": None, "examples": None}
    written(tmp_path / "net", forged(content, SPARSE))
    assert compact.load(tmp_path / "net", most_bytes=8 * 10**6).params["kernel"].shape == (10**6, 2)
    with promptly(MEGABYTE), pytest.raises(ValueError, match="8,000,000 bytes, more than most_bytes=7,999,999"):
        compact.load(tmp_path / "net", most_bytes=8 * 10**6 - 1)
