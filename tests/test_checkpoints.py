"""A run in stages that was stopped goes on where it was, bit for bit; a folder of another run is refused."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecjax import networks, prune, repair, score, staged
from ecjax._checkpoints import _told
from tests import examples

ROOT = Path(__file__).parents[1]
# With the few products that are asked for here rounding stays rounding: after 20, conjugate gradients on so few samples
# have multiplied it by 10^10, as float64 shows on one device and on four.
HOW = {"stages": 3, "metric": "fisher", "repair": repair.Survivors(iterations=1, last_iterations=2, products=3)}


def stop_after(stages):
    def tell(stage):
        if stage.number == stages:
            raise KeyboardInterrupt

    return tell


def same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("stages", [pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW)])
def test_weights_go_on_bit_for_bit(tmp_path, monkeypatch, stages):
    example, how = examples.mlp(), HOW | {"samples": 0.5}
    expected = prune.staged(*example, 0.75, **how)
    with pytest.raises(KeyboardInterrupt):
        prune.staged(*example, 0.75, progress=stop_after(stages), checkpoints=tmp_path / "run", **how)
    taken, step = [], staged.step
    monkeypatch.setattr(staged, "step", lambda *given, **options: taken.append(1) or step(*given, **options))
    told = []
    same(prune.staged(*example, 0.75, progress=told.append, checkpoints=tmp_path / "run", **how), expected)
    assert len(taken) == 3 - stages
    assert [stage.number for stage in told] == list(range(stages + 1, 4))
    same(prune.staged(*example, 0.75, checkpoints=tmp_path / "run", **how), expected)
    assert len(taken) == 3 - stages


def test_units_with_a_key_and_weights_go_on(tmp_path):
    example = examples.mlp()
    weights = np.linspace(0.5, 1.5, len(example.inputs), dtype=np.float32)
    criterion = functools.partial(score.neuron_elimination_compensation, probes=1)
    how = {"criterion": criterion, "weights": weights, "key": jax.random.key(3), "stages": 2, "metric": "fisher"}
    expected = prune.staged_neurons(*example, 0.5, **how)
    with pytest.raises(KeyboardInterrupt):
        prune.staged_neurons(*example, 0.5, progress=stop_after(1), checkpoints=tmp_path, **how)
    same(prune.staged_neurons(*example, 0.5, checkpoints=tmp_path, **how), expected)


@pytest.mark.slow
def test_a_module_of_equinox_goes_on(tmp_path):
    import equinox as eqx

    module = eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(0))

    def network(module, inputs):
        return jax.vmap(module)(inputs)

    given = network, module, jax.random.normal(jax.random.key(1), (20, 4)), 0.5
    with pytest.raises(KeyboardInterrupt):
        prune.staged(*given, progress=stop_after(1), checkpoints=tmp_path, **HOW)
    found = prune.staged(*given, checkpoints=tmp_path, **HOW)
    assert isinstance(found.params, eqx.nn.MLP)
    same(networks.by_path(found.masks), networks.by_path(prune.staged(*given, **HOW).masks))


OTHERS = {
    "sparsity": ({"sparsity": 0.8}, "sparsity was 0.75 there, is 0.8"),
    "stages": ({"stages": 4}, "stages was 3 there, is 4"),
    "samples": ({"samples": 0.5}, "samples was None there, is 0.5"),
    "metric": ({"metric": "euclidean"}, "metric was 'fisher' there, is 'euclidean'"),
    "repair": ({"repair": repair.Survivors(iterations=2)}, "repair was .*iterations=1.* there, is .*iterations=2"),
    "criterion": ({"criterion": "magnitude", "repair": None, "metric": "euclidean"}, "criterion was .*magnitude"),
    "exclude": ({"exclude": "Dense_0/*"}, "exclude was .* there, is 'Dense_0"),
}
OTHER_GIVEN = {
    "inputs": (lambda inputs: inputs + 1, "inputs was 1 arrays of sum .* there, is 1 arrays of sum"),
    "params": (lambda params: jax.tree.map(jnp.negative, params), "params was 6 arrays of sum"),
    "network": (lambda _: networks.from_linen(networks.MLP((7, 6, 3), jnp.sin)), "the network answers otherwise"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a run."""
    path = tmp_path_factory.mktemp("checkpoints") / "run"
    prune.staged(*examples.mlp(), 0.75, checkpoints=path, **HOW)
    return path


