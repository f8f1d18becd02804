import importlib.metadata
import io
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecjax import compact, graph
from experiments import flags, mnist, neurons, results, sweep
from experiments.datasets import choose
from experiments.results import Rows
from tests import small

# Numbers that take all digits of a float, some of them missing, and a method with a comma in its name.
FOUND = [
    {"method": method, "sparsity": sparsity, "seed": seed, "loss": 10.0**-seed / 3, "seconds": seconds, "bytes": 7}
    for method, sparsity in (("random", 0.5), ("EC, staged", 0.875))
    for seed, seconds in ((0, None), (1, 0.1))
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of all rows."""
    path = tmp_path_factory.mktemp("rows") / "results.csv"
    rows = Rows(path)
    for row in FOUND:
        rows.add(row)
    return path.read_bytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """One file for the rows of many examples, which each overwrite it."""
    return tmp_path_factory.mktemp("examples") / "results.csv"


def test_rows_read_back_exactly(tmp_path):
    written = Rows(tmp_path / "results.csv")
    for row in FOUND:
        written.add(row)
    read = Rows(tmp_path / "results.csv")
    pd.testing.assert_frame_equal(read.frame(), pd.DataFrame(FOUND), check_exact=True)
    pd.testing.assert_frame_equal(written.frame(), read.frame(), check_exact=True)
    assert read.count() == 4
    assert read.count(method="EC, staged") == 2
    assert read.count(sparsity=0.875, seed=1) == 1
    assert read.count(sparsity=0.875, seed=2) == 0
    pd.testing.assert_frame_equal(pd.read_csv(read.path, float_precision="round_trip"), read.frame(), check_exact=True)


@given(st.data())
def test_a_file_cut_off_anywhere_goes_on(path, whole, data):
    length = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:length])
    rows = Rows(path)
    assert rows.count() == max(whole[:length].count(b"\n") - 1, 0)
    for row in FOUND[rows.count() :]:
        rows.add(row)
    assert path.read_bytes() == whole


@given(st.data())
def test_a_flipped_bit_is_refused_or_changes_one_cell(path, whole, data):
    damaged = bytearray(whole)
    damaged[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    found = refusal = None
    try:
        found = Rows(path).frame()
    except SystemExit as error:
        refusal = str(error)
    if found is None:
        assert re.match(r"line \d+ of .*results.csv .*: the file is damaged", refusal)
        return
    expected = pd.DataFrame(FOUND)[: len(found)].astype(object)
    found = found.set_axis(expected.columns, axis=1).astype(object)
    assert found.fillna(-1).ne(expected.fillna(-1)).sum().sum() <= 1


@pytest.mark.parametrize(
    ("old", "new", "number"),
    [
        (b",0.1,", b",0.1x,", 3),
        (b",0.1,", b",0.1,0.1,", 3),
        (b",0.1,", b",", 3),
        (b",0.1,", b",\xff,", 3),
        (b",0.1,", b",0.1\0,", 3),
        (b"random,0.5,1,", b"\n", 3),
        (b'"EC, staged"', b"7", 4),
        (b'"EC, staged"', b"EC, staged", 4),
        (b"bytes\n", b"bytes,more\n", 2),
    ],
)
def test_damaged_rows_are_refused_by_line(tmp_path, whole, old, new, number):
    assert old in whole
    damaged = whole.replace(old, new)
    (tmp_path / "results.csv").write_bytes(damaged)
    with pytest.raises(SystemExit, match=f"line {number} of .* is no row of method, sparsity") as refusal:
        Rows(tmp_path / "results.csv")
    assert len(str(refusal.value)) < 1000
    assert (tmp_path / "results.csv").read_bytes() == damaged  # for its owner to look at


def test_rows_of_other_columns_are_refused(tmp_path, whole):
    (tmp_path / "results.csv").write_bytes(whole)
    rows = Rows(tmp_path / "results.csv")
    with pytest.raises(SystemExit, match=r"line 1 of .* is not method,error"):
        rows.add({"method": "random", "error": 1.0})
    assert rows.path.read_bytes() == whole
    rows.add({"method": "random"})  # what others measured, this one did not
    assert rows.path.read_bytes() == whole + b"random,,,,,\n"


def test_two_processes_do_not_mix_their_rows(tmp_path):
    first, second = (Rows(tmp_path / "results.csv") for _ in range(2))
    first.add(FOUND[0])
    with pytest.raises(SystemExit, match="another process writes to"):
        second.add(FOUND[0])


SMALL = mnist.Config(
    data="digits",
    widths=(8,),
    seeds=2,
    epochs=1,
    temperature=1.0,
    fine_tuning_epochs=1,
    methods=("magnitude", "random"),
    sparsities=(0.5, 0.8),
)


def forbidden(*_, **__):
    raise AssertionError("this was to be refused before any training")


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(sweep, "train_seeds", forbidden)


@pytest.mark.usefixtures("no_training")
def test_another_configuration_is_refused(tmp_path):
    results.claim(tmp_path, SMALL, choose.digits(), layers="64-8-10")
    config = (tmp_path / "config.json").read_bytes()
    with pytest.raises(SystemExit) as refusal:
        mnist.main(replace(SMALL, output=tmp_path, seeds=3, sparsities=(0.5,)))
    message = f"{tmp_path} holds another run: --seeds was 2 there, is 3; --sparsities was [0.5, 0.8] there, is [0.5]."
    assert str(refusal.value) == f"{message} Choose another folder, or delete this one to start afresh"
    with pytest.raises(SystemExit, match=r"--stages was absent there, is 6; .*activation was relu there, is absent"):
        neurons.main(neurons.Config(data="digits", output=tmp_path))
    with pytest.raises(SystemExit, match="--validation was False there, is True"):
        mnist.main(replace(SMALL, output=tmp_path, validation=True))
    assert (tmp_path / "config.json").read_bytes() == config


def test_other_data_and_versions_are_refused(tmp_path, monkeypatch):
    data = choose.digits()
    results.claim(tmp_path, SMALL, data)
    results.claim(tmp_path, replace(SMALL, data_dir=tmp_path, output=tmp_path), data)
    with pytest.raises(SystemExit, match=r"data_sha256 was [0-9a-f]{16} there, is [0-9a-f]{16}"):
        results.claim(tmp_path, SMALL, data._replace(test_targets=data.test_targets[::-1]))
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0" if package == "jax" else package)
    with pytest.raises(SystemExit, match=r"; jax version was [0-9.]+ there, is 0"):
        results.claim(tmp_path, SMALL, data)


@pytest.mark.parametrize("content", ["", "[]", "{", "3", "\udcff", "[" * 10**5])
def test_a_damaged_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(SystemExit, match=r"config.json is damaged: "):
        results.claim(tmp_path, SMALL)


@pytest.mark.parametrize("name", ["results.csv", "trained"])
def test_results_of_an_unknown_run_are_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(SystemExit, match=f"holds {name} but no config"):
        results.claim(tmp_path, SMALL)


def test_rows_that_cannot_be_read_end_with_a_line(tmp_path, monkeypatch, capsys):
    def main(config):
        with results.opened(tmp_path, config):
            forbidden()

    results.claim(tmp_path, SMALL)
    (tmp_path / "results.csv").mkdir()
    monkeypatch.setattr(sys, "argv", ["experiment"])
    with pytest.raises(SystemExit) as stop:
        results.command(mnist.Config, lambda _: main(SMALL), "")
    assert stop.value.code == 1
    assert re.match(r"\[Errno 21\] Is a directory: '.*results.csv'", capsys.readouterr().err)


@pytest.mark.usefixtures("no_training")
def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit, match=f"the folder {folder} cannot be used: (File exists|Not a directory)"):
            mnist.main(replace(SMALL, output=folder))
        with pytest.raises(SystemExit, match=f"the folder {folder} cannot be used"):
            mnist.main(replace(SMALL, output=tmp_path / "results", save=folder))


@pytest.fixture
def limit_files():
    """Lets files of this process grow to so many bytes and no further."""
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, earlier[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, earlier)


@pytest.mark.usefixtures("no_training")
def test_a_disk_without_room_is_refused_before_training(tmp_path, limit_files):
    limit_files(2**20)
    with pytest.raises(SystemExit, match=rf"the folder {tmp_path} cannot be used: File too large"):
        mnist.main(replace(SMALL, output=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_the_finished_rows(tmp_path, monkeypatch, whole, capsys, limit_files):
    path = tmp_path / "results.csv"

    def main(config):
        with results.opened(tmp_path, config) as rows:
            rows.add(FOUND[0])
            rows.add(FOUND[1])
            limit_files(path.stat().st_size + 10)
            rows.add(FOUND[2])

    monkeypatch.setattr(sys, "argv", ["experiment", "--data", "digits"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "an experiment", "--data", "digits"])
    with pytest.raises(SystemExit) as stop:
        results.command(mnist.Config, main, "")
    assert stop.value.code == 1
    printed = capsys.readouterr().err
    assert f"File too large: 2 rows are saved in {path}\n" in printed
    assert "to go on: python -m 'an experiment' --data digits\n" in printed
    assert len(path.read_bytes()) > 0
    assert whole.startswith(path.read_bytes())


def test_trained_params_come_back_bit_for_bit(tmp_path):
    params = {"Dense_0": {"kernel": jax.random.normal(jax.random.key(0), (2, 3, 4)), "bias": -jnp.zeros((2, 4))}}
    assert results.trained(tmp_path, "small", lambda chosen: chosen, params) is params
    again = results.trained(tmp_path, "small", forbidden)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert np.signbit(again["Dense_0"]["bias"]).all()
    path = tmp_path / "trained" / "small.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in an array
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=r"small.safetensors is damaged: .* Delete it, and start again"):
        results.trained(tmp_path, "small", forbidden)


def test_held_out_images_take_the_place_of_the_test_set():
    data = flags.Digits(data="digits").load()
    held = flags.Digits(data="digits", validation=True).load()
    assert held.name == "digits-validation"
    assert len(held.test_inputs) == len(data.train_inputs) // 6
    np.testing.assert_array_equal(np.concatenate([held.train_inputs, held.test_inputs]), data.train_inputs)
    np.testing.assert_array_equal(np.concatenate([held.train_targets, held.test_targets]), data.train_targets)


def signalled(stop, rows, name, folder):
    """A real process of a small run, which gets a signal when its results hold so many rows."""
    command = [sys.executable, "-m", "tests.small", stop, str(rows), name, *small.RUNS[name].split()]
    command += ["--output", str(folder)]
    # As many devices as the tests have: their number decides how sums within a convolution are shared out.
    devices = os.environ | {"JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    return command, subprocess.run(command, capture_output=True, text=True, check=False, env=devices)


@pytest.mark.slow
@pytest.mark.parametrize("name", small.RUNS)
def test_a_killed_run_goes_on_to_the_same_table(name, tmp_path, monkeypatch):
    experiment, folder = small.module(name, monkeypatch.setattr), tmp_path / "a folder"
    experiment.main(small.config(experiment, name, tmp_path / "whole"))
    whole = (tmp_path / "whole/results.csv").read_bytes()
    rows = random.Random(name).randrange(2, whole.count(b"\n") - 1)

    _, killed = signalled("SIGKILL", rows, name, folder)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    path = folder / "results.csv"
    assert path.read_bytes().count(b"\n") == rows + 1
    with path.open("ab") as file:
        file.write(path.read_bytes().splitlines()[-1][:-3])  # as if it had been at the next row
    trained = state(folder / "trained")
    experiment.main(small.config(experiment, name, folder))
    assert trained.items() <= state(folder / "trained").items()

    found, expected = (pd.read_csv(content, dtype=str) for content in (path, io.BytesIO(whole)))
    if "seconds" in expected:
        of_dense = found["phase"] == sweep.TRAINED  # a gradient pass, or nothing
        assert (found["seconds"].notna() | of_dense).all()
        found, expected = (
            frame.drop(columns=["seconds", "gradient_passes", "time"], errors="ignore") for frame in (found, expected)
        )
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.slow
def test_a_stopped_run_says_how_to_go_on(tmp_path):
    command, stopped = signalled("SIGINT", 5, "mnist", tmp_path / "a folder")
    assert stopped.returncode == 130
    assert "Traceback" not in stopped.stderr
    *_, saved_line, how = stopped.stderr.splitlines()
    assert saved_line == f"stopped: 5 rows are saved in {tmp_path / 'a folder' / 'results.csv'}"
    assert shlex.split(how.removeprefix("to go on: ")) == command


FORM = compact.Form("", "", 3, 2, 1, graph.Flops(4, 2), {1: 0.5, 256: 0.7})
FORMS = [FORM._replace(name=name, runtime=runtime) for runtime in ("JAX", "NumPy") for name in ("dense", "sparse")]


@pytest.mark.slow
def test_saved_networks_and_their_report_go_on(tmp_path, monkeypatch):
    small.module("mnist", monkeypatch.setattr)
    monkeypatch.setattr(results.compact, "report", lambda *_, **__: FORMS)
    config = replace(SMALL, output=tmp_path, save=tmp_path / "saved")
    mnist.main(config)
    report_rows, networks = (tmp_path / "saved/report.csv").read_bytes(), state(tmp_path / "saved")
    rows = (tmp_path / "results.csv").read_bytes()
    assert report_rows.count(b"\n") == 1 + 2 * 2 * 4
    # As if it had been killed while it wrote the report of the last, and another had been deleted.
    (tmp_path / "saved/report.csv").write_bytes(report_rows[:-100])
    (tmp_path / "saved/random-0.8-0.safetensors").unlink()
    (tmp_path / "saved/random-0.5-1.safetensors").unlink()
    mnist.main(config)
    assert (tmp_path / "saved/report.csv").read_bytes() == report_rows
    assert (tmp_path / "results.csv").read_bytes() == rows
    again = state(tmp_path / "saved")
    assert again.keys() == networks.keys()
    changed = {name for name, when in again.items() if when != networks[name]}
    assert changed == {"report.csv", "random-0.8-0.safetensors", "random-0.5-1.safetensors"}


def state(folder):
    """When each file of a folder was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
