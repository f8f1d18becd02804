import contextlib
import dataclasses
import functools
import io
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from ecjax import moments, networks, score
from experiments import benchmark
from tests import examples

WIDTHS = (40, 30, 20, 7)
GRADIENT = benchmark.Method("gradient pass", benchmark.gradient_pass)
TIMINGS = ["median (ms)", "first (s)", "relative time", "process (MB)"]
SMALL = benchmark.Config(
    base=WIDTHS,
    base_samples=64,
    widths=(),
    depths=(),
    samples=(32,),
    outputs=(),
    architectures=(),
    probes=(1, 3),
    selected=(1000,),
    stages=1,
    gradients=10,
    rounds=1,
)


def test_the_usual_way_gives_the_same_scores():
    with jax.enable_x64(True):
        example = examples.mlp()
        found = benchmark.jacobian_scores(*example)
        expected = score.elimination_compensation(*example)
        for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(leaf, other, 1e-9, 1e-12)


def by_xla(function, *arguments):
    """Multiply-adds by XLA, which counts each as two operations."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"] / 2


@pytest.mark.slow
def test_multiply_adds_are_those_that_are_compiled():
    network, *given = problem = benchmark.problem(WIDTHS, 256)
    methods = {method.name: method for method in benchmark.scoring(WIDTHS, (1,))}

    def counted(name):
        return benchmark.measured(methods[name], GRADIENT, problem, rounds=1, seconds=0.0)["multiply-adds"]

    for name in ("forward pass", benchmark.GRADIENT):
        assert counted(name) == pytest.approx(by_xla(functools.partial(methods[name].call, network), *given), rel=0.1)
    # The scores themselves run in batches, which XLA counts once.
    found = by_xla(lambda params, inputs: moments.of_inputs(network, params, inputs), *given)
    assert found == pytest.approx(counted("EC"), rel=0.15)
    forward, back = 40 * 30 + 30 * 20 + 20 * 7, 30 * 20 + 20 * 7
    assert counted("EC") == pytest.approx(256 * (3 * forward + 7 * back), rel=0.02)


def test_memory_is_what_a_call_takes():
    zero = jnp.zeros(())
    *_, risen, _ = benchmark.by_turns(lambda: np.ones(30_000_000).sum() + zero, lambda: zero, rounds=1, seconds=1.0)
    assert np.isnan(risen) or 230e6 < risen < 300e6
    small = benchmark.problem(WIDTHS, 16)
    twice = benchmark.Method("twice", lambda network, params, inputs: jnp.concatenate([inputs, inputs]))
    found = benchmark.measured(twice, GRADIENT, small, rounds=1, seconds=1.0)
    assert found["XLA (MB)"] >= 2 * 16 * 40 * 4 / 1e6
    several = twice._replace(one_program=False)
    assert np.isnan(benchmark.measured(several, GRADIENT, small, rounds=1, seconds=1.0)["XLA (MB)"])


def test_calls_take_turns_and_stop_at_their_limits(monkeypatch):
    clock, turns = [0.0], []

    def lasting(name, seconds):
        def call():
            turns.append(name)
            clock[0] += seconds

        return call

    monkeypatch.setattr(benchmark.sweep.time, "perf_counter", lambda: clock[0])
    call, reference = lasting("call", 3.0), lasting("reference", 2.0)
    assert benchmark.by_turns(call, reference, rounds=4, seconds=100)[:2] == (3, 2)
    assert turns == ["call", "reference"] * 5  # once to be compiled
    turns.clear()
    benchmark.by_turns(call, reference, rounds=9, seconds=9)
    assert turns == ["call", "reference"] * 3
    turns.clear()
    benchmark.by_turns(call, reference, rounds=9, seconds=0)
    assert turns == ["call", "reference"] * 2
    assert benchmark.by_turns(call, call, rounds=2, seconds=100)[:2] == (3, 3)


def test_each_axis_has_its_cases():
    axes = {
        "widths": (8,),
        "depths": (2, 3),
        "samples": (64,),
        "outputs": (5,),
        "architectures": ("convnet",),
        "selected": (8,),
    }
    config = benchmark.Config(**axes, base=WIDTHS, base_samples=9)
    assert [case for *case, _ in benchmark.cases(config)] == [
        ["samples", 64, WIDTHS, 64],
        ["outputs", 5, (40, 30, 20, 5), 9],
        ["width", 8, (8, 8, 8, 8, 10), 9],
        ["depth", 2, (512, 512, 10), 9],
        ["depth", 3, (512, 512, 512, 10), 9],
        ["network", 0, "convnet", 512],
        ["pruning to 0.98", 0, WIDTHS, 9],
        ["probes", 0, (40, 30, 20, 1000), 9],
        ["selection of 0.9", 8, "random weights", 8],
    ]


def test_slow_ways_run_on_as_many_samples_as_they_bear():
    def names(*widths):
        return [method.name for method in benchmark.scoring(widths, (1, 4))]

    assert names(784, 300, 100, 10)[-2:] == ["EC, 1 probe", benchmark.JACOBIANS]
    assert names(784, 300, 100, 1000)[-2:] == ["EC, 1 probe", "EC, 4 probes"]
    *_, jacobians, definition = benchmark.scoring((100, 100, 100, 100, 10), (1,))
    assert (jacobians.name, jacobians.samples) == (benchmark.JACOBIANS, 3e7 // (10 * 31_000))
    assert (definition.name, definition.samples) == (benchmark.DEFINITION, 1e10 // 31_000**2)


@pytest.mark.slow
def test_one_output_is_timed_where_its_softmax_says_nothing():
    given = benchmark.problem((*WIDTHS[:-1], 1), 8)
    for method in benchmark.scoring((*WIDTHS[:-1], 1), ()):
        assert benchmark.measured(method, GRADIENT, given, rounds=1, seconds=0.0)["median (ms)"] > 0


def test_what_ran_on_a_part_is_scaled_up(monkeypatch):
    seen, problem = [], benchmark.problem(WIDTHS, 64)

    def first_layer(_, params, inputs):
        seen.append(inputs.shape)
        return inputs @ params["Dense_0"]["kernel"]

    monkeypatch.setattr(benchmark, "by_turns", lambda call, reference, **_: (0.0 * call().sum() + 0.5, 2.0, 7e6, 3.0))
    method = benchmark.Method("first layer", first_layer, 16)
    found = benchmark.measured(method, GRADIENT, problem, rounds=1, seconds=1.0)
    assert set(seen) == {(16, 40)}
    assert found.pop("XLA (MB)") >= 16 * 30 * 4 / 1e6
    expected = {"median (ms)": 2000, "relative time": 1, "multiply-adds": 64 * 40 * 30, "process (MB)": 7}
    assert found == expected | {"first (s)": 3}
    gradient = GRADIENT._replace(samples=32)  # of which two make a gradient pass
    found = benchmark.measured(method, gradient, problem, rounds=1, seconds=1.0)
    assert found["relative time"] == 0.5


def test_networks_that_are_no_mlps_are_scored_as_many_samples_at_a_time_as_their_gradient_is_of():
    config = benchmark.Config(architecture_batch=3)
    (gradient, *others), *_ = [methods for axis, *_, methods in benchmark.cases(config) if axis == "network"]
    assert gradient.samples == 3
    assert [method.call.keywords["batch_size"] for method in others] == [3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("name", benchmark.ARCHITECTURES)
def test_every_layer_of_networks_that_are_no_mlps_is_scored(name):
    network, params, inputs = benchmark.problem(name, 2)
    kernels = {layer.kernel for layer in networks.layers(network, params, inputs) if not layer.reason}
    gradients = networks.by_path(benchmark.gradient_pass(network, params, inputs))
    assert len(kernels) > 5
    assert all(gradients[path].any() for path in kernels)


def test_both_ways_to_choose_weights_choose_the_same(monkeypatch):
    _, _, values = benchmark.problem("random weights", 1000)
    assert benchmark.by_counting(None, None, values).sum() == 900
    monkeypatch.setattr(benchmark, "by_counting", lambda *given: ~benchmark.by_argsort(*given))
    with pytest.raises(ArithmeticError, match="of 1001"):
        benchmark.problem("random weights", 1001)


def ran(folder):
    """What a small run prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        benchmark.main(dataclasses.replace(SMALL, output=folder))
    return printed.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("benchmark")
    return folder, ran(folder)