@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_another_run_is_refused(folder, change, message):
    given = examples.mlp()._asdict() | {"sparsity": 0.75} | HOW | change
    with pytest.raises(ValueError, match=message):
        prune.staged(**given, checkpoints=folder)


@pytest.mark.parametrize("name", OTHER_GIVEN)
def test_a_run_of_something_else_is_refused(folder, name):
    change, message = OTHER_GIVEN[name]
    given = examples.mlp()._asdict()
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=message):
        prune.staged(**given, sparsity=0.75, checkpoints=folder, **HOW)


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files, and no run in stages; name a new folder"):
        prune.staged(*examples.mlp(), 0.75, checkpoints=tmp_path, **HOW)


def test_what_tells_a_run_is_readable(folder):
    facts = json.loads((folder / "run.json").read_text())
    assert facts["repair"].startswith("Survivors(iterations=1")
    assert facts["inputs"].count("arrays of sum") == 1
    assert not any(" at 0x" in value for value in facts.values())


def test_one_bit_changes_the_sum():
    array = np.zeros((3, 4), np.float32)
    other, swapped = array.copy(), array.copy()
    other[1, 2] = 1e-45
    array[0, 1], swapped[1, 0] = 1, 1
    sums = {_told({"a": given}) for given in (array, other, swapped, array.astype(np.float16), array > 0)}
    assert len(sums) == 5
    assert len({_told(array), _told(jnp.asarray(array))}) == 1


def test_leaves_that_change_places_are_other_params():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    params = {"a": array, "b": 2 * array, "c": array + 1}
    assert len({_told(params), _told(params | {"a": params["b"], "b": params["a"]}), _told(params | {"d": array})}) == 3


class Halved:
    """A criterion that is an object."""

    def __call__(self, network, params, inputs):
        return score.magnitude(network, params, inputs)


def test_an_object_is_told_by_its_kind_and_not_by_where_it_lies():
    assert _told(Halved()) == _told(Halved()) == "tests.test_checkpoints.Halved"


PROCESS = """
import os, signal, sys
import jax
import numpy as np
from ecjax import devices, networks, prune
from tests import examples, test_checkpoints
def tell(stage):
    if stage.number == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
network, params, inputs = examples.mlp(samples=240)
if jax.device_count() > 1:
    mesh = devices.mesh(2)
    params, inputs = devices.shard_params(network, params, inputs, mesh), devices.shard_samples(inputs, mesh)
found = prune.staged(network, params, inputs, 0.75, checkpoints=sys.argv[2], progress=tell, **test_checkpoints.HOW)
np.savez(sys.argv[2], outputs=network(found.params, inputs), **networks.by_path(found.params))
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_killed_and_gone_on_in_another_process(tmp_path, devices):
    def run(folder, *, stop, count):
        flags = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        command, here = [sys.executable, "-c", PROCESS, str(stop), folder], {"cwd": tmp_path, "env": os.environ | flags}
        return subprocess.run(command, capture_output=True, text=True, check=False, **here)

    whole, killed = run("whole", stop=0, count=1), run("run", stop=2, count=1)
    assert (whole.returncode, killed.returncode) == (0, -signal.SIGKILL), whole.stderr + killed.stderr
    done = run("run", stop=0, count=devices)
    assert done.returncode == 0, done.stderr
    expected, found = (np.load(tmp_path / f"{name}.npz") for name in ("whole", "run"))
    for name in expected:
        if devices == 1:
            np.testing.assert_array_equal(found[name], expected[name])
        np.testing.assert_array_equal(found[name] == 0, expected[name] == 0)
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
