import dataclasses
import json
import re
import subprocess
import sys

import jax
import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from ecjax import compact, networks
from experiments import (
    brain_surgeon,
    convnet,
    diffusion_sorption,
    frontier,
    language,
    mnist,
    neurons,
    report,
    results,
    sweep,
)
from experiments.datasets import choose
from experiments.methods import METHODS
from experiments.sweep import DENSE, FINE_TUNED, PRUNED, TRAINED
from tests import small


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run of every method on the digits: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("results") / "nested"
    arguments = "--data digits --widths 20 --seeds 2 --epochs 40 --learning-rate 3e-3 --calibration 300"
    methods = ["--methods", *METHODS, "--sparsities", "0.3", "0.8", "--fine-tuning-epochs", "2"]
    command = [sys.executable, "-m", "experiments.mnist", *arguments.split(), *methods, "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def test_results_have_a_row_for_each_method_sparsity_seed_and_phase(run):
    frame = pd.read_csv(run[0] / "results.csv")
    assert list(frame) == ["data", "method", "sparsity", "seed", "phase", "test_loss", "test_accuracy"]
    assert set(frame["data"]) == {"digits"}
    dense = frame[frame["method"] == DENSE]
    assert len(dense) == 2
    others = frame[frame["method"] != DENSE]
    assert len(others) == len(METHODS) * 2 * 2 * 2
    assert not others.duplicated(["method", "sparsity", "seed", "phase"]).any()
    assert set(others["phase"]) == {PRUNED, FINE_TUNED}
    assert np.isfinite(frame["test_loss"]).all()
    assert frame["test_accuracy"].between(0, 1).all()
    assert dense["test_accuracy"].min() > 0.8
    # Two seeds are two networks.
    assert dense["test_loss"].nunique() == 2


def test_pruning_hurts_less_than_chance_and_fine_tuning_repairs(run):
    frame = pd.read_csv(run[0] / "results.csv")
    loss = frame.groupby(["method", "sparsity", "phase"])["test_loss"].mean()
    for method in ("ec-euclidean", "ec-fisher", "nonlinear-ec"):
        assert loss[method, 0.8, PRUNED] < loss["random", 0.8, PRUNED]
    for method in METHODS:
        assert loss[method, 0.8, FINE_TUNED] < loss[method, 0.8, PRUNED]


def test_the_table_starts_with_the_dense_network_and_never_says_mnist(run):
    _, printed, _ = run
    lines = [line for line in printed.splitlines() if "±" in line]
    assert re.search(r"\bdense\b", lines[0])
    assert len(lines) == 1 + 2 * len(METHODS)
    assert "digits, MLP 64-20-10" in printed
    assert "MNIST" not in printed


def test_config_says_what_ran(run):
    config = json.loads((run[0] / "config.json").read_text())
    assert config["data"] == "digits"
    assert config["layers"] == "64-20-10"
    assert config["sparsities"] == [0.3, 0.8]
    assert {f"{package} version" for package in ("jax", "jaxlib", "flax", "optax", "ecjax")} <= set(config)


@pytest.mark.slow
def test_every_pruned_network_is_saved(tmp_path, capsys):
    size = {"widths": (20,), "seeds": 2, "epochs": 5, "fine_tuning_epochs": 1, "sparsities": (0.8,)}
    places = {"output": tmp_path, "save": tmp_path / "saved"}
    mnist.main(mnist.Config(data="digits", methods=("ec-fisher",), **size, **places))
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == 2
    accuracy = accuracy_of_saved(tmp_path / "saved" / "ec-fisher-0.8-1.safetensors")
    frame = pd.read_csv(tmp_path / "results.csv").set_index(["method", "sparsity", "seed", "phase"])
    np.testing.assert_allclose(accuracy, frame.loc[("ec-fisher", 0.8, 1, FINE_TUNED), "test_accuracy"], atol=1e-6)
    assert "sparse, NumPy" in capsys.readouterr().out


def accuracy_of_saved(path):
    saved, data = compact.load(path), choose.digits()
    outputs = saved.require(networks.from_linen(networks.MLP(saved.widths)))(saved.params, data.test_inputs)
    return (outputs.argmax(-1) == data.test_targets).mean()


@pytest.mark.parametrize("name", ["loss.png", "accuracy.png"])
def test_figures_are_pictures(run, name):
    picture = matplotlib.image.imread(run[0] / name)
    assert picture.shape[0] > 600
    assert picture.shape[1] > 1000
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize("experiment", [brain_surgeon, convnet, diffusion_sorption, frontier, language, mnist, neurons])
def test_help_explains_every_flag(experiment, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiment", "--help"])
    with pytest.raises(SystemExit):
        results.command(experiment.Config, experiment.main, experiment.__doc__)
    printed = capsys.readouterr().out
    words = " ".join(printed.replace("│", " ").split())
    for field in dataclasses.fields(experiment.Config):
        explained = re.search(rf" --{field.name.replace('_', '-')}[ ,].*?\(default: ", words).group()
        assert len(re.sub(r"\{.*?\}|[\[\].]", "", explained).split()) > 4, explained
    for promise in ("started again with the same flags, a run that was stopped goes on", "on two cores", "results.csv"):
        assert promise in words


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (mnist.Config(sparsities=(0.5, 1.2)), r"--sparsities must lie in \[0, 1\], got \[1.2\]"),
        (mnist.Config(seeds=0), "--seeds must be at least 1, got 0"),
        (mnist.Config(calibration=-5), "--calibration must be at least 1, got -5"),
    ],
)
def test_bad_flags_are_refused_before_any_work(config, message):
    with pytest.raises(SystemExit, match=message):
        mnist.main(config)


