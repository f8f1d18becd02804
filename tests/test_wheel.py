"""The package as others install it: a wheel, in an environment with nothing but what it needs."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
USE = """
import pathlib
import jax
from ecjax import compact, devices, metrics, moments, networks, prune, repair, score, staged, surgeon, train
import ecjax.repair.gauss_newton

assert "site-packages" in ecjax.__file__, ecjax.__file__
assert (pathlib.Path(ecjax.__file__).parent / "py.typed").exists()
mlp = networks.MLP(features=(8, 2))
inputs = jax.random.normal(jax.random.key(0), (20, 4))
network, params = networks.from_linen(mlp), mlp.init(jax.random.key(1), inputs)["params"]
pruned = prune.staged(network, params, inputs, 0.5, stages=2, metric="fisher")
assert prune.sparsity(pruned.masks) == 0.5
try:
    compact.save("pruned", pruned.params)
except ModuleNotFoundError as error:
    assert "pip install 'ecjax[files]'" in str(error)
else:
    raise AssertionError("safetensors is no core dependency")
"""


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment(tmp_path):
    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    source = tmp_path / "source"  # a build leaves files behind, which later ones take up
    shutil.copytree(ROOT / "ecjax", source / "ecjax")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source)
    run(sys.executable, "-m", "venv", "empty")
    (wheel,) = tmp_path.glob("*.whl")
    run("empty/bin/python", "-m", "pip", "install", "--quiet", wheel)
    run("empty/bin/python", "-c", USE)
