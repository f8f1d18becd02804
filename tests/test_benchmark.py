import re

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from ecjax import moments, networks, score
from experiments import benchmark, cost, probes
from tests import examples

WIDTHS = (40, 30, 20, 7)


def test_the_usual_way_gives_the_same_scores():
    with jax.enable_x64(True):
        example = examples.mlp()
        found = benchmark.jacobian_scores(*example, at_once=5)  # 23 samples: a rest of 3
        expected = score.elimination_compensation(*example)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-9, 1e-12), found, expected)


def counted(function, *arguments):
    """Multiply-adds by XLA, which counts each as two operations."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"] / 2


def test_multiply_adds_are_those_that_are_compiled():
    made = benchmark.problem(WIDTHS, 256)
    network, params, inputs, labels = made
    gradient = benchmark.gradient_pass(WIDTHS, made).call
    assert counted(network, params, inputs) == pytest.approx(cost.forward_pass(WIDTHS, 256), rel=0.1)
    assert counted(gradient, params, inputs, labels) == pytest.approx(cost.gradient_pass(WIDTHS, 256), rel=0.1)
    found = counted(lambda params, inputs: moments.of_inputs(network, params, inputs), params, inputs)
    assert found == pytest.approx(cost.moments(WIDTHS, 256, 7), rel=0.15)


def test_memory_is_what_a_call_takes():
    def fill(array):
        return np.ones(30_000_000).sum() + array

    candidate = cost.Candidate(fill, (jnp.zeros(()),), 0.0, traceable=False)
    found = cost.measure({"fill": candidate}, rounds=1, seconds=1.0, advance=lambda _: None)["fill"]
    assert found.process_bytes is None or 230e6 < found.process_bytes < 300e6
    double = cost.Candidate(lambda array: jnp.concatenate([array, array]), (jnp.zeros(1000),), 0.0)
    assert cost.compiler_bytes(double) >= 8000


def test_each_axis_has_its_cases():
    config = benchmark.Config(widths=(8,), depths=(2, 3), samples=(64,), outputs=(5,), base=WIDTHS, base_samples=9)
    assert benchmark.cases(config) == [
        ("samples", 64, WIDTHS, 64),
        ("outputs", 5, (40, 30, 20, 5), 9),
        ("width", 8, (8, 8, 8, 8, 10), 9),
        ("depth", 2, (512, 512, 10), 9),
        ("depth", 3, (512, 512, 512, 10), 9),
        ("pruning", 0, WIDTHS, 9),
    ]


def test_every_case_is_in_the_results(tmp_path, capsys):
    sizes = {"base": WIDTHS, "base_samples": 64, "widths": (), "depths": (), "samples": (32,), "outputs": ()}
    few = {"probes": (), "stages": 1, "gradients": 10, "rounds": 1}
    benchmark.main(benchmark.Config(**sizes, **few, output=tmp_path))
    frame = pd.read_csv(tmp_path / "results.csv")
    assert set(zip(frame["axis"], frame["value"], strict=True)) == {
        ("samples", 32),
        ("pruning", 0),
    }
    assert (frame["seconds"] > 0).all()
    printed = capsys.readouterr().out
    assert re.search(r"gradient pass +│ +[\d.]+ │ +1\.00 │", printed)
    for name in (
        "EC (Fisher)",
        "EC, 1 probe",
        "per-sample Jacobians",
        "EC by definition",
        "CBS-S + CBS-U, 10 gradients",
    ):
        assert name in printed
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000


def test_agreement_is_one_with_itself_and_nothing_with_chance():
    example = examples.mlp((200, 100), features=20)
    exact = score.elimination_compensation(*example)
    assert probes.agreement(example.params, exact, exact) == (pytest.approx(1), 1)
    ranks, kept = probes.agreement(example.params, exact, score.random(example.params, jax.random.key(0)))
    assert abs(ranks) < 0.05
    assert kept == pytest.approx(0.1, abs=0.03)
    few = score.elimination_compensation(*example, probes=4, key=jax.random.key(1))
    assert 0.9 < probes.agreement(example.params, exact, few)[0] < 1


def test_fifty_million_weights_fit_in_six_gigabytes():
    mlp = networks.MLP((4096, 4096, 4096, 10))
    inputs = jax.ShapeDtypeStruct((10_000, 4096), jnp.float32)
    params = jax.eval_shape(lambda key: mlp.init(key, jnp.zeros((1, 4096)))["params"], jax.random.key(0))
    network = networks.pure(mlp)
    lowered = jax.jit(lambda params, inputs: score.elimination_compensation(network, params, inputs)).lower(
        params, inputs
    )
    memory = lowered.compile().memory_analysis()
    total = memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes
    assert cost.weights((4096, 4096, 4096, 4096, 10)) > 50_000_000
    assert total < 4e9  # a call outside a jit also holds the moments, 0.4 GB