def test_one_seed_has_no_spread_and_no_fine_tuning_no_panel(tmp_path, monkeypatch):
    rows = [
        {"data": "digits", "method": DENSE, "sparsity": 0.0, "seed": 0, "phase": TRAINED, "test_loss": 0.1},
        {"data": "digits", "method": "magnitude", "sparsity": 0.5, "seed": 0, "phase": PRUNED, "test_loss": 0.2},
        {"data": "digits", "method": "magnitude", "sparsity": 1.0, "seed": 0, "phase": PRUNED, "test_loss": 2.3},
    ]
    frame, measure = pd.DataFrame(rows), report.Measure("loss", ".2f", logarithmic=True)
    table = report.table(frame, {"test_loss": measure}, "title")
    assert [len(column._cells) for column in table.columns] == [3, 3, 3]
    assert list(table.columns[2].cells) == ["0.10", "0.20", "2.30"]
    (panel,) = report.panels(frame, "test_loss", measure)
    report.figure([[panel]], "title", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
    styles = []
    monkeypatch.setattr(report, "curves", lambda axis, panel, by_method: styles.append(by_method))
    report.figure([[panel]], "title", tmp_path / "one.png")
    others = (*panel[:1], frame.replace({"magnitude": "another"}), *panel[2:])
    report.figure([[panel, panel], [others]], "title", tmp_path / "three.png")
    assert styles[0]["magnitude"] != styles[1]["magnitude"]  # of a criterion, and of the first among others
    assert list(styles[1]) == ["magnitude", "another"]
    assert styles[1:] == styles[1:2] * 3


@pytest.mark.slow
def test_the_brain_surgeons_on_a_small_network(tmp_path, capsys):
    size = {"widths": (12,), "seeds": 2, "gradients": 100, "sparsities": (0.5, 0.8), "draws": 5, "learning_rate": 0.2}
    brain_surgeon.main(brain_surgeon.Config(data="digits", target_accuracy=0.85, output=tmp_path, **size))
    frame = pd.read_csv(tmp_path / "results.csv")
    columns = ["data", "method", "sparsity", "seed", "phase", "test_loss", "test_accuracy", "seconds"]
    assert list(frame) == columns
    others = frame[frame["method"] != DENSE]
    assert len(others) == 7 * 2 * 2
    assert (others["seconds"] > 0).all()
    assert frame.loc[frame["method"] == DENSE, "test_accuracy"].item() >= 0.8
    accuracy = others.groupby(["method", "sparsity"])["test_accuracy"].mean()
    assert accuracy["CBS-S + CBS-U", 0.8] > accuracy["magnitude", 0.8]
    assert others[others["method"] == "CBS-S (RMP)"].groupby("sparsity")["test_loss"].nunique().max() == 2
    printed = capsys.readouterr().out
    assert "digits, MLP 64-12-10 without biases" in printed
    assert "seconds" in printed
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_training_stops_on_held_out_images_and_not_on_the_test_set():
    data, mlp = choose.digits(), networks.MLP((12, 10), use_bias=False)
    config = brain_surgeon.Config(target_accuracy=0.5, learning_rate=0.2)

    def trained(data):
        task = sweep.Task(networks.from_linen(mlp), data, sweep.cross_entropy, sweep.CLASSIFIER_MEASURES)
        return brain_surgeon.train_to_target(task, mlp, config)

    params, without_test_set = trained(data), trained(data._replace(test_inputs=None, test_targets=None))
    jax.tree.map(np.testing.assert_array_equal, params, without_test_set)
    held = data.train_inputs[-(len(data.train_inputs) // 6) :], data.train_targets[-(len(data.train_inputs) // 6) :]
    assert (networks.from_linen(mlp)(params, held[0]).argmax(-1) == held[1]).mean() >= 0.5


def test_training_that_does_not_get_there_says_so():
    mlp = networks.MLP((4, 10), use_bias=False)
    task = sweep.Task(networks.from_linen(mlp), choose.digits(), sweep.cross_entropy, sweep.CLASSIFIER_MEASURES)
    config = brain_surgeon.Config(target_accuracy=0.99, learning_rate=1e-6)
    with pytest.raises(SystemExit, match=r"200 epochs of SGD reached .*; lower --target-accuracy"):
        brain_surgeon.train_to_target(task, mlp, config)


@pytest.mark.slow
def test_the_frontier_of_a_surrogate(tmp_path, capsys):
    size = {"stages": 3, "calibration": 200, "seeds": 1, "surrogate_sparsities": (0.8,), "surrogate_epochs": 20}
    frontier.main(frontier.Config(networks=("surrogate",), output=tmp_path, **size))
    frame = pd.read_csv(tmp_path / "results.csv")
    others = frame[frame["method"] != DENSE]
    assert len(others) == 8
    assert (others["seconds"] > 0).all()
    error = others.set_index("method")["test_error"]
    assert error["EC, staged, survivors"] < error["EC, staged, biases"] < error["magnitude"]
    printed = capsys.readouterr().out
    assert "diffusion-sorption, MLP 2-64-64-64-1, 1 seeds, no fine-tuning" in printed
    assert "relative error" in printed
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "trained"),
    [("taught", "EC, staged, taught", 5), ("modest", "EC, staged, survivors, regrown", 1)],
)
def test_regrowth_with_teachers_and_without(name, method, trained, tmp_path, capsys):
    size = {"stages": 1, "regrow": 1, "seeds": 1, "sparsities": (0.9,), "calibration": 100}
    frontier.main(frontier.Config(networks=(name,), data="digits", output=tmp_path, **size))
    frame = pd.read_csv(tmp_path / "results.csv")
    assert (frame["method"] == DENSE).sum() == trained
    (pruned,) = frame[frame["method"] != DENSE].to_dict("records")
    assert pruned["method"] == method
    assert pruned["test_accuracy"] > 0.8
    assert method in capsys.readouterr().out


@pytest.mark.slow
def test_the_frontier_saves_what_it_prunes(tmp_path, monkeypatch):
    small.module("frontier", monkeypatch.setattr)
    size = {"stages": 1, "calibration": 200, "seeds": 1, "sparsities": (0.9,)}
    places = {"output": tmp_path, "save": tmp_path / "saved"}
    frontier.main(frontier.Config(networks=("modest",), data="digits", **size, **places))
    saved = tmp_path / "saved" / "64-40-20-10"
    frame = pd.read_csv(tmp_path / "results.csv").set_index("method")
    np.testing.assert_allclose(
        accuracy_of_saved(saved / "EC-0.9-0.safetensors"), frame.loc["EC", "test_accuracy"], atol=1e-6
    )
    report_rows = pd.read_csv(saved / "report.csv").query("method == 'EC'")
    sizes = report_rows.set_index(["name", "runtime"])["bytes"]
    assert sizes["compacted", "JAX"] < 0.4 * sizes["dense", "JAX"]


@pytest.mark.slow
def test_units_of_an_mlp_against_small_dense_networks(tmp_path, capsys):
    size = {"networks": ("mlp",), "epochs": 20, "fractions": (0.7, 0.95), "widths": (0.25,), "stages": 2}
    neurons.main(neurons.Config(data="digits", output=tmp_path, **size))
    frame = pd.read_csv(tmp_path / "results.csv").set_index(["method", "sparsity"])
    assert len(frame) == 1 + 1 + 4 * 2
    accuracy, dense = frame["test_accuracy"], frame.loc["dense", 0.0]
    assert accuracy["EC, staged", 0.7] > dense["test_accuracy"] - 0.02
    assert accuracy["EC, staged", 0.95] < accuracy["EC, staged", 0.7]
    for fraction in (0.7, 0.95):
        np.testing.assert_allclose(frame.loc["EC, staged", fraction]["parameters"], 1 - fraction, atol=0.01)
    assert frame.loc["small dense", 0.75]["operations"] < 0.2
    assert (frame["time"] > 0).all()
    assert "digits, 64-300-100-10" in capsys.readouterr().out
    assert (tmp_path / "units.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["surrogate", "convnet", "gpt"])
def test_units_of_every_network(name, tmp_path, monkeypatch):
    monkeypatch.setattr(neurons, "CRITERIA", {"EC, staged": neurons.CRITERIA["EC, staged"]})
    net = convnet.Config(channels=(4, 6), calibration=16, curvature=8)
    monkeypatch.setattr(neurons.convnet, "Config", lambda: net)
    toy = {"layers": 1, "width": 8, "heads": 2, "positions": 8, "calibration": 64, "curvature": 8, "epochs": 1}
    gpt = language.Config(**toy)
    monkeypatch.setattr(neurons.language, "Config", lambda **given: dataclasses.replace(gpt, **given))
    (tmp_path / "verses.txt").write_text("the quick brown fox jumps over the lazy dog; " * 60)
    size = {"networks": (name,), "epochs": 1, "fractions": (0.3,), "widths": (0.5,), "stages": 1, "iterations": 1}
    config = neurons.Config(data="digits", text=tmp_path / "verses.txt", output=tmp_path / "results", **size)
    neurons.main(config)
    frame = pd.read_csv(tmp_path / "results/results.csv").set_index("method")
    assert frame.loc["EC, staged"]["parameters"] <= 0.7
    assert frame.loc["small dense"]["operations"] < 0.7
    columns = ["test_accuracy"] if name == "convnet" else ["test_loss"]
    assert np.isfinite(frame[columns]).all(None)
