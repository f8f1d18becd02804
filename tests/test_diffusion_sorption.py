import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import scipy.integrate

from ecjax import networks, score
from experiments import diffusion_sorption as experiment
from experiments.datasets import diffusion_sorption
from experiments.methods import METHODS
from experiments.sweep import DENSE, FINE_TUNED, PRUNED, SMALL, STAGED
from tests import examples

TIMES = 1000  # the first is 0.5


def by_bdf(cells, initial_concentration):
    """The same equations written once more, in NumPy, and SciPy's BDF."""

    def derivative(time, u):
        del time
        width = 1 / cells
        ghosts = np.concatenate([[1.0], u, [5e-4 * (u[-2] - u[-1]) / width]])
        retardation = 1 + (1 - 0.29) / 0.29 * 2880 * 3.5e-4 * 0.874 * (u + 1e-6) ** (0.874 - 1)
        return 5e-4 / retardation * np.diff(ghosts, 2) / width**2

    options = {"method": "BDF", "t_eval": np.linspace(0, 500, TIMES + 1)[1:], "rtol": 1e-9, "atol": 1e-11}
    return scipy.integrate.solve_ivp(derivative, (0, 500), np.full(cells, initial_concentration), **options).y.T


@pytest.mark.parametrize("initial_concentration", [0.0, 0.07, 0.2])
@pytest.mark.parametrize("cells", [2, 64])
def test_the_solution_agrees_with_bdf(cells, initial_concentration):
    _, _, found = diffusion_sorption.grid(cells, TIMES, initial_concentration)
    assert found.shape == (TIMES, cells)
    assert found.dtype == np.float64
    assert not jax.config.jax_enable_x64  # double precision inside, the caller's setting outside
    assert np.abs(found - by_bdf(cells, initial_concentration)).max() < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cells": 1}, "cells=1, .*at least 2 cells"),
        ({"times": 0}, "times=0, .*one time"),
        ({"initial_concentration": 0.3}, r"initial_concentration=0.3: .* 0 to 0.2"),
    ],
)
def test_refuses_what_the_equation_does_not_cover(change, message):
    with pytest.raises(ValueError, match=message):
        diffusion_sorption.grid(**{"cells": 8, "times": TIMES, "initial_concentration": 0.1} | change)


def test_data_are_noisy_to_train_on_and_exact_to_test_on():
    grid = {"cells": 16, "times": 10, "initial_concentration": 0.1}
    exact = diffusion_sorption.load(noise=0.0, **grid)
    noisy = diffusion_sorption.load(noise=0.05, **grid)
    np.testing.assert_array_equal(exact.test_targets, noisy.test_targets)
    np.testing.assert_array_equal(exact.train_inputs, noisy.train_inputs)
    error = np.abs(exact.train_targets - noisy.train_targets)
    assert 0.04 < error.max() <= 0.05
    assert 0.02 < error.mean() < 0.03
    train, test = ({tuple(point) for point in part} for part in (exact.train_inputs, exact.test_inputs))
    assert not train & test
    assert len(train) + len(test) == 160
    assert exact.train_inputs.min() >= 0
    assert exact.train_inputs.max() <= 1


def test_points_carry_the_solution_at_their_place_and_time():
    data = diffusion_sorption.load(noise=0.0, cells=8, times=5, initial_concentration=0.2)
    _, _, u = diffusion_sorption.grid(8, 5, 0.2)
    for (x, t), target in zip(data.test_inputs, data.test_targets, strict=True):
        row, column = round(t * 5) - 1, round(x * 8 - 0.5)
        np.testing.assert_allclose(target[0], u[row, column], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["euclidean", "fisher"])
def test_nonlinear_importance_approaches_the_linear_one_quadratically(metric):
    """The root mean square change, linear and true, is of first order in the weight; their difference of second."""
    with jax.enable_x64(True):
        example = examples.mlp((5, 3), jnp.tanh)
        kernel = example.params["Dense_0"]["kernel"]
        scales = 2.0 ** -np.arange(6, 12)
        differences = []
        for scale in scales:
            # One weight shrinks, and the bias takes over its share so that the network's other parts stay in place.
            small = networks.replace(example.params, {"Dense_0/kernel": kernel.at[2].multiply(scale)})
            true, linear = (
                criterion(example.network, small, example.inputs, metric=metric).importance["Dense_0"]["kernel"][2]
                for criterion in (score.nonlinear_elimination_compensation, score.elimination_compensation)
            )
            differences.append(np.abs(np.sqrt(true) - np.sqrt(linear)))
        rates = np.log2(np.array(differences[:-1]) / np.array(differences[1:]))
        assert np.abs(rates[-1] - 2).max() < 0.1
        assert np.all(differences[-1] < 1e-3 * np.sqrt(linear))


