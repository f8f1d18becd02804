import functools
import importlib.metadata
import io
import itertools
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecjax import compact
from experiments import (
    brain_surgeon,
    datasets,
    diffusion_sorption,
    frontier,
    mnist,
    neurons,
    report,
    runs,
    saved,
    sweep,
)
from experiments.datasets import digits
from experiments.rows import Rows

METHODS, SPARSITIES, SEEDS = ("random", "EC, staged"), (0.5, 0.875), 2
PLAN = [
    [{"method": method, "sparsity": sparsity, "seed": seed} for seed in range(SEEDS)]
    for method, sparsity in itertools.product(METHODS, SPARSITIES)
]
VALUES = {"bytes": int, "loss": float, "seconds": float}


def measured(unit):
    """Rows with numbers that take all digits of a float, one of them missing."""
    index = PLAN.index(unit)
    return [
        row | {"bytes": 7 * index, "loss": 10.0 ** (seed - index) / 3, "seconds": None if index == 0 else 0.1 * index}
        for seed, row in enumerate(unit)
    ]


def rows_in(folder, units=PLAN):
    rows = Rows(folder / "results.csv", PLAN, VALUES)
    for unit in units:
        rows.add(measured(unit))
    return rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of all rows."""
    folder = tmp_path_factory.mktemp("rows")
    rows_in(folder)
    return (folder / "results.csv").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for the rows of many examples, which each overwrite them."""
    return tmp_path_factory.mktemp("examples")


def test_rows_read_back_exactly(tmp_path, whole):
    written, read = rows_in(tmp_path), Rows(tmp_path / "results.csv", PLAN, VALUES)
    pd.testing.assert_frame_equal(read.frame(), written.frame(), check_exact=True)
    assert read.frame()["loss"].tolist() == [row["loss"] for unit in PLAN for row in measured(unit)]
    assert read.frame()["seconds"].isna().sum() == SEEDS
    assert read.count(method="EC, staged") == 4
    assert read.planned() == 8
    assert read.has(sparsity=0.875, seed=1)
    for unit in PLAN:
        read.add(measured(unit))  # finished: left as they are
    assert (tmp_path / "results.csv").read_bytes() == whole


def test_rows_of_another_unit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not the rows that the plan has next: .*0\.875"):
        rows_in(tmp_path).add([PLAN[1][0] | {"loss": 1.0}])
    with pytest.raises(ValueError, match="not the rows that the plan has next"):
        Rows(tmp_path / "other.csv", PLAN, VALUES).add(measured(PLAN[1]))


@given(st.data())
def test_a_file_cut_off_anywhere_goes_on(folder, whole, data):
    length = data.draw(st.integers(0, len(whole)))
    (folder / "results.csv").write_bytes(whole[:length])
    assert rows_in(folder, []).count() % SEEDS == 0
    rows_in(folder)
    assert (folder / "results.csv").read_bytes() == whole


