"""What large transformers would take on many devices, and that a small one gives the same on eight as on one."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from ecjax import devices, networks, prune, repair, score
from experiments import scale

ROOT = Path(__file__).parent.parent
SMALL = scale.Sizes(layers=2, width=32, heads=4, groups=2, hidden=48, words=64)


def example(seed=0):
    """Params and words of a small transformer, on one device."""
    keys = iter(jax.random.split(jax.random.key(seed), 20))

    def draw(shape, *_):
        return jax.random.normal(next(keys), shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1)

    return scale.initial(SMALL, draw), jax.random.randint(next(keys), (8, 12), 0, 64)


def spread(params, words, mesh):
    """The same, params spread over both axes of a mesh."""
    sharding = lambda _, *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))  # noqa: E731
    return jax.device_put(params, scale.initial(SMALL, sharding)), devices.shard_samples(words, mesh)


def assert_close(found, expected, rtol=1e-3):
    def compare(one, other):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * float(np.abs(np.asarray(other)).max()))

    jax.tree.map(compare, jax.device_get(found), jax.device_get(expected))


@pytest.mark.slow
def test_fully_spread_params_give_what_one_device_gives():
    here, options = example(), {"metric": "fisher", "probes": 1, "key": jax.random.key(1), "batch_size": 8}
    there = spread(*here, devices.mesh(2, jax.devices()[:8]))
    scores = [score.elimination_compensation(scale.network, *given, **options) for given in (here, there)]
    assert_close(scores[1].importance, scores[0].importance)
    for path, importance in networks.by_path(scores[1].importance).items():
        leaf = networks.by_path(there[0])[path]
        assert importance.sharding.is_equivalent_to(leaf.sharding, leaf.ndim), path
    masks = prune.one_shot(here[0], scores[0], 0.5).masks
    jax.tree.map(np.testing.assert_array_equal, masks, prune.one_shot(there[0], scores[0], 0.5).masks)
    how = repair.Survivors(iterations=2, products=4, batch_size=1, curvature_samples=8, metric="fisher")
    labels = jnp.roll(here[1], -1, 1)
    moved = [how(scale.network, params, masks, words, labels) for params, words in (here, there)]
    assert_close(moved[1], moved[0], 1e-2)


@pytest.mark.slow
def test_what_a_device_holds(tmp_path):
    flags = f"--sizes 5M --devices 8 --positions 32 --output {tmp_path}"
    command = [sys.executable, "-m", "experiments.scale", *flags.split()]
    subprocess.run(command, cwd=ROOT, env=os.environ, check=True, capture_output=True, text=True)
    frame = pd.read_csv(tmp_path / "results.csv").set_index(["layout", "call"])
    shapes = []
    scale.initial(scale.SIZES["5M"], lambda shape, *_: shapes.append(shape))
    copy = 4 * sum(map(np.prod, shapes))
    stacked = 4 * max(np.prod(shape) for shape in shapes if len(shape) > 2)
    for layout, parts in {"neurons": 2, "all": 8}.items():
        gradient, scores, _, step = (frame.loc[layout, call] for call in scale.CALLS)
        assert scores["temporary"] <= 2 * gradient["temporary"]
        assert scores["multiply_adds"] <= 1.3 * gradient["multiply_adds"]
        assert scores["output"] <= 1.1 * 2 * copy / parts
        assert step["temporary"] <= 1.3 * (8 * copy / parts + gradient["temporary"])
        assert max(scores["largest"], step["largest"]) < stacked
    assert (tmp_path / "scale.png").stat().st_size > 10_000
