"""What ecjax/RECIPES.md says is run, and removed weights are zero after each recipe."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecjax import networks, prune, train

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "ecjax" / "RECIPES.md").read_text()
SECTIONS = dict(section.split("\n", 1) for section in PAGE.removeprefix("# ").split("\n## "))


def blocks(title):
    return re.findall(r"^```python\n(.*?)^```$", SECTIONS[title], re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def given():
    """What the first block of the page defines."""
    names = {}
    (code,) = blocks("Recipes")
    exec(compile(code, "RECIPES.md", "exec"), names)
    return names


def run(title, given):
    """The names after the blocks of one recipe."""
    names = dict(given)
    for code in blocks(title):
        exec(compile(code, "RECIPES.md", "exec"), names)
    return names


def require_kept(params, pruned):
    """Removed weights are exactly zero, and the others have moved."""
    weights = networks.by_path(params)
    for path, mask in networks.by_path(pruned.masks).items():
        np.testing.assert_array_equal(np.asarray(weights[path])[~np.asarray(mask)], 0)
        before = np.asarray(networks.by_path(pruned.params)[path])
        assert (np.asarray(weights[path]) != before)[np.asarray(mask)].mean() > 0.5


def test_every_recipe_is_among_those_below():
    assert list(SECTIONS) == [
        "Recipes",
        "Flax's TrainState",
        "A loop of optax: schedules, weight decay, gradient accumulation",
        "An exponential moving average of the params",
        "Masks that grow, and units after weights",
        "Saving, restoring and going on with Orbax",
        "A staged run that is stopped, and goes on",
        "Training between the stages",
        "Dropout keys and auxiliary outputs",
        "Haiku",
        "Batch statistics of an NNX module",
        "A compact network somewhere else",
    ]


def test_train_state(given):
    found = run("Flax's TrainState", given)
    require_kept(found["state"].params, given["pruned"])
    assert found["state"].step == 8


def test_a_loop_of_optax(given):
    found = run("A loop of optax: schedules, weight decay, gradient accumulation", given)
    require_kept(found["tuned"], given["pruned"])
    assert found["optimizer_state"].gradient_step == 4


def test_averages(given):
    found = run("An exponential moving average of the params", given)
    for name in ("tuned", "average", "from_dense"):
        require_kept(found[name], given["pruned"])


def test_masks_that_grow(given):
    found = run("Masks that grow, and units after weights", given)
    require_kept(found["grown"].params, given["pruned"]._replace(masks=found["grown"].masks))
    assert prune.sparsity(found["grown"].masks) == pytest.approx(0.8, abs=0.01)
    for path, mask in networks.by_path(found["fewer"].masks).items():
        assert (mask <= networks.by_path(found["grown"].masks)[path]).all()
        assert not networks.by_path(found["fewer"].params)[path][~mask].any()


def test_orbax(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run("Saving, restoring and going on with Orbax", given)
    jax.tree.map(np.testing.assert_array_equal, found["found"]["masks"], given["pruned"].masks)
    assert jax.tree.structure(found["found"]["masks"]) == jax.tree.structure(given["pruned"].masks)
    require_kept(found["tuned"], given["pruned"])
    again, state = given["pruned"].params, found["optimizer"].init(given["pruned"].params)
    for batch in given["batches"]:
        updates, state = found["optimizer"].update(jax.grad(given["mean_loss"])(again, *batch), state, again)
        again = optax.apply_updates(again, updates)
    jax.tree.map(np.testing.assert_array_equal, found["tuned"], again)


@pytest.mark.slow
def test_orbax_in_another_process_with_other_devices(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("Saving, restoring and going on with Orbax", given)
    code = (
        "import orbax.checkpoint as ocp, pathlib, jax; from ecjax import prune\n"
        "with ocp.StandardCheckpointer() as checkpointer:\n"
        "    found = checkpointer.restore(pathlib.Path('checkpoint/network').absolute())\n"
        "print(jax.device_count(), prune.summary(found['params'], found['masks']).total.sparsity)"
    )
    here = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **here)
    assert done.stdout.split() == ["1", str(prune.sparsity(given["pruned"].masks))], done.stderr


STOPPED = "A staged run that is stopped, and goes on"
PROCESS = """
import os, signal, sys
import jax.flatten_util
import numpy as np
import orbax.checkpoint as ocp
from pathlib import Path
from ecjax import staged
exec(sys.argv[2])
step, done = staged.step, []
def step_or_die(*given, **options):
    if len(done) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(1)
    return step(*given, **options)
