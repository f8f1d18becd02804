"""Programs that hold a network and its params, and run without ecjax."""

import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecjax import _trees, compact, devices, graph, networks
from tests import examples
from tests.architectures import ARCHITECTURES
from tests.test_coupled import half

NAMES = ["grouped convolutions", "gated transformer", "scanned blocks"]
SLOW = [
    "mlp",
    "residual network",
    "vision transformer",
    "u-net",
    "tied embedding",
    "recurrent",
    "looped",
    "split heads",
]
LOAD = """
from jax import export
program = export.deserialize(bytearray(open("pruned.jax", "rb").read()))
outputs = program.call(inputs)
"""


def loaded(path):
    return jax.export.deserialize(bytearray(path.read_bytes()))


def without_half(network, params, inputs):
    static = _trees.static_leaves(params)
    network, params = _trees.WithStatic(network, static), _trees.arrays(params)
    groups = networks.groups(network, params, inputs)
    return *graph.without_units(network, params, groups, half(groups)), inputs


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_smaller_network_runs_on_any_number_of_samples(name, tmp_path):
    network, params, inputs = without_half(*ARCHITECTURES[name]().example)
    size = compact.export(tmp_path / "net", network, params, inputs)
    assert size == (tmp_path / "net").stat().st_size
    program, expected = loaded(tmp_path / "net"), network(params, inputs)
    for count in (1, 3, 11):
        places = np.arange(count) % len(inputs)
        np.testing.assert_allclose(program.call(inputs[places]), expected[places], rtol=1e-4, atol=1e-5)
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    with pytest.raises(ValueError, match="shape"):
        program.call(inputs[:, 1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal attention", pytest.param("u-net", marks=pytest.mark.slow)])
def test_networks_as_they_are(name, tmp_path):
    """A transformer, and an Equinox module with leaves that are no arrays."""
    network, params, inputs = ARCHITECTURES[name]().example
    compact.export(tmp_path / "net", network, params, np.asarray(inputs))
    found = loaded(tmp_path / "net").call(inputs[:2])
    np.testing.assert_allclose(found, network(params, inputs[:2]), rtol=1e-4, atol=1e-5)


def test_params_of_narrow_numbers_and_of_none(tmp_path):
    example = examples.mlp(widths=(7, 3))
    params, inputs = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (example.params, example.inputs))
    params["Dense_0"] = {"kernel": params["Dense_0"]["kernel"][:, :0], "bias": params["Dense_0"]["bias"][:0]}
    params["Dense_1"] |= {"kernel": params["Dense_1"]["kernel"][:0]}
    network = networks.from_linen(networks.MLP((0, 3)))
    compact.export(tmp_path / "net", network, params, inputs)
    outputs = loaded(tmp_path / "net").call(inputs)
    assert outputs.dtype == jnp.bfloat16
    np.testing.assert_array_equal(outputs, network(params, inputs))


def test_params_that_are_spread_over_devices_make_a_program_for_one(tmp_path):
    example, mesh = examples.mlp(widths=(8, 3), samples=16), devices.mesh(model=2)
    inputs = devices.shard_samples(example.inputs, mesh)
    params = devices.shard_params(example.network, example.params, inputs, mesh)
    compact.export(tmp_path / "net", example.network, params, inputs)
    program = loaded(tmp_path / "net")
    assert program.nr_devices == 1
    np.testing.assert_allclose(program.call(example.inputs), example.network(*example[1:]), rtol=1e-5, atol=1e-6)


def test_double_precision(tmp_path):
    with jax.enable_x64(True):
        example = examples.mlp(widths=(8, 3), samples=6)
        compact.export(tmp_path / "net", *example)
        found = loaded(tmp_path / "net").call(example.inputs)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, example.network(*example[1:]), rtol=1e-12)


def linear(params, x):
    return x @ params


DEPENDENT = {
    "len": lambda params, x: x.reshape(len(x), -1) @ params,
    "a branch": lambda params, x: linear(params, x if x.shape[0] > 3 else 2 * x),
    "a loop": lambda params, x: jnp.stack([row @ params for row in x]),
}


