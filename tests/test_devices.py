"""Samples and neurons spread over eight devices, and over two processes."""

import functools
import math
import re
import socket
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ecjax import _batches, devices, metrics, moments, networks, prune, repair, score, surgeon
from ecjax.prune import selection
from ecjax.repair import gauss_newton
from ecjax.repair.repairs import movable
from tests import examples, two_processes

pytestmark = pytest.mark.usefixtures("float64")
SAMPLES, FEATURES = 512, 20
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
REPAIR = {"metric": "fisher", "iterations": 1, "products": 3, "batch_size": 16, "curvature_samples": 128}


@functools.cache
def example():
    return examples.mlp((16, 4), nn.gelu, SAMPLES, FEATURES)


def labels():
    return np.arange(SAMPLES) % 4


@functools.cache
def mesh(model):
    return devices.mesh(model, jax.devices("cpu"))


def sharded(model):
    """The example's params, inputs and labels on eight devices."""
    params = devices.shard_params(*example(), mesh(model))
    inputs, targets = (devices.shard_samples(array, mesh(model)) for array in (example().inputs, labels()))
    return params, inputs, targets


def assert_close(found, expected, rtol=1e-9):
    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(np.asarray(b, float)).max()))

    jax.tree.map(compare, jax.device_get(found), jax.device_get(expected))


def _staged(network, params, inputs, _targets):
    how = repair.Survivors(**REPAIR)
    return prune.staged(network, params, inputs, 0.5, stages=1, metric="fisher", repair=how).params


def _masks(params):
    """Each second weight of each kernel."""
    return jax.tree.map(lambda kernel: jnp.arange(kernel.size).reshape(kernel.shape) % 2 == 0, examples.kernels(params))


ENTRY_POINTS = {
    "elimination_compensation": lambda network, params, inputs, _: score.elimination_compensation(
        network, params, inputs, metric="fisher", batch_size=16
    ),
    "optimal_brain_damage": lambda network, params, inputs, _: score.optimal_brain_damage(
        network, params, inputs, batch_size=16
    ),
    "probes": lambda network, params, inputs, _: score.optimal_brain_damage(
        network, params, inputs, probes=2, key=jax.random.key(0)
    ),
    "by_definition": lambda network, params, inputs, _: score.elimination_compensation_by_definition(
        network, params, inputs
    ),
    "nonlinear": lambda network, params, inputs, _: score.nonlinear_elimination_compensation(
        network, params, inputs, steps=1
    ),
    "gradient_magnitude": lambda network, params, inputs, targets: score.gradient_magnitude(
        network, params, inputs, targets=targets, loss=cross_entropy
    ),
    "neurons": lambda network, params, inputs, _: score.neuron_elimination_compensation(
        network, params, inputs, batch_size=16
    ),
    "neuron_variance": lambda network, params, inputs, _: score.neuron_variance(network, params, inputs),
    "loss_gradients": lambda network, params, inputs, targets: surgeon.loss_gradients(
        network, params, inputs, targets, cross_entropy
    ),
    "update": lambda network, params, inputs, _: moments.update(
        moments.start(network, params, inputs), network, params, inputs
    ),
    "biases": lambda network, params, inputs, targets: repair.Biases(**REPAIR)(
        network, params, _masks(params), inputs, targets
    ),
    "staged": _staged,
}


SPREAD = [("elimination_compensation", 1), ("biases", 1), ("neurons", 1)]
LATER = [(name, 1) for name in ENTRY_POINTS] + [("elimination_compensation", 2), ("by_definition", 2), ("staged", 2)]
SPREAD += [pytest.param(*spread, marks=pytest.mark.slow) for spread in LATER if spread not in SPREAD]


@pytest.mark.parametrize(("name", "model"), SPREAD)
def test_every_entry_point_gives_what_one_device_gives(name, model):
    function = functools.partial(ENTRY_POINTS[name], example().network)
    assert_close(function(*sharded(model)), function(*example()[1:], labels()))


@pytest.mark.parametrize("name", ["elimination_compensation", "by_definition", "biases"])
def test_axes_that_are_explicit(name):
    explicit = jax.make_mesh((8,), ("samples",), (AxisType.Explicit,), devices=jax.devices("cpu"))
    here = NamedSharding(explicit, PartitionSpec("samples"))
    inputs, targets = jax.device_put(example().inputs, here), jax.device_put(labels(), here)
    function = functools.partial(ENTRY_POINTS[name], example().network)
    assert_close(function(example().params, inputs, targets), function(*sharded(1)))


