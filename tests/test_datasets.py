import errno
import functools
import gzip
import hashlib
import http.server
import os
import shutil
import socket
import struct
import threading
import tracemalloc
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from ecjax import moments, networks, score
from experiments import flags
from experiments.datasets import Dataset, choose, hold_out, mnist

MNIST = os.environ.get("ECJAX_DATA_DIR")


def payload(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture(scope="module")
def small():
    """The digits in the four files of MNIST: what each must be, and its bytes."""
    data = choose.digits()
    arrays = {
        "t10k-labels-idx1-ubyte": data.test_targets,
        "train-labels-idx1-ubyte": data.train_targets,
        "t10k-images-idx3-ubyte": data.test_inputs.reshape(-1, 8, 8) * 16,
        "train-images-idx3-ubyte": data.train_inputs.reshape(-1, 8, 8) * 16,
    }
    contents = {name: payload(arrays[name].astype(np.uint8)) for name in mnist.FILES}
    files = {name: (arrays[name].shape, hashlib.sha256(content).hexdigest()) for name, content in contents.items()}
    return files, contents


@pytest.fixture
def folder(small, tmp_path):
    """A folder with those files, two of them gzipped."""
    folder = tmp_path / "idx"
    folder.mkdir()
    for name, content in small[1].items():
        if "images" in name:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def prepared(small, tmp_path, monkeypatch):
    """Makes the digits pass for MNIST: where they are prepared."""
    monkeypatch.setattr(mnist, "FILES", small[0])
    monkeypatch.delenv("ECJAX_DATA_DIR", raising=False)
    load = functools.partial(mnist.load, prepared_in=tmp_path / "prepared")
    monkeypatch.setitem(choose.LOADERS, "mnist", load)
    return tmp_path / "prepared/mnist_idx/1.0.0"


def test_digits_are_split_the_same_way_each_time():
    data, again = choose.digits(), choose.digits()
    assert data.name == "digits"
    assert data.train_inputs.shape == (1437, 64)
    assert data.test_inputs.shape == (360, 64)
    assert data.train_inputs.dtype == np.float32
    assert (data.train_inputs.min(), data.train_inputs.max()) == (0, 1)
    assert np.bincount(data.test_targets).min() >= 34  # balanced
    for part, other in zip(data[1:], again[1:], strict=True):
        np.testing.assert_array_equal(part, other)


@pytest.mark.usefixtures("prepared")
def test_reads_idx_plain_and_gzipped(small, folder):
    for name, content in small[1].items():
        array = mnist.read(folder, name)
        assert array.dtype == np.uint8
        assert payload(array) == content


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_refuses_truncated_corrupt_and_foreign_files_by_name(name, folder):
    path = mnist.find(folder, name)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    bad = (
        whole[: len(whole) // 2],
        bytes(flipped),
        whole + b"more" * 9,
        whole + b"m" * 999,
        b"",
        b"<html>not found</html>",
    )
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=f"^{path} .*{name}.*(fetch it again)|{path} can't be read.*(fetch it again)"
        ):
            mnist.read(folder, name)


@pytest.mark.usefixtures("prepared")
def test_a_huge_file_is_not_read_to_its_end(folder):
    name = "train-images-idx3-ubyte"
    mnist.find(folder, name).write_bytes(gzip.compress(bytes(50_000_000)))
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"not {name}, but truncated, corrupt or another file; fetch it again"):
        mnist.read(folder, name)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


def test_names_a_missing_file(folder):
    name = "t10k-labels-idx1-ubyte"
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte\.gz"):
        mnist.read(folder, name)


def test_held_out_samples_are_the_last_sixth_of_the_training_part():
    inputs, targets = np.arange(26.0).reshape(13, 2), np.arange(13)
    held = hold_out(Dataset("numbers", inputs, targets, inputs[:0], targets[:0]))
    assert held.name == "numbers-validation"
    np.testing.assert_array_equal(held.train_inputs, inputs[:11])
    np.testing.assert_array_equal(held.train_targets, targets[:11])
    np.testing.assert_array_equal(held.test_inputs, inputs[11:])
    np.testing.assert_array_equal(held.test_targets, targets[11:])


