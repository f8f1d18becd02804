"""Devices that run out of memory: what JAX raises then is raised here, as no test should fill a machine."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecjax import moments, repair, score, staged
from ecjax.moments import stream
from ecjax.repair import gauss_newton
from tests import examples

NETWORK, PARAMS, INPUTS = examples.mlp()
OF_CPU = "INTERNAL: Error dispatching computation: Out of memory allocating 35184372090208 bytes."
OF_GPU = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4398046511104 bytes."


def failing(words):
    """What fails with these words."""

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError(words)

    return fail


@pytest.fixture(params=[OF_CPU, OF_GPU], ids=["CPU", "GPU"])
def full(request, monkeypatch):
    """Lets the moments fail as on a device that is full."""
    monkeypatch.setattr(stream, "_scan", failing(request.param))


@pytest.mark.usefixtures("full")
def test_a_score_says_which_size_to_lower():
    with pytest.raises(MemoryError, match=r"a device ran out of memory: lower batch_size=8, .* Nothing that was given"):
        score.elimination_compensation(NETWORK, PARAMS, INPUTS, batch_size=8)


@pytest.mark.usefixtures("full")
def test_a_stream_names_the_batch():
    with pytest.raises(MemoryError, match=r"batch 1: a device ran out of memory: lower batch_size=1024"):
        moments.of_batches(NETWORK, PARAMS, [INPUTS, INPUTS])


def test_a_repair_says_which_sizes_to_lower_and_leaves_the_state(monkeypatch):
    how = repair.Survivors(batch_size=4, curvature_samples=2, iterations=1)
    state = staged.start(NETWORK, PARAMS, INPUTS, repair=how)
    words = r"a device ran out of memory: lower batch_size=4 or curvature_samples=2 of repair.Survivors"
    with monkeypatch.context() as patch:
        patch.setattr(gauss_newton, "take_steps", failing(OF_CPU))
        with pytest.raises(MemoryError, match=words):
            staged.step(NETWORK, state, INPUTS, 0.5, criterion="magnitude", repair=how)
    assert jnp.isfinite(staged.step(NETWORK, state, INPUTS, 0.5, repair=how).objective)


def test_other_errors_of_the_runtime_stay_what_they_are(monkeypatch):
    monkeypatch.setattr(stream, "_scan", failing("INTERNAL: a kernel of the device failed"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a kernel of the device failed"):
        score.elimination_compensation(NETWORK, PARAMS, INPUTS)


@pytest.mark.slow
def test_a_staged_run_takes_at_most_twice_the_data_and_twenty_times_the_params():
    """In a process of its own, where nothing else has been freed, with the data in it once already."""
    script = """
import jax, jax.numpy as jnp
from ecjax import networks, prune
from experiments import benchmark

mlp = networks.MLP((300, 100, 10))
inputs = jax.block_until_ready(jax.random.uniform(jax.random.key(0), (60_000, 784)))
network, params = networks.from_linen(mlp), mlp.init(jax.random.key(1), inputs[:1])["params"]

def run():
    return prune.staged(network, params, inputs, 0.98, stages=3, metric="fisher")

*_, risen, _ = benchmark.by_turns(run, lambda: jnp.zeros(()), rounds=1, seconds=0)
print(risen, inputs.nbytes + 20 * sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    risen, most = map(float, done.stdout.split())
    assert np.isnan(risen) or 0 < risen < most