staged.step = step_or_die
exec(sys.argv[3])
print(jax.device_count(), len(done))
np.save("params", jax.flatten_util.ravel_pytree(in_stages.params)[0])
"""


def in_process(folder, *, killed_after=-1, devices=1):
    """A process that runs the recipe and leaves its params in a file; or is killed after so many stages."""
    flags = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-c", PROCESS, str(killed_after), *blocks("Recipes"), *blocks(STOPPED)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=os.environ | flags)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_a_killed_staged_run_goes_on(given, devices, tmp_path):
    killed = in_process(tmp_path, killed_after=3)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = {path.name for path in (tmp_path / "stages").iterdir() if path.name.isdigit()}
    assert kept == {"1", "2", "3"}
    again = in_process(tmp_path, devices=devices)
    assert again.stdout.split() == [str(devices), "1"], again.stderr
    whole = prune.staged(given["network"], given["params"], given["inputs"], 0.8, stages=4, metric="fisher")
    found, expected = np.load(tmp_path / "params.npy"), jax.flatten_util.ravel_pytree(whole.params)[0]
    if devices == 1:
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_dropout_and_auxiliary_outputs(given):
    require_kept(run("Dropout keys and auxiliary outputs", given)["tuned"], given["pruned"])


def test_dropout_that_is_left_on_is_refused(given):
    module = given["module"]
    on = lambda params, inputs: module.apply(  # noqa: E731
        {"params": params}, inputs, train=True, rngs={"dropout": jax.random.key(0)}
    )
    with pytest.raises(ValueError, match="Dropout belongs in evaluation mode"):
        prune.staged(lambda *given: on(*given)[0], given["params"], given["inputs"], 0.5)


@pytest.mark.slow
def test_haiku(given):
    found = run("Haiku", given)
    assert prune.sparsity(found["haiku_pruned"].masks) == 0.5
    masks = networks.by_path(found["haiku_pruned"].masks)
    assert list(masks) == ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]


INSIDE = {
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "weight decay": optax.adamw(1e-2, weight_decay=0.5),
    "decay after": optax.chain(optax.adam(1e-2), optax.add_decayed_weights(-0.1)),
    "noise": optax.chain(optax.sgd(1e-2), optax.add_noise(0.1, 0.5, 0)),
}
AROUND = {
    "nothing": lambda inner: inner,
    "accumulation": lambda inner: optax.MultiSteps(inner, every_k_schedule=2).gradient_transformation(),
    "finite": lambda inner: optax.apply_if_finite(inner, max_consecutive_errors=3),
    "lookahead of hyperparameters": lambda inner: optax.inject_hyperparams(lambda rate: inner)(rate=0.1),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("inside", INSIDE)
def test_zeros_stay_zero_in_any_chain(given, inside, around):
    pruned = given["pruned"]
    optimizer = AROUND[around](optax.chain(INSIDE[inside], train.keep_pruned(pruned.masks)))

    def update(carry, batch):
        params, state = carry
        updates, state = optimizer.update(jax.grad(given["mean_loss"])(params, *batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    inputs, labels = map(jnp.stack, zip(*given["batches"], strict=True))
    (tuned, _), _ = jax.jit(lambda carry: jax.lax.scan(update, carry, (inputs, labels)))(
        (pruned.params, optimizer.init(pruned.params))
    )
    require_kept(tuned, pruned)


def test_training_between_the_stages(given):
    found = run("Training between the stages", given)
    assert prune.sparsity(found["between"].masks) == pytest.approx(0.8, abs=0.01)
    require_kept(found["between"].params, prune.Pruned(given["params"], found["between"].masks))


def test_batch_statistics_of_nnx(given):
    found = run("Batch statistics of an NNX module", given)
    first = networks.by_path(found["nnx_pruned"].params)["layers/0/kernel"]
    hidden = np.asarray(given["inputs"] @ first + found["anew"].layers[0].bias[...])
    norm = found["anew"].layers[1]
    np.testing.assert_allclose(norm.mean[...], hidden.reshape(8, 32, -1).mean((0, 1)), atol=0.05)
    np.testing.assert_allclose(norm.var[...], hidden.reshape(8, 32, -1).var(1).mean(0), rtol=0.2, atol=1e-3)
    outputs = found["nnx_network"](found["nnx_params"], given["inputs"])
    np.testing.assert_allclose(outputs, found["anew"](given["inputs"]), rtol=1e-6)
    assert not jnp.allclose(outputs, found["normalized"](given["inputs"]), atol=1e-3)


def test_a_compact_network_somewhere_else(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run("A compact network somewhere else", given)
    expected = given["network"](found["removed"].params, given["inputs"])
    np.testing.assert_allclose(found["answers"], expected, atol=1e-5)
    np.testing.assert_allclose(found["program"].call(given["inputs"]), expected, atol=1e-5)
    assert found["small"]["Dense_0"]["kernel"].shape == (8, 16)
