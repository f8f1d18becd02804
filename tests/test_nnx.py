import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ecjax import compact, networks, prune, score
from tests import examples


class ListMLP(nnx.Module):
    """Layers in a list, with children that have state of their own between them."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 6, rngs=rngs)])
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.head = nnx.Sequential(nnx.relu, nnx.Dropout(0.5, rngs=rngs), nnx.Linear(6, 3, rngs=rngs))
        self.calls = nnx.Variable(jnp.zeros((), int))

    def __call__(self, inputs):
        self.calls[...] += 1
        hidden = inputs
        for layer in self.layers:
            hidden = nnx.relu(layer(hidden))
        return self.head(self.norm(hidden))


def values(module):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngKey))))


@functools.cache
def with_state():
    """A module in evaluation mode with statistics of its own, and its network."""
    module = ListMLP(nnx.Rngs(0))
    module.norm.mean[...] = jnp.linspace(-1, 1, 6)
    module.norm.var[...] = jnp.linspace(0.5, 2, 6)
    module.eval()
    return module, *networks.from_nnx(module)


@functools.cache
def plain():
    """A plain MLP, and its network."""
    rngs = nnx.Rngs(1)
    module = nnx.Sequential(nnx.Linear(5, 7, rngs=rngs), nnx.gelu, nnx.Linear(7, 6, rngs=rngs), nnx.gelu)
    module = nnx.Sequential(module, nnx.Linear(6, 3, rngs=rngs))
    return module, *networks.from_nnx(module)


def test_the_network_answers_as_the_module_does():
    module, network, params = with_state()
    inputs = examples.inputs()
    expected = nnx.clone(module)(inputs)
    np.testing.assert_allclose(network(params, inputs), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(network)(params, inputs), expected, rtol=1e-4, atol=1e-6)
    assert module.calls[...] == 0


def test_params_are_the_param_variables_by_attribute():
    module, _, params = with_state()
    np.testing.assert_array_equal(params["layers"][1]["kernel"], module.layers[1].kernel[...])
    np.testing.assert_array_equal(params["head"]["layers"][2]["bias"], module.head.layers[2].bias[...])
    assert set(networks.by_path(params)) == {
        "layers/0/kernel", "layers/0/bias", "layers/1/kernel", "layers/1/bias", "norm/scale", "norm/bias",
        "head/layers/2/kernel", "head/layers/2/bias",
    }  # fmt: skip


def test_scores_equal_those_of_the_same_network_in_linen():
    _, network, params = plain()
    linen = examples.mlp()
    layers = [params["layers"][0]["layers"][0], params["layers"][0]["layers"][2], params["layers"][1]]
    same = {f"Dense_{index}": layer for index, layer in enumerate(layers)}
    np.testing.assert_allclose(network(params, linen.inputs), linen.network(same, linen.inputs), rtol=1e-5, atol=1e-6)
    scores = score.elimination_compensation(network, params, linen.inputs)
    expected = score.elimination_compensation(linen.network, same, linen.inputs)
    for ours, theirs in ((scores.importance, expected.importance), (scores.bias_shift, expected.bias_shift)):
        for path, leaf in networks.by_path(theirs).items():
            index = ("layers/0/layers/0", "layers/0/layers/2", "layers/1")[int(path[6])]
            np.testing.assert_allclose(networks.by_path(ours)[f"{index}/kernel"], leaf, rtol=1e-4, atol=1e-7)


def test_a_pruned_module_answers_as_its_network_does_and_the_original_stays():
    module, network, params = with_state()
    before, inputs = values(module), examples.inputs()
    scores = score.elimination_compensation(network, params, inputs)
    pruned = prune.one_shot(params, scores, 0.6)
    assert scores.importance["layers"][0]["kernel"].shape == (5, 7)
    assert prune.sparsity(pruned.masks) == round(0.6 * 95) / 95

    smaller = networks.to_nnx(module, pruned.params)
    assert isinstance(smaller, ListMLP)
    np.testing.assert_array_equal(smaller.head.layers[2].kernel[...] != 0, pruned.masks["head"]["layers"][2]["kernel"])
    np.testing.assert_allclose(smaller(inputs), network(pruned.params, inputs), rtol=1e-6)
    np.testing.assert_array_equal(smaller.norm.mean[...], module.norm.mean[...])

    smaller.layers[0].bias[...] += 1
    smaller.norm.mean[...] += 1
    jax.tree.map(np.testing.assert_array_equal, values(module), before)


def test_stages_repair_what_a_module_loses():
    _, network, params = plain()
    inputs = examples.inputs()
    dense = network(params, inputs)
    pruned = prune.staged(network, params, inputs, 0.5, stages=3)
    once = prune.one_shot(params, score.magnitude(network, params, inputs), 0.5)
    lost = [float(jnp.mean((network(found.params, inputs) - dense) ** 2)) for found in (pruned, once)]
    assert lost[0] < lost[1] / 10


def test_a_compacted_or_loaded_network_becomes_a_module(tmp_path):
    module, network, params = plain()
    inputs = examples.inputs()
    masks = jax.tree.map(lambda kernel: jnp.ones(kernel.shape, bool), examples.kernels(params))
    masks["layers"][0]["layers"][0]["kernel"] = masks["layers"][0]["layers"][0]["kernel"].at[:, 2:5].set(False)
    pruned = prune.apply_masks(params, masks)
    smaller_network, smaller = compact.compact(network, pruned, inputs)
    compact.save(tmp_path / "pruned.safetensors", smaller, network=smaller_network, inputs=inputs)
    saved = compact.load(tmp_path / "pruned.safetensors", smaller_network, like=params)
    assert saved.widths == (4, 6, 3)
    for found in (smaller, saved.params):
        answer = networks.to_nnx(module, found)(inputs)
        np.testing.assert_allclose(answer, network(pruned, inputs), rtol=1e-4, atol=1e-6)


def test_seeds_are_one_vmapped_call():
    _, network, params = plain()
    inputs = examples.inputs()
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    scores = jax.vmap(lambda params: score.elimination_compensation(network, params, inputs))(stacked)
    expected = score.elimination_compensation(network, params, inputs)
    first = jax.tree.map(lambda leaf: leaf[0], scores)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), first, expected)


def test_what_the_module_is_trained_to_later_does_not_reach_the_network():
    module = nnx.clone(with_state()[0])
    network, params = networks.from_nnx(module)
    inputs = examples.inputs()
    before = network(params, inputs)
    module.norm.mean[...] += 1
    module.layers[0].kernel[...] *= 2
    module.train()
    np.testing.assert_array_equal(network(params, inputs), before)


@pytest.mark.parametrize(
    ("module", "path"),
    [
        (nnx.Sequential(nnx.Linear(5, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0))), "layers/1/mean"),
        (nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), nnx.Linear(5, 3, rngs=nnx.Rngs(0))), "layers/0/rngs/count"),
    ],
    ids=["batch statistics", "dropout"],
)
def test_a_module_in_training_mode_is_refused(module, path):
    network, params = networks.from_nnx(module)
    for call in (network, jax.jit(network)):
        with pytest.raises(ValueError, match=rf"'{path}'.*module\.eval\(\)"):
            call(params, examples.inputs())
    with pytest.raises(ValueError, match=path):
        score.elimination_compensation(network, params, examples.inputs())


def test_only_nnx_modules_are_taken():
    for wrong in (nn.Dense(3), jnp.tanh, {"kernel": jnp.ones((2, 2))}):
        with pytest.raises(ValueError, match=r"take a flax\.nnx\.Module, got .*networks\.from_linen"):
            networks.from_nnx(wrong)
        with pytest.raises(ValueError, match=r"take a flax\.nnx\.Module"):
            networks.to_nnx(wrong, {})


def test_params_of_another_module_are_refused():
    module, _, params = plain()
    with pytest.raises(ValueError, match="at 'layers/0/layers/0/bias': the module needs it"):
        networks.to_nnx(module, {})
    with pytest.raises(ValueError, match="at 'extra': the module has no such variable"):
        networks.to_nnx(module, params | {"extra": jnp.ones(2)})