def parameters(widths):
    """How many weights and biases an MLP from 2 inputs to 1 output has."""
    weights = sum(rows * columns for rows, columns in itertools.pairwise((2, *widths, 1)))
    return weights, sum(widths) + 1


def test_small_networks_have_as_many_parameters_as_are_left():
    weights, biases = parameters((64, 64, 64))
    assert (weights, biases) == (2 * 64 + 2 * 64**2 + 64, 3 * 64 + 1)
    for sparsity in (0.3, 0.7, 0.95):
        left = (1 - sparsity) * weights + biases
        width = experiment.small_widths((64, 64, 64), sparsity)[0]
        assert sum(parameters((width,) * 3)) <= left < sum(parameters((width + 1,) * 3))
    assert experiment.small_widths((64, 64, 64), 0.0) == (64, 64, 64)
    assert experiment.small_widths((2, 2), 1.0) == (1, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run of everything: two networks, two noise levels, two seeds."""
    folder = tmp_path_factory.mktemp("results") / "nested"
    size = "--architectures 12-12 8-8 --noise 0 0.05 --seeds 2 --epochs 40 --fine-tuning-epochs 3"
    sparsities = "--sparsities 0.2 0.6 --small-network-sparsities 0.2 0.6 --staged-sparsities 0.6 --stages 2"
    data = "--cells 32 --times 20 --nonlinear-calibration 100 --batch-size 64"
    command = [
        sys.executable,
        "-m",
        "experiments.diffusion_sorption",
        *size.split(),
        *sparsities.split(),
        *data.split(),
    ]
    done = subprocess.run([*command, "--output", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_results_have_every_network(run):
    frame = pd.read_csv(run[0] / "results.csv")
    assert list(frame) == ["data", "layers", "noise", "method", "sparsity", "seed", "phase", "test_loss"]
    assert set(frame["layers"]) == {"2-12-12-1", "2-8-8-1"}
    assert set(frame["noise"]) == {0, 0.05}
    each = frame.groupby(["layers", "noise"])
    methods = len(METHODS) - 1  # all but the Fisher metric, which is for classifiers
    assert set(each.size()) == {2 + 2 * 2 * 2 * methods + 2 + 2 * 2}
    assert set(frame[frame["method"] == SMALL].groupby(["layers", "noise"]).size()) == {4}
    assert not frame.duplicated(["layers", "noise", "method", "sparsity", "seed", "phase"]).any()
    assert np.isfinite(frame["test_loss"]).all()


@pytest.mark.slow
def test_surrogates_learn_and_pruning_by_ec_hurts_less_than_chance(run):
    frame = pd.read_csv(run[0] / "results.csv")
    loss = frame.groupby(["method", "sparsity", "phase"])["test_loss"].mean()
    assert frame.loc[frame["method"] == DENSE, "test_loss"].max() < 1e-2
    for method in ("ec-euclidean", "nonlinear-ec"):
        assert loss[method, 0.2, PRUNED] < loss["random", 0.2, PRUNED]
        assert loss[method, 0.6, FINE_TUNED] < loss[method, 0.6, PRUNED]
        assert loss[STAGED, 0.6, PRUNED] < loss[method, 0.6, PRUNED]


@pytest.mark.slow
def test_tables_have_a_column_for_each_noise_level_and_phase(run):
    printed = run[1]
    assert printed.count("a = 0.05,") == 4
    assert "MLP 2-12-12-1" in printed
    assert "small dense" in printed
    assert json.loads((run[0] / "config.json").read_text())["data"] == "diffusion-sorption"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss.png", "snapshots.png"])
def test_figures_are_pictures(run, name):
    picture = matplotlib.image.imread(run[0] / name)
    assert min(picture.shape[:2]) > 700
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize("architecture", ["64-zero", "0-3", ""])
def test_bad_architectures_are_refused(architecture):
    with pytest.raises(SystemExit, match="widths of hidden layers like 64-64-64"):
        experiment.main(experiment.Config(architectures=(architecture,)))
