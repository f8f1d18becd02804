"""The experiment on text, and its data."""

import gzip
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from ecjax import networks
from experiments import language
from experiments.datasets import text
from tests import small

TOY = {"layers": 1, "width": 8, "heads": 2, "positions": 8, "epochs": 1, "calibration": 16, "stages": 1}
TOY |= {
    "iterations": 1,
    "products": 2,
    "curvature": 8,
    "gradual_epochs": 1,
    "sparsities": (0.8,),
    "costly_sparsities": (0.8,),
}
TOY["batch_size"] = 8


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "verses.txt.gz"
    path.write_bytes(gzip.compress(b"the quick brown fox jumps over the lazy dog; \n" * 60))
    return path


@pytest.fixture
def fetching(monkeypatch):
    """No file is named; what is fetched is what the test says."""
    monkeypatch.delenv("ECJAX_TEXT", raising=False)

    def fetch(content):
        monkeypatch.setattr(text, "fetched", lambda url, seconds: content)
        monkeypatch.setattr(text, "SHA256", hashlib.sha256(b"To be, or not to be" * 100).hexdigest())

    return fetch


@pytest.mark.slow
def test_every_method_at_toy_size(file, tmp_path, capsys):
    config = language.Config(text=file, output=tmp_path / "results", **TOY)
    language.main(config)
    frame = pd.read_csv(tmp_path / "results" / "results.csv")
    assert len(frame) == 1 + 9
    assert np.isfinite(frame["test_loss"]).all()
    assert (frame["gradient_passes"] > 0).all()
    printed = capsys.readouterr().out
    for words in ("verses, GPT of 1 layers of width 8", "bits per", "SparseGPT, 0.8", "EC, staged, survivors, 0.8"):
        assert words in printed
    assert (tmp_path / "results" / "loss.png").stat().st_size > 10_000
    language.main(config)  # finds everything
    pd.testing.assert_frame_equal(frame, pd.read_csv(tmp_path / "results" / "results.csv"))
    assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_a_few_methods_and_what_is_printed(file, tmp_path, monkeypatch, capsys):
    experiment = small.module("language", monkeypatch.setattr)
    experiment.main(language.Config(text=file, output=tmp_path / "results", **TOY))
    frame = pd.read_csv(tmp_path / "results" / "results.csv")
    assert list(frame["method"]) == ["dense", "magnitude", "SparseGPT"]
    assert (frame["gradient_passes"] > 0).all()
    printed = capsys.readouterr().out
    assert "text that the networks write" in printed
    assert "SparseGPT, 0.8" in printed


def test_a_prediction_sees_what_came_before_and_nothing_else():
    module = language.GPT(characters=5, layers=2, width=8, heads=2)
    tokens = jnp.asarray(np.random.default_rng(0).integers(5, size=(3, 6)))
    params = module.init(jax.random.key(0), tokens)["params"]
    network = networks.from_linen(module)
    other = network(params, tokens.at[:, 4].set((tokens[:, 4] + 1) % 5))
    same = network(params, tokens)
    np.testing.assert_allclose(same[:, :4], other[:, :4], atol=1e-6)
    assert (abs(same[:, 4:] - other[:, 4:]).max(-1) > 1e-4).all()
    found = networks.layers(network, params, tokens)
    assert len(found) == 2 * 6 + 1
    assert not any(layer.reason for layer in found)


def test_parts(file):
    characters = gzip.decompress(file.read_bytes()).decode()
    for count, sizes in ((1000, [900, 50, 50]), (1001, [900, 50, 51])):
        found = text.load(file, count)
        assert list(map(len, found[2:])) == sizes
        assert "".join(found.alphabet[code] for code in np.concatenate(found[2:])) == characters[:count]


def test_sequences():
    train = np.arange(900)
    for offset in (0, 3, 7):
        inputs, targets = text.sequences(train, 8, offset)
        assert inputs.shape == targets.shape == (111, 8)
        np.testing.assert_array_equal(targets, inputs + 1)
        assert inputs[0, 0] == offset
    with pytest.raises(ValueError, match="a part of 7 characters holds no sequence of 8"):
        text.sequences(train[:7], 8)


def test_a_file_plain_or_gzipped_and_its_place_in_the_environment(file, tmp_path, monkeypatch):
    plain = tmp_path / "verses.txt"
    plain.write_bytes(gzip.decompress(file.read_bytes()))
    monkeypatch.setenv("ECJAX_TEXT", str(plain))
    for found in (text.load(file), text.load()):
        assert found.name == "verses"
        codes = np.concatenate(found[2:])
        assert "".join(found.alphabet[code] for code in codes) == plain.read_text()
    assert sum(map(len, text.load(file, 100)[2:])) == 100


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(FileNotFoundError):
        text.load(tmp_path / "missing.txt")
    for name, content in (("a.txt.gz", b"no gzip"), ("b.txt", b"\xff\xfe\x00"), ("c.txt.gz", gzip.compress(b"x")[:9])):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is no text, plain or gzipped"):
            text.load(path)
        with pytest.raises(SystemExit, match="is no text"):
            language.main(language.Config(text=path))


def test_what_was_fetched_is_prepared_once(fetching, tmp_path):
    fetching(b"To be, or not to be" * 100)
    first = text.load(prepared_in=tmp_path)
    assert first.name == "tiny_shakespeare"
    fetching(b"")
    for part, again in zip(first[2:], text.load(prepared_in=tmp_path)[2:], strict=True):
        np.testing.assert_array_equal(part, again)


@pytest.mark.parametrize("content", [b"", b"<html>please log in</html>"], ids=["nothing", "a portal"])
def test_without_a_network_it_says_so_in_one_line_and_reads_the_help_of_python(fetching, content, tmp_path, capsys):
    fetching(content)
    found = text.load(prepared_in=tmp_path)
    assert found.name == "python-help"
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("tiny_shakespeare could not be fetched, so this runs on the language reference")
    assert "--text or ECJAX_TEXT" in printed.err
    assert len(found.train) > 300_000
    assert found.alphabet.isascii()
