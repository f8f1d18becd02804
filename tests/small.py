"""Small runs of every experiment, and ``python -m tests.small SIGNAL ROWS NAME FLAGS...``: one that gets a signal."""

import functools
import importlib
import os
import signal
import sys
import types

import tyro

from experiments import results

_TWO = "--seeds 2 --data digits"
RUNS = {
    "mnist": f"{_TWO} --widths 8 --epochs 1 --fine-tuning-epochs 1 --methods magnitude random --sparsities 0.5 0.8",
    "brain_surgeon": f"{_TWO} --widths 8 --target-accuracy 0.15 --gradients 20 --sparsities 0.5 0.8 --draws 2",
    "frontier": f"{_TWO} --networks modest surrogate --sparsities 0.5 --surrogate-sparsities 0.5 --calibration 50 "
    "--surrogate-epochs 1",
    "language": "--text README.md --characters 3000 --layers 1 --width 8 --heads 2 --positions 8 --epochs 1 "
    "--calibration 8 --sparsities 0.5 0.8 --costly-sparsities 0.8 --seeds 2",
    "convnet": f"{_TWO} --channels 2 3 --epochs 1 --calibration 16 --stages 1 --iterations 1 --curvature 8 "
    "--gradual-epochs 1 --sparsities 0.5 0.8 --costly-sparsities 0.8",
    "neurons": f"{_TWO} --networks mlp --epochs 1 --fractions 0.5 --widths 0.5 --stages 1 --iterations 1",
    "diffusion_sorption": "--architectures 4 --noise 0 0.05 --seeds 2 --epochs 1 --fine-tuning-epochs 1 --cells 16 "
    "--times 10 --methods magnitude random --sparsities 0.5 --small-network-sparsities 0.5 "
    "--staged-sparsities 0.5 --stages 1 --batch-size 32",
}
_FEW = {
    "brain_surgeon": ("magnitude", "CBS-S (RMP)", "EC (Fisher)"),
    "frontier": ("magnitude", "EC"),
    "language": ("magnitude", "SparseGPT"),
    "convnet": ("magnitude", "EC, batch statistics"),
}


def module(name: str, replace=setattr) -> types.ModuleType:
    """An experiment without what takes time and is tested elsewhere: most methods, and figures."""
    experiment = importlib.import_module(f"experiments.{name}")
    if name in _FEW:
        every = experiment.methods
        few = functools.wraps(every)(lambda *given: {method: every(*given)[method] for method in _FEW[name]})
        replace(experiment, "methods", few)
    if name == "neurons":
        few = {method: experiment.CRITERIA[method] for method in ("norm, staged", "random, staged")}
        replace(experiment, "CRITERIA", few)
    if name == "frontier":
        load, grid = experiment.diffusion_sorption.load, {"cells": 16, "times": 10, "initial_concentration": 0.1}
        replace(experiment, "diffusion_sorption", types.SimpleNamespace(load=lambda **_: load(noise=0.0, **grid)))
    if name == "diffusion_sorption":
        replace(experiment, "_draw_snapshots", lambda *_: None)
    replace(experiment.report, "figure", lambda *_: None)
    return experiment


def config(experiment: types.ModuleType, name: str, output) -> object:
    return tyro.cli(experiment.Config, args=[*RUNS[name].split(), "--output", str(output)])


def main(stop: str, rows: str, name: str, *flags: str) -> None:
    """Runs an experiment that gets a signal as soon as its results hold so many rows."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background starts without
    add = results.Rows.add

    def add_and_stop(table, row):
        add(table, row)
        if table.count() >= int(rows):
            os.kill(os.getpid(), signal.Signals[stop])

    results.Rows.add = add_and_stop
    sys.argv = [name, *flags]
    experiment = module(name)
    results.command(experiment.Config, experiment.main, "")


if __name__ == "__main__":
    main(*sys.argv[1:])