@given(st.data())
def test_a_flipped_bit_is_refused_or_changes_one_number(folder, whole, data):
    damaged = bytearray(whole)
    damaged[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "results.csv").write_bytes(damaged)
    found = refusal = None
    try:
        found = Rows(folder / "results.csv", PLAN, VALUES).frame()
    except SystemExit as error:
        refusal = str(error)
    if found is None:
        assert re.match(r"line \d+ of .*results.csv .*: the file is damaged", refusal)
        return
    keys = [row for unit in PLAN for row in unit][: len(found)]
    assert found[["method", "sparsity", "seed"]].to_dict("records") == keys
    expected = pd.DataFrame([row for unit in PLAN for row in measured(unit)][: len(found)], columns=found.columns)
    assert found[list(VALUES)].fillna(-1).ne(expected[list(VALUES)].fillna(-1)).sum().sum() <= 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"method,sparsity", b"method;sparsity", "line 1 of .* is not method,sparsity,seed,bytes,loss,seconds"),
        (b"\n", b"\r\n", "line 1 of"),
        (b"random,0.5,1", b"magnitude,0.5,1", "line 3 of .* does not start with random,0.5,1,"),
        (b"random,0.5,1", b"random,0.50,1", "line 3 of"),
        (b"random,0.5,0", b"random,0.5,1", "line 2 of"),
        (b",0.1\n", b",1e-1\n", "line 4 of .* holds numbers as this program does not write them"),
        (b",0.1\n", b",nan\n", "line 4 of"),
        (b",0.1\n", b", 0.1\n", "line 4 of"),
        (b",0.1\n", b",0.1,0.1\n", "line 4 of .* does not hold bytes, loss, seconds"),
        (b",0.1\n", b",0.1\0\n", "line 4 of"),
        (b",0.1\n", b",\xff\n", "line 4 of"),
        (b",0.1\n", b"," + b"9" * 10**6 + b"\n", "line 4 of"),
        (b",7,", b"," + b"7" * 10**6 + b",", "line 4 of"),
        (b",7,", b",7.0,", "line 4 of"),
        (b",7,", b",,", "line 4 of"),
    ],
)
def test_damaged_rows_are_refused_by_line(tmp_path, whole, old, new, message):
    assert old in whole
    (tmp_path / "results.csv").write_bytes(whole.replace(old, new))
    with pytest.raises(SystemExit, match=message) as refusal:
        Rows(tmp_path / "results.csv", PLAN, VALUES)
    assert len(str(refusal.value)) < 1000
    assert (tmp_path / "results.csv").read_bytes() == whole.replace(old, new)  # for its owner to look at


def test_more_rows_than_planned_are_refused(tmp_path, whole):
    (tmp_path / "results.csv").write_bytes(whole + whole.splitlines(keepends=True)[-1])
    with pytest.raises(SystemExit, match=r"line 10 of .* is one row more than the 8 that were asked for"):
        Rows(tmp_path / "results.csv", PLAN, VALUES)


def test_two_processes_do_not_mix_their_rows(tmp_path):
    first, second = (rows_in(tmp_path, []) for _ in range(2))
    first.add(measured(PLAN[0]))
    with pytest.raises(SystemExit, match="another process writes to"):
        second.add(measured(PLAN[0]))


SMALL = mnist.Config(
    data="digits",
    widths=(8,),
    seeds=2,
    epochs=1,
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
    runs.claim(tmp_path, SMALL, data="digits", data_sha256=runs.digest(digits.load()), layers="64-8-10")
    config = (tmp_path / "config.json").read_bytes()
    with pytest.raises(SystemExit) as refusal:
        mnist.main(replace(SMALL, output=tmp_path, seeds=3, sparsities=(0.5,)))
    message = f"{tmp_path} holds another run: --seeds was 2 there, is 3; --sparsities was [0.5, 0.8] there, is [0.5]."
    assert str(refusal.value) == f"{message} Choose another folder, or delete this one to start afresh"
    with pytest.raises(SystemExit, match=r"--stages was absent there, is 10; widths was \[8\] there, is absent"):
        neurons.main(neurons.Config(data="digits", output=tmp_path))
    assert (tmp_path / "config.json").read_bytes() == config


def test_other_data_and_versions_are_refused(tmp_path, monkeypatch):
    data = digits.load()
    runs.claim(tmp_path, SMALL, data_sha256=runs.digest(data))
    runs.claim(tmp_path, replace(SMALL, data_dir=tmp_path, output=tmp_path), data_sha256=runs.digest(data))
    with pytest.raises(SystemExit, match=r"data_sha256 was [0-9a-f]{16} there, is [0-9a-f]{16}"):
        runs.claim(tmp_path, SMALL, data_sha256=runs.digest(data._replace(test_targets=data.test_targets[::-1])))
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0" if package == "jax" else package)
    with pytest.raises(SystemExit, match=r"; jax version was [0-9.]+ there, is 0"):
        runs.claim(tmp_path, SMALL, data_sha256=runs.digest(data))


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '{"versions": 3}', "\udcff", "[" * 10**5])
def test_a_damaged_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(SystemExit, match=r"config.json is damaged: "):
        runs.claim(tmp_path, SMALL)


