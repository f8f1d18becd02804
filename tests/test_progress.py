"""What ``progress=True`` shows, and where."""

import builtins
import importlib.util
import os
from pathlib import Path

import jax
import nbclient
import nbformat
import numpy as np
import optax
import pytest

from ecjax import _progress, moments, prune, surgeon, train
from tests import examples

ROOT = Path(__file__).parent.parent
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
NAMES = ("staged", "staged_neurons", "afford", "gradually", "fit", "of_batches", "sparse_gpt")


def run(name, progress):
    network, params, inputs = examples.mlp()
    labels = jax.numpy.arange(len(inputs)) % 3
    given = network, params, inputs
    training = {"optimizer": optax.sgd(0.1), "key": jax.random.key(0), "epochs": 3, "progress": progress}
    options = {"stages": 3, "repair": None, "progress": progress}
    match name:
        case "staged":
            return prune.staged(*given, {"Dense_0/*": 0.5, "*": 0.25}, **options)
        case "staged_neurons":
            return prune.staged_neurons(*given, 0.5, **options)
        case "afford":
            return prune.afford(*given, lambda _: 1.0, most_lost=0.5, halvings=1, **options).params
        case "gradually":
            return train.gradually(*given, labels, cross_entropy, 0.5, stages=3, **training)
        case "fit":
            return train.fit(*given, labels, cross_entropy, **training)
        case "of_batches":
            return moments.of_batches(network, params, np.split(np.asarray(inputs)[:21], 3), progress=progress)
        case _:
            return surgeon.sparse_gpt(*given, 0.5, progress=progress)


@pytest.mark.parametrize("name", NAMES)
def test_a_line_for_each_step_where_no_bar_can_be_drawn(name, capsys):
    found = run(name, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 + (name == "afford")
    assert all(" s left" in line for line in lines)
    assert lines[1].split(",")[0].endswith(f"2 of {5 if name == 'afford' else 3}")
    silent = run(name, progress=None)
    assert not any(capsys.readouterr())
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(silent), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_what_the_lines_say(capsys):
    run("staged", progress=True)
    assert "stage 3 of 3, sparsity Dense_0/*: 0.5 *: 0.25, objective inf, " in capsys.readouterr().err
    run("sparse_gpt", progress=True)
    assert "kernel 2 of 3, path Dense_1/kernel, " in capsys.readouterr().err
    run("afford", progress=True)
    assert "network 1 of 5, sparsity 0, value 1, affordable yes" in capsys.readouterr().err


def test_a_bar_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as rich sees it
    monkeypatch.setenv("COLUMNS", "150")
    run("fit", progress=True)
    shown = capsys.readouterr()
    assert not shown.out
    assert "epoch, loss" in shown.err
    assert "━" in shown.err
    assert "3/3" in shown.err


def test_a_bar_ends_where_a_function_fails(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")

    def fails():
        with _progress.told(True, "stage", 2, ()) as tell:
            tell(object())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert "\x1b[?25h" in capsys.readouterr().err  # the cursor is back


def test_lines_without_rich(capsys, monkeypatch):
    find, there = importlib.util.find_spec, builtins.__import__

    def missing(name, *others):
        assert not name.startswith("rich"), "rich is not installed"
        return there(name, *others)

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *others: None if name == "rich" else find(name))
    monkeypatch.setattr(builtins, "__import__", missing)
    with _progress.told(True, "batch", None, ()) as tell:
        tell(object())
    assert capsys.readouterr().err.startswith("batch 1, 0 s")


def test_under_jit_values_are_not_looked_at(capsys):
    network, params, inputs = examples.mlp()
    options = {"stages": 2, "repair": "biases", "progress": True}
    jax.jit(lambda params: prune.staged(network, params, inputs, 0.5, **options).params)(params)
    assert "stage 2 of 2, sparsity 0.5, objective traced, " in capsys.readouterr().err


@pytest.mark.usefixtures("without_checked_types")
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_progress(name):
    with pytest.raises(ValueError, match="progress is 'yes'; it must be True, for a bar, or a function"):
        run(name, progress="yes")


@pytest.mark.slow
def test_a_cell_of_a_notebook_that_captures_what_it_shows(monkeypatch):
    """Rich's bar for notebooks fails there, and ``%%capture`` hides that it did."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    run_it = "from tests.test_progress import NAMES, run\nfor name in NAMES:\n    run(name, progress=True)"
    bar = "from experiments import report\nwith report.progress() as bar:\n    done = list(bar.track(range(3)))"
    cells = f"%%capture shown\n{run_it}", f"%%capture\n{bar}", "shown.stderr.count('s left'), done", bar
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=300).execute()
    counted, *_ = notebook.cells[2].outputs
    assert counted["data"]["text/plain"] == "(22, [0, 1, 2])"