def test_the_same_bytes_are_prepared_and_the_files_kept(small, folder, prepared):
    choose.load("mnist", folder)
    builder = tfds.builder_from_directory(prepared)
    for split, part in {"train": "train", "test": "t10k"}.items():
        records = list(builder.as_data_source(split=split))
        images = np.stack([record["image"] for record in records])
        labels = np.array([record["label"] for record in records], np.uint8)
        assert payload(images) == small[1][f"{part}-images-idx3-ubyte"]
        assert payload(labels) == small[1][f"{part}-labels-idx1-ubyte"]
    for path in folder.iterdir():
        assert (prepared / path.name).read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("no_network")
def test_a_folder_is_needed_once(folder, prepared):
    first = choose.load("mnist", folder)
    assert first.name == "MNIST"
    assert prepared.is_dir()
    second = choose.load("mnist")
    assert second.name == "MNIST"
    for part, other in zip(first[1:], second[1:], strict=True):
        np.testing.assert_array_equal(part, other)


def test_moments_of_a_data_source_are_those_of_the_array(folder, prepared):
    choose.load("mnist", folder)
    source = tfds.builder_from_directory(prepared).as_data_source(split="train")

    def batches(size):
        for first in range(0, len(source), size):
            rows = source.__getitems__(range(first, min(first + size, len(source))))
            yield np.stack([row["image"].reshape(-1) for row in rows]) / np.float32(16)

    mlp = networks.MLP((8, 10))
    network, images = networks.from_linen(mlp), choose.digits().train_inputs
    params = mlp.init(jax.random.key(0), images[:1])["params"]
    seen = moments.of_batches(network, params, batches(500))
    assert seen.samples == len(images) == len(source)
    scores = score.elimination_compensation_from_moments(params, seen)
    expected = score.elimination_compensation(network, params, images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-9), scores, expected)


@pytest.mark.usefixtures("no_network")
def test_damage_to_what_was_prepared_is_named_with_the_remedy(folder, prepared):
    choose.load("mnist", folder)
    kept = next(prepared.glob("*images*.gz"))
    whole = kept.read_bytes()
    flipped = bytearray(whole)
    flipped[1000] ^= 1
    for bad in (whole[:5000], bytes(flipped), b""):
        kept.write_bytes(bad)
        with pytest.raises(ValueError, match=f"^{kept} .*. Delete {prepared}, and start again"):
            choose.load("mnist")
    kept.unlink()
    with pytest.raises(ValueError, match=f"^{prepared} holds neither .*. Delete {prepared}"):
        choose.load("mnist")
    assert choose.load("mnist", folder).name == "MNIST"


@pytest.mark.parametrize("way", ["a damaged file", "a full disk"])
def test_a_failed_preparation_leaves_nothing_that_passes_for_whole(way, folder, prepared, monkeypatch):
    path = mnist.find(folder, "t10k-images-idx3-ubyte")
    whole, copy = path.read_bytes(), shutil.copy

    def fail(source, target):
        copy(source, target)
        raise OSError(errno.ENOSPC, "no space for t10k-images")

    if way == "a full disk":
        monkeypatch.setattr(shutil, "copy", fail)
    else:
        path.write_bytes(whole[:-100])
    with pytest.raises((ValueError, OSError), match="t10k-images"):
        choose.load("mnist", folder)
    assert not prepared.exists()
    monkeypatch.setattr(shutil, "copy", copy)
    path.write_bytes(whole)
    choose.load("mnist", folder)
    assert prepared.exists()


