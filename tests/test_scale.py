"""What large transformers would take on many devices, and that a small one gives the same on eight as on one."""

import functools
import math
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
from experiments import language, scale
from tests import examples

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


def of_language():
    """A GPT with biases."""
    words = jax.random.randint(jax.random.key(0), (16, 8), 0, 11)
    return examples.of_module(language.GPT(characters=11, layers=1, width=16, heads=2), words)


def on_eight(given):
    mesh = devices.mesh(2, jax.devices()[:8])
    params = devices.shard_params(given.network, given.params, given.inputs, mesh)
    return given._replace(params=params, inputs=devices.shard_samples(given.inputs, mesh))


STEPS = {"iterations": 1, "products": 4, "batch_size": 2, "curvature_samples": 16, "metric": "fisher"}
STAGED = {"stages": 2, "metric": "fisher"}


def repaired(how):
    def call(network, params, inputs):
        masks = prune.one_shot(params, score.magnitude(network, params, inputs), 0.5).masks
        return how(network, params, masks, inputs, network(params, inputs))

    return call


CALLS = {
    "biases": repaired(repair.Biases(**STEPS)),
    "staged": functools.partial(prune.staged, sparsity=0.5, repair=repair.Survivors(**STEPS), **STAGED),
    "staged_neurons": functools.partial(prune.staged_neurons, fraction=0.4, repair=repair.Survivors(**STEPS), **STAGED),
}
NETWORKS = {"GPT": of_language, "widths that do not divide": lambda: examples.mlp((15, 9, 5), samples=16, features=7)}


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("network", NETWORKS)
def test_repairs_and_stages_on_eight_devices(network, name):
    given = NETWORKS[network]()
    found, expected = CALLS[name](*on_eight(given)), CALLS[name](*given)
    if isinstance(expected, prune.Pruned):
        jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (found.masks, expected.masks)))
        found, expected = found.params, expected.params
    assert_close(found, expected, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["staged", "staged_neurons"])
def test_stages_of_fully_spread_params(name):
    here = example()
    there, options = spread(*here, devices.mesh(2, jax.devices()[:8])), {"key": jax.random.key(2)}
    found, expected = (CALLS[name](scale.network, *given, **options) for given in (there, here))
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (found.masks, expected.masks)))
    assert_close(found.params, expected.params, 2e-2)
    for path, leaf in networks.by_path(found.params).items():
        parts = [array.sharding.shard_shape(array.shape) for array in (leaf, networks.by_path(there[0])[path])]
        assert np.prod(parts[0]) <= np.prod(parts[1]), path  # a device holds no more than before


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


@pytest.mark.parametrize("size", scale.Config().sizes)
@pytest.mark.parametrize("count", scale.Config().devices)
def test_all_that_is_compiled_by_default_can_be_laid_out(size, count):
    model = max(2, math.isqrt(count))  # as in its main
    parts, axes = {"model": model, "data": count // model, None: 1}, []

    def leaf(shape, *names):
        axes.extend(zip(shape, names, strict=False))

    scale.initial(scale.SIZES[size], leaf)
    assert axes
    assert all(length % parts[name] == 0 for length, name in axes)