def gathered(compiled):
    """The shapes that a compiled function brings together from several devices."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)", compiled.as_text())
    return [tuple(map(int, shape.split(","))) if shape else () for shape in shapes]


def test_no_samples_travel_in_what_is_compiled():
    params, inputs, _ = sharded(1)
    network = example().network
    assert _batches.blocks(inputs) == 8
    nothing = moments.start(network, params, inputs, metric="fisher")
    placement = _batches.placement(inputs)
    of_moments = moments.stream._scan.lower(network, 16, placement, nothing, params, inputs, None, None, None)

    def at_two_positions(params, x):
        return network(params, jnp.stack([x, 2 * x], 1)).sum(1)

    seen = moments.start(at_two_positions, params, inputs)
    of_positions = moments.stream._scan.lower(at_two_positions, 16, placement, seen, params, inputs, None, None, None)
    problem = gauss_newton.Problem(network, 8, 2, 16, 128)
    start = gauss_newton.start(params, 0.01)
    free = movable(repair.Biases(), networks.layers(network, params, inputs), params, _masks(params))
    rows = devices.shard_samples(jnp.log(jax.nn.one_hot(labels(), 4)), mesh(1))
    steps = gauss_newton.take_steps.lower(problem, metrics.Fisher(), start, free, inputs, rows, steps=1)
    # Of the few samples at which ignored biases are looked for, those of other devices.
    assert gathered(of_positions.compile()) == [(1, FEATURES)]
    for lowered in (of_moments, steps):
        compiled = lowered.compile()
        assert "all-reduce" in compiled.as_text()  # the sums over devices
        assert gathered(compiled) == []
    # The same without what is known of the devices does gather: the test sees what it looks for.
    nowhere = _batches.Placement()
    blind = moments.stream._scan.lower(network, 16, nowhere, nothing, params, inputs, None, None, None).compile()
    assert (1, SAMPLES, FEATURES) in gathered(blind)


@pytest.mark.parametrize("spec", [("model", None), (None, "model"), ("data", "model")])
def test_what_goes_is_chosen_where_the_importances_are(spec):
    generator = np.random.default_rng(0)
    alone = [jnp.asarray(generator.integers(0, 9, shape), jnp.float32) for shape in ((16, 8), (8, 24), (5, 3))]
    here = NamedSharding(mesh(2), PartitionSpec(*spec))
    leaves = [*jax.device_put(alone[:2], here), alone[2]]
    assert all(math.prod(shape) <= 8 for shape in gathered(jax.jit(selection.smallest_of).lower(leaves, 100).compile()))
    found = selection.smallest_of(leaves, 100)
    assert found[0].sharding.is_equivalent_to(here, 2)
    jax.tree.map(np.testing.assert_array_equal, found, selection.smallest_of(alone, 100))


def test_no_samples_travel_inside_a_jit_of_the_callers():
    function = jax.jit(functools.partial(ENTRY_POINTS["elimination_compensation"], example().network))
    with jax.set_mesh(mesh(1)):
        assert gathered(function.lower(*sharded(1)).compile()) == []


def test_neurons_stay_spread_out():
    params, inputs, _ = sharded(2)
    scores = score.elimination_compensation(example().network, params, inputs)
    assert params["Dense_0"]["kernel"].sharding.spec == PartitionSpec(None, "model")
    for leaf in jax.tree.leaves(scores):
        assert leaf.sharding.shard_shape(leaf.shape)[-1] == leaf.shape[-1] // 2


def test_what_does_not_divide_evenly():
    with pytest.raises(ValueError, match="model is 3; it must divide the number of devices, 8"):
        devices.mesh(3, jax.devices("cpu"))
    with pytest.raises(ValueError, match="510 samples can't be shared out equally to 8 devices; give 504 of them"):
        devices.shard_samples(example().inputs[:510], mesh(1))
    mlp = networks.from_linen(networks.MLP((6, 7)))
    odd = {f"Dense_{i}": {"kernel": jnp.ones((i + 5, i + 6)), "bias": jnp.ones(i + 6)} for i in range(2)}
    params = devices.shard_params(mlp, odd, jnp.ones((2, 5)), mesh(2))
    assert params["Dense_0"]["kernel"].sharding.spec == PartitionSpec(None, "model")
    assert params["Dense_1"]["bias"].sharding.is_fully_replicated


@pytest.mark.slow
def test_two_processes_with_half_of_the_samples_each(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.two_processes", address, str(tmp_path)]
    root = Path(__file__).parent.parent
    started = [subprocess.Popen([*command, rank], cwd=root, stderr=subprocess.PIPE, text=True) for rank in ("0", "1")]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    expected = two_processes.answer(two_processes.inputs())
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        assert set(found) == set(expected)
        for name, leaf in expected.items():
            if leaf.dtype == bool:
                np.testing.assert_array_equal(found[name], leaf, name)
            else:
                np.testing.assert_allclose(found[name], leaf, 1e-9, 1e-9 * np.abs(leaf).max(), err_msg=name)


HLO = """
%body.1 (arg: f32[4]) -> f32[4] {
  %all-gather.3 = bf16[8,16]{1,0} all-gather(%x), dimensions={0}
}

ENTRY %main.2 (x: f32[4]) -> f32[4] {
  %while.4 = f32[4]{0} while(%x), condition=%c.1, body=%body.1, backend_config={"known_trip_count":{"n":"24"}}
  %all-reduce.5 = (f32[10]{0}, f32[2,3]{1,0}) all-reduce(%a, %b), replica_groups={}
}
"""


def test_exchanges_inside_loops_count_as_often_as_they_turn():
    assert sorted(devices._exchanges(HLO)) == [(40, 1), (2 * 8 * 16, 24)]


def test_the_account_of_a_call_that_is_not_made():
    """Of an array spread over eight devices, each holds an eighth, and gets the others' for a product."""
    mesh = devices.mesh()
    shape = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    found = devices.account(lambda x: x @ x.T, shape)
    assert (found.arguments, found.output) == (64 * 16 * 4 / 8, 64 * 64 * 4 / 8)
    assert found.multiply_adds == 64 * 64 * 16
    assert found.moved >= found.largest >= 7 / 8 * 64 * 16 * 4
    alone = devices.account(lambda x: x @ x.T, jax.ShapeDtypeStruct((64, 16), jnp.float32))
    assert (alone.arguments, alone.moved, alone.largest) == (64 * 16 * 4, 0, 0)
    square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    endless = devices.account(lambda x: jax.lax.while_loop(lambda y: (y < 1).any(), lambda y: y @ y, x), square)
    assert math.isnan(endless.multiply_adds)