@pytest.mark.parametrize("kind", DEPENDENT)
def test_a_trace_that_depends_on_the_number_of_samples_is_refused(kind, tmp_path):
    network, params, inputs = DEPENDENT[kind], jnp.ones((5, 2)), examples.inputs()
    with pytest.raises(ValueError, match=r"can't be traced for any number of samples: .* or give samples= for"):
        compact.export(tmp_path / "net", network, params, inputs)
    assert not list(tmp_path.iterdir())
    compact.export(tmp_path / "net", network, params, inputs, samples=7)
    np.testing.assert_allclose(loaded(tmp_path / "net").call(inputs[:7]), network(params, inputs[:7]), rtol=1e-5)
    with pytest.raises(ValueError, match="shape"):
        loaded(tmp_path / "net").call(inputs[:6])


def test_a_network_that_knows_a_single_sample_is_refused(tmp_path):
    """JAX takes an unknown number for another one than 1, and says nothing."""
    network = lambda params, x: linear(params, x if x.shape[0] != 1 else 2 * x)  # noqa: E731
    with pytest.raises(ValueError, match=r"the program gives other outputs for 1 of them\. Give samples="):
        compact.export(tmp_path / "net", network, jnp.ones((5, 2)), examples.inputs())
    assert not list(tmp_path.iterdir())


def test_calls_back_to_python_are_refused(tmp_path):
    def called(params, x):
        return linear(params, jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x))

    def printed(params, x):
        jax.debug.print("{}", x.sum())
        return linear(params, x)

    for network in (called, printed):
        with pytest.raises(ValueError, match=r"the network (holds an operation that no|can't be exported)"):
            compact.export(tmp_path / "net", network, jnp.ones((5, 2)), examples.inputs(), platforms=["cpu"])
    assert not list(tmp_path.iterdir())


def test_what_else_is_refused(tmp_path, monkeypatch):
    params, inputs = jnp.ones((5, 2)), examples.inputs()
    with pytest.raises(ValueError, match="call this outside of jit"):
        jax.jit(lambda params: compact.export(tmp_path / "net", linear, params, inputs))(params)
    with pytest.raises(ValueError, match="hold no samples"):
        compact.export(tmp_path / "net", linear, params, inputs[:0])
    with pytest.raises(ValueError, match="samples is 0; it must be a whole number of at least 1"):
        compact.export(tmp_path / "net", linear, params, inputs, samples=0)
    with pytest.raises(ValueError, match="does not take inputs of shape"):
        compact.export(tmp_path / "net", linear, params, inputs[:, :3])
    for platforms in (("cpu", "toaster"), "cpu", ()):
        with pytest.raises(ValueError, match="it must be a list of some of 'cpu', 'cuda', 'rocm', 'tpu'"):
            compact.export(tmp_path / "net", linear, params, inputs, platforms=platforms)
    monkeypatch.setattr("ecjax.compact.exports._MOST_BYTES", 39)
    with pytest.raises(ValueError, match="the params take 40 bytes, and a program holds at most 39"):
        compact.export(tmp_path / "net", linear, params, inputs)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ecjax\[files\]'"):
        compact.export(tmp_path / "net", linear, params, inputs)


def test_a_full_disk_leaves_the_old_program(tmp_path, monkeypatch):
    path, params, inputs = tmp_path / "net", jnp.ones((5, 2)), examples.inputs()
    compact.export(path, linear, params, inputs)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        compact.export(path, linear, 2 * params, inputs)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["net"]


def test_the_docstring_shows_the_lines_that_load_it():
    assert "".join(LOAD.split()) in "".join(compact.export.__doc__.split())


@pytest.mark.slow
def test_programs_run_in_an_environment_with_jax_and_flatbuffers_alone(tmp_path):
    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", "empty")
    run("empty/bin/python", "-I", "-m", "pip", "install", "--quiet", f"jax=={jax.__version__}", "flatbuffers")
    assert "flax" not in run("empty/bin/python", "-I", "-m", "pip", "list").lower()
    mlp = eqx.nn.MLP(5, 3, width_size=7, depth=2, key=jax.random.key(0))
    cases = [(lambda mlp, x: jax.vmap(mlp)(x), mlp, examples.inputs())]
    cases += [without_half(*ARCHITECTURES[name]().example) for name in NAMES]
    for network, params, inputs in cases:
        compact.export(tmp_path / "pruned.jax", network, params, inputs)
        np.save(tmp_path / "inputs.npy", inputs)
        lines = "import numpy as np\ninputs = np.load('inputs.npy')" + LOAD + "np.save('outputs.npy', outputs)"
        run("empty/bin/python", "-I", "-c", lines)
        found = np.load(tmp_path / "outputs.npy")
        np.testing.assert_allclose(found, network(params, inputs), rtol=1e-4, atol=1e-5)