@pytest.mark.slow
def test_every_case_is_in_the_results(whole):
    folder, printed = whole
    frame = pd.read_csv(folder / "results.csv")
    assert set(zip(frame["axis"], frame["value"], strict=True)) == {
        ("samples", 32),
        ("pruning to 0.98", 0),
        ("probes", 0),
        ("selection of 0.9", 1000),
    }
    assert (frame["median (ms)"] > 0).all()
    assert (frame.loc[frame["method"].isin([benchmark.GRADIENT, "by counting"]), "relative time"] == 1).all()
    np.testing.assert_allclose(frame.loc[frame["axis"] == "probes", "Spearman"].iloc[1], 1)  # EC itself
    assert re.search(r"gradient pass +│ +[\d.]+ │ +[\d.]+ │ +1\.00 │ +1\.00 │", printed)
    for name in (
        "EC (Fisher)",
        "EC, 1 probe",
        "per-sample Jacobians",
        "EC by definition",
        "CBS-S + CBS-U, 10 gradients",
    ):
        assert name in printed
    assert re.search(r"EC, 3 probes +│.*│ +0\.\d{4} │ +[01]\.\d{4} │", printed)
    assert (folder / "benchmark.png").stat().st_size > 10_000


KILLED = """
import os, signal
from pathlib import Path, PosixPath
from experiments import benchmark

by_turns, left = benchmark.by_turns, list(range(rows))

def once_more(*arguments, **options):
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left.pop()
    return by_turns(*arguments, **options)

benchmark.by_turns = once_more
benchmark.main(benchmark.{config})
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_rows(whole, tmp_path):
    config = dataclasses.replace(SMALL, output=tmp_path)
    script = f"rows = 10\n{KILLED.replace('{config}', repr(config))}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    path = tmp_path / "results.csv"
    left = path.read_bytes()
    assert left.count(b"\n") == 1 + 10  # all but the one that it was at
    path.write_bytes(left[:-7])  # as if it had been killed while it wrote the tenth
    ran(tmp_path)
    assert path.read_bytes().startswith(left[: left[:-1].rindex(b"\n")])
    expected, found = (pd.read_csv(folder / "results.csv").drop(columns=TIMINGS) for folder in (whole[0], tmp_path))
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.slow
def test_agreement_is_one_with_itself_and_nothing_with_chance():
    example = examples.mlp((200, 100), features=20)

    def agreement(criterion=score.elimination_compensation, **options):
        return tuple(benchmark.agreement(functools.partial(criterion, **options), *example).values())

    assert agreement() == (pytest.approx(1), 1)
    ranks, kept = agreement(score.random, key=jax.random.key(0))
    assert abs(ranks) < 0.05
    assert kept == pytest.approx(0.1, abs=0.03)
    few, many = (agreement(probes=number, key=jax.random.key(1))[0] for number in (4, 200))
    assert 0.9 < few < many < 1


@pytest.mark.slow
def test_fifty_million_weights_fit_in_six_gigabytes():
    widths = (4096, 4096, 4096, 4096, 10)
    mlp = networks.MLP(widths[1:])
    inputs = jax.ShapeDtypeStruct((10_000, 4096), jnp.float32)
    params = jax.eval_shape(lambda key: mlp.init(key, jnp.zeros((1, 4096)))["params"], jax.random.key(0))
    network = networks.from_linen(mlp)
    lowered = jax.jit(lambda params, inputs: score.elimination_compensation(network, params, inputs)).lower(
        params, inputs
    )
    memory = lowered.compile().memory_analysis()
    total = memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes
    assert sum(layer["kernel"].size for layer in params.values()) > 50_000_000
    assert total < 4e9  # a call outside a jit also holds the moments, 0.4 GB