@pytest.mark.parametrize("name", ["results.csv", "trained"])
def test_results_of_an_unknown_run_are_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(SystemExit, match=f"holds {name} but no config"):
        runs.claim(tmp_path, SMALL)


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
        with runs.opened(tmp_path, config, PLAN, VALUES) as rows:
            rows.add(measured(PLAN[0]))
            limit_files(path.stat().st_size + 10)
            rows.add(measured(PLAN[1]))

    monkeypatch.setattr(sys, "argv", ["experiment", "--data", "digits"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "an experiment", "--data", "digits"])
    with pytest.raises(SystemExit) as stop:
        runs.command(mnist.Config, main, "")
    assert stop.value.code == 1
    printed = capsys.readouterr().err
    assert f"File too large: 2 of 8 rows are saved in {path}\n" in printed
    assert "to go on: python -m 'an experiment' --data digits\n" in printed
    assert len(path.read_bytes()) > 0
    assert whole.startswith(path.read_bytes())


def test_trained_params_come_back_bit_for_bit(tmp_path):
    params = {"Dense_0": {"kernel": jax.random.normal(jax.random.key(0), (2, 3, 4)), "bias": -jnp.zeros((2, 4))}}
    trained = functools.partial(runs.trained, tmp_path, "small", "relu", 2)
    assert trained(lambda: params) is params
    again = trained(forbidden)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert np.signbit(again["Dense_0"]["bias"]).all()
    path = tmp_path / "trained" / "small-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=r"small-1.safetensors is damaged: .* Delete it, and start again"):
        trained(forbidden)
    path.unlink()
    assert trained(lambda: params) is params


GRID = {"cells": 16, "times": 10}
CASES = {
    brain_surgeon: brain_surgeon.Config(
        data="digits", widths=(8,), target_accuracy=0.15, seeds=2, gradients=20, sparsities=(0.5, 0.8), draws=2
    ),
    frontier: frontier.Config(
        networks=("modest", "surrogate"),
        data="digits",
        seeds=2,
        sparsities=(0.5,),
        surrogate_sparsities=(0.5,),
        calibration=50,
        surrogate_epochs=1,
    ),
    neurons: neurons.Config(data="digits", seeds=2, epochs=1, fractions=(0.5,), calibration=50),
    diffusion_sorption: diffusion_sorption.Config(
        architectures=("4",),
        noise=(0.0, 0.05),
        seeds=2,
        epochs=1,
        fine_tuning_epochs=1,
        methods=("magnitude", "random"),
        sparsities=(0.5,),
        small_network_sparsities=(0.5,),
        batch_size=32,
        **GRID,
    ),
}
FORM = compact.Form("", "", 3, 2, 1, 2, {1: 0.5, 256: 0.7})
FORMS = [FORM._replace(name=name, runtime=runtime) for runtime in ("JAX", "NumPy") for name in saved.FORMS]


