import gzip
import hashlib
import os
import socket
import struct
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ecjax import moments, networks, score
from experiments.datasets import choose, digits, idx, mnist
from experiments.datasets.mnist_builder import MnistIdx
from experiments.datasets.mnist_files import FILES

MNIST = os.environ.get("ECJAX_DATA_DIR")


def payload(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture(scope="module")
def small():
    """The digits in the four files of MNIST: what each must be, and its bytes."""
    data = digits.load()
    arrays = {
        "train_images": data.train_inputs.reshape(-1, 8, 8) * 16,
        "train_labels": data.train_targets,
        "test_images": data.test_inputs.reshape(-1, 8, 8) * 16,
        "test_labels": data.test_targets,
    }
    contents = {part: payload(array.astype(np.uint8)) for part, array in arrays.items()}
    files = {
        part: idx.IdxFile(FILES[part].name, arrays[part].shape, hashlib.sha256(content).hexdigest())
        for part, content in contents.items()
    }
    return files, contents


@pytest.fixture
def folder(small, tmp_path):
    """A folder with those files, two of them gzipped."""
    files, contents = small
    folder = tmp_path / "idx"
    folder.mkdir()
    for part, content in contents.items():
        if "images" in part:
            (folder / f"{files[part].name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / files[part].name).write_bytes(content)
    return folder


@pytest.fixture
def builder(small, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(MnistIdx, "FILES", small[0])
    return MnistIdx(folder=folder, data_dir=tmp_path / "prepared")


def test_digits_are_split_the_same_way_each_time():
    data, again = digits.load(), digits.load()
    assert data.name == "digits"
    assert data.train_inputs.shape == (1437, 64)
    assert data.test_inputs.shape == (360, 64)
    assert data.train_inputs.dtype == np.float32
    assert (data.train_inputs.min(), data.train_inputs.max()) == (0, 1)
    assert np.bincount(data.test_targets).min() >= 34  # balanced
    for part, other in zip(data[1:], again[1:], strict=True):
        np.testing.assert_array_equal(part, other)


def test_reads_idx_plain_and_gzipped(small, folder):
    files, contents = small
    for part, file in files.items():
        array = idx.read(idx.locate(folder, file), file)
        assert array.dtype == np.uint8
        assert payload(array) == contents[part]


@pytest.mark.parametrize("part", ["train_images", "train_labels"])
def test_refuses_truncated_corrupt_and_foreign_files_by_name(part, small, folder):
    file = small[0][part]
    path = idx.locate(folder, file)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for bad in (whole[: len(whole) // 2], bytes(flipped), whole + b"more" * 9, b"", b"<html>not found</html>"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=f"{path.name}.*(fetch it again)"):
            idx.read(path, file)


def test_a_huge_file_is_not_read_to_its_end(small, folder):
    file = small[0]["train_images"]
    path = idx.locate(folder, file)
    path.write_bytes(gzip.compress(bytes(50_000_000)))
    with pytest.raises(ValueError, match=r"should hold .* bytes decompressed and holds more"):
        idx.read(path, file)


def test_names_a_missing_file(small, folder):
    file = small[0]["test_labels"]
    (folder / file.name).unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte\.gz"):
        idx.locate(folder, file)


def test_the_builder_prepares_the_same_bytes_and_keeps_them(small, builder):
    builder.download_and_prepare()
    records = Path(builder.data_path)
    for _ in range(2):  # from the records, then from the arrays kept beside them
        arrays = mnist.read_prepared(builder)
        assert {part: payload(array) for part, array in arrays.items()} == small[1]
        assert all((records / file.name).is_file() for file in small[0].values())
    assert not list(records.glob("*.partial"))


def test_moments_of_a_data_source_are_those_of_the_array(builder):
    builder.download_and_prepare()
    source = builder.as_data_source(split="train")

    def batches(size):
        for first in range(0, len(source), size):
            rows = source.__getitems__(range(first, min(first + size, len(source))))
            yield np.stack([row["image"].reshape(-1) for row in rows]) / np.float32(16)

    mlp = networks.MLP((8, 10))
    network, images = networks.pure(mlp), digits.load().train_inputs
    params = mlp.init(jax.random.key(0), images[:1])["params"]
    seen = moments.of_batches(network, params, batches(500))
    assert seen.samples == len(images) == len(source)
    scores = score.elimination_compensation_from_moments(params, seen)
    expected = score.elimination_compensation(network, params, images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-9), scores, expected)


def test_damaged_kept_files_are_made_again(small, builder):
    builder.download_and_prepare()
    mnist.read_prepared(builder)
    kept = Path(builder.data_path) / small[0]["train_images"].name
    whole = kept.read_bytes()
    flipped = bytearray(whole)
    flipped[1000] ^= 1
    for bad in (whole[:5000], bytes(flipped), b""):
        kept.write_bytes(bad)
        arrays = mnist.read_prepared(builder)
        assert {part: payload(array) for part, array in arrays.items()} == small[1]
        assert kept.read_bytes() != bad


def test_a_failed_preparation_leaves_nothing_that_passes_for_whole(small, folder, builder):
    path = idx.locate(folder, small[0]["test_images"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="t10k-images"):
        builder.download_and_prepare()
    assert not Path(builder.data_path).exists()
    path.write_bytes(whole)
    builder.download_and_prepare()
    assert len(mnist.read_prepared(builder)["test_labels"]) == 360


def test_a_server_that_does_not_answer_costs_three_seconds():
    with socket.create_server(("127.0.0.1", 0), backlog=1) as silent:
        start = time.monotonic()
        assert not mnist.reachable(f"http://127.0.0.1:{silent.getsockname()[1]}/", 0.5)
        assert time.monotonic() - start < 2
    assert not mnist.reachable("http://127.0.0.1:9/", 3)  # refused at once


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.delenv("ECJAX_DATA_DIR", raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(mnist, "reachable", lambda url, seconds: False)
    unprepared = lambda *, folder, data_dir: MnistIdx(folder=folder, data_dir=tmp_path / "none")  # noqa: E731
    monkeypatch.setattr("experiments.datasets.mnist_builder.MnistIdx", unprepared)


@pytest.mark.usefixtures("offline")
def test_without_a_network_it_says_so_in_one_line_and_runs_on_the_digits(capsys):
    data = choose.load("mnist")
    assert data.name == "digits"
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("MNIST could not be fetched")
    assert "--data-dir or ECJAX_DATA_DIR" in printed.err


@pytest.mark.usefixtures("offline")
def test_a_folder_without_the_files_is_an_error_not_a_fallback(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        choose.load("mnist", tmp_path)
    monkeypatch.setenv("ECJAX_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        choose.load("mnist")


@pytest.mark.usefixtures("offline")
def test_a_command_ends_with_the_message_alone(tmp_path):
    with pytest.raises(SystemExit, match="holds neither train-images-idx3-ubyte nor"):
        choose.load_or_exit("mnist", tmp_path)


def test_data_of_another_name():
    with pytest.raises(ValueError, match="data is 'cifar'; it must be 'mnist' or 'digits'"):
        choose.load("cifar")


@pytest.mark.skipif(not MNIST, reason="the real files are only checked where ECJAX_DATA_DIR names them")
def test_the_real_mnist(tmp_path):
    data = mnist.load(Path(MNIST), prepared_in=tmp_path)
    assert data.name == "MNIST"
    assert data.train_inputs.shape == (60_000, 784)
    assert data.test_inputs.shape == (10_000, 784)
    assert (data.train_inputs.min(), data.train_inputs.max()) == (0, 1)
    np.testing.assert_array_equal(np.bincount(data.test_targets)[:3], [980, 1135, 1032])
    again = mnist.load(prepared_in=tmp_path)  # no folder, no network
    np.testing.assert_array_equal(again.train_inputs, data.train_inputs)