@pytest.fixture
def no_network(monkeypatch):
    """Fails whatever asks for an address, and notes who did."""
    asked = []

    def refuse(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return asked


def falls_to_the_digits(capsys):
    """Loads MNIST, which is to end on the digits and one line."""
    assert choose.load("mnist").name == "digits"
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("MNIST could not be fetched (no t10k-labels-idx1-ubyte.gz from http")
    assert "--data-dir or ECJAX_DATA_DIR" in printed.err


def test_without_a_network_it_says_so_in_one_line_and_runs_on_the_digits(prepared, no_network, capsys):
    falls_to_the_digits(capsys)
    assert no_network == ["storage.googleapis.com"]  # asked once, and nothing else was tried
    assert not prepared.exists()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves a dictionary of files; a number in place of bytes is the status that it answers with."""

    def do_GET(self):
        self.server.asked.append(self.path.removeprefix("/"))
        content = self.server.files.get(self.path.removeprefix("/"), 404)
        self.send_response(200 if isinstance(content, bytes) else content)
        self.end_headers()
        if isinstance(content, bytes):
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine in place of MNIST's."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.files, server.asked = {}, []
        monkeypatch.setattr(mnist, "URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def test_downloads_are_checked_and_prepared(small, prepared, server):
    server.files = {f"{name}.gz": gzip.compress(content) for name, content in small[1].items()}
    data = choose.load("mnist")
    assert data.name == "MNIST"
    np.testing.assert_array_equal(data.test_targets, choose.digits().test_targets)
    assert sorted(server.asked) == sorted(server.files)
    assert prepared.is_dir()
    again = choose.load("mnist")
    np.testing.assert_array_equal(again.train_inputs, data.train_inputs)
    assert len(server.asked) == 4


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize(
    "answer",
    [404, 503, b"<html>please log in</html>", gzip.compress(b"something else")],
    ids=["not found", "unavailable", "page", "other file"],
)
def test_a_portal_in_place_of_the_server_falls_to_the_digits(answer, server, capsys):
    server.files = {f"{name}.gz": answer for name in mnist.FILES}
    falls_to_the_digits(capsys)
    assert len(server.asked) == 1


def test_a_network_that_breaks_off_falls_to_the_digits(small, prepared, server, capsys):
    server.files = {f"{name}.gz": gzip.compress(content) for name, content in small[1].items()}
    server.files["train-images-idx3-ubyte.gz"] = server.files["train-images-idx3-ubyte.gz"][:3000]
    assert choose.load("mnist").name == "digits"
    assert "no train-images-idx3-ubyte.gz from http" in capsys.readouterr().err
    assert not prepared.exists()


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("way", ["server", "proxy"])
def test_what_never_answers_is_given_up_after_three_seconds(way, monkeypatch, capsys):
    """The seconds that are passed on are looked at, not a clock: of each socket, and of the wait for it."""
    sockets, waits = [], []
    urlopen, join = urllib.request.urlopen, threading.Thread.join

    def opened(url, *, timeout):
        sockets.append((url, timeout))
        return urlopen(url, timeout=0.2)

    def joined(thread, timeout=None):
        if thread.daemon:  # or the program would wait for it in the end
            waits.append(timeout)
        return join(thread, timeout)

    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        if way == "server":
            monkeypatch.setattr(mnist, "URL", f"{address}/")
            monkeypatch.setenv("no_proxy", "127.0.0.1")
        else:
            monkeypatch.setenv("https_proxy", address)
            monkeypatch.setenv("no_proxy", "")
        monkeypatch.setattr(urllib.request, "urlopen", opened)
        monkeypatch.setattr(threading.Thread, "join", joined)
        falls_to_the_digits(capsys)
    assert sockets == [(f"{mnist.URL}t10k-labels-idx1-ubyte.gz", 3)]
    assert waits == [3]


@pytest.mark.usefixtures("prepared")
def test_a_name_look_up_that_hangs_is_given_up(monkeypatch, tmp_path):
    hanging = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: hanging.wait() and [])
    monkeypatch.setenv("no_proxy", "*")
    try:
        with pytest.raises(ConnectionError, match=r"no t10k-labels-idx1-ubyte\.gz from https://"):
            mnist.fetch(tmp_path, 0.1)
    finally:
        hanging.set()


@pytest.mark.usefixtures("prepared", "no_network")
def test_a_folder_without_the_files_is_an_error_not_a_fallback(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="holds neither t10k-labels-idx1-ubyte nor"):
        choose.load("mnist", tmp_path)
    monkeypatch.setenv("ECJAX_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="holds neither t10k-labels-idx1-ubyte nor"):
        choose.load("mnist")


@pytest.mark.usefixtures("prepared", "no_network")
def test_a_command_ends_with_the_message_alone(tmp_path):
    with pytest.raises(SystemExit, match="holds neither t10k-labels-idx1-ubyte nor"):
        flags.Digits(data_dir=tmp_path).load()


@pytest.mark.usefixtures("prepared")
def test_another_data_set_is_one_entry(tmp_path, monkeypatch):
    folders = []

    def load(folder):
        folders.append(folder)
        return choose.digits()._replace(name="mine")

    monkeypatch.setitem(choose.LOADERS, "mine", load)
    assert choose.load("mine").name == "mine"
    monkeypatch.setenv("ECJAX_DATA_DIR", str(tmp_path))
    assert choose.load("mine").name == "mine"
    assert folders == [None, tmp_path]


def test_data_of_another_name():
    with pytest.raises(ValueError, match="data is 'cifar'; it must be 'mnist' or 'digits'"):
        choose.load("cifar")


@pytest.mark.slow
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