@pytest.fixture
def fast(monkeypatch):
    """Leaves out what takes time and is tested elsewhere: most methods, figures, sizes and times."""
    few = {
        brain_surgeon: ("magnitude", "CBS-S (RMP)", "EC (Fisher)"),
        frontier: ("magnitude", "EC"),
        neurons: ("weight norm", "structured EC"),
    }
    for experiment, names in few.items():
        monkeypatch.setattr(experiment, "METHODS", {name: experiment.METHODS[name] for name in names})
    monkeypatch.setattr(neurons, "NETWORKS", {"relu": (8,), "tanh": (6,)})
    monkeypatch.setattr(report, "figure", lambda *_: None)
    monkeypatch.setattr(diffusion_sorption, "_draw_snapshots", lambda *_, **__: None)
    monkeypatch.setattr(compact, "report", lambda *_, **__: FORMS)
    load = functools.partial(datasets.diffusion_sorption.load, noise=0.0, initial_concentration=0.1, **GRID)
    monkeypatch.setattr(frontier, "diffusion_sorption", types.SimpleNamespace(load=lambda **_: load()))


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("experiment", CASES, ids=lambda experiment: experiment.__name__.split(".")[-1])
def test_every_experiment_goes_on_to_the_same_table(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(CASES[experiment], output=Path("output"))
    experiment.main(config)
    path = Path("output/results.csv")
    whole, trained = path.read_bytes(), state(Path("output/trained"))
    path.write_bytes(whole[: 2 * len(whole) // 3])  # as if killed while it wrote
    left = whole[: 2 * len(whole) // 3].count(b"\n") - 1
    experiment.main(config)
    assert state(Path("output/trained")) == trained
    found, expected = (pd.read_csv(content, dtype=str) for content in (path, io.BytesIO(whole)))
    assert 4 <= left < len(expected)
    if "seconds" in expected:
        again = found.pop("seconds").ne(expected.pop("seconds")) & (expected["method"] != "dense")
        assert not again[:left].any()
        assert again[left:].any()
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.usefixtures("fast")
def test_saved_networks_and_their_report_go_on(tmp_path):
    config = replace(SMALL, output=tmp_path, save=tmp_path / "saved")
    mnist.main(config)
    report_rows, networks = (tmp_path / "saved/report.csv").read_bytes(), state(tmp_path / "saved")
    assert report_rows.count(b"\n") == 1 + 2 * 2 * 6
    (tmp_path / "saved/report.csv").write_bytes(report_rows[:-100])
    (tmp_path / "saved/random-0.5-0.safetensors").unlink()
    mnist.main(config)
    assert (tmp_path / "saved/report.csv").read_bytes() == report_rows
    again = state(tmp_path / "saved")
    assert again.keys() == networks.keys()
    changed = {name for name, when in again.items() if when != networks[name]}
    assert changed == {"report.csv"} | {
        f"random-{sparsity}-{seed}.safetensors" for sparsity in (0.5, 0.8) for seed in (0, 1)
    }


def started(folder):
    """A real run on the digits, which takes a while after its first rows."""
    size = "--data digits --widths 8 --seeds 2 --epochs 1 --fine-tuning-epochs 30 --sparsities 0.3 0.6 0.9"
    methods = ["--methods", "magnitude", "ec-euclidean", "random"]
    command = [sys.executable, "-m", "experiments.mnist", *size.split(), *methods, "--output", str(folder)]
    return command, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_rows(path, number, process):
    """Until a csv file holds so many rows."""
    deadline = time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") <= number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("fast")
def test_a_killed_run_goes_on_and_a_stopped_one_says_how(tmp_path):
    path = tmp_path / "a folder" / "results.csv"
    _, killed = started(path.parent)
    wait_for_rows(path, 6, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    rows = path.read_bytes().count(b"\n") - 1

    command, stopped = started(path.parent)
    wait_for_rows(path, rows + 2, stopped)
    stopped.send_signal(signal.SIGINT)
    _, printed = stopped.communicate()
    assert stopped.returncode == 130
    assert "Traceback" not in printed
    now = path.read_bytes().count(b"\n") - 1
    *_, saved_line, how = printed.splitlines()
    assert saved_line == f"stopped: {now} of 38 rows are saved in {path}"
    assert shlex.split(how.removeprefix("to go on: ")) == command

    size = {"fine_tuning_epochs": 30, "sparsities": (0.3, 0.6, 0.9)}
    config = replace(SMALL, methods=("magnitude", "ec-euclidean", "random"), **size)
    mnist.main(replace(config, output=path.parent))
    mnist.main(replace(config, output=tmp_path / "whole"))
    assert 2 < rows < now < 38
    assert path.read_bytes() == (tmp_path / "whole/results.csv").read_bytes()


def state(folder):
    """When each file of a folder was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
