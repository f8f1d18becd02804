import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecjax import networks, prune, score
from tests import examples


def removed(masks):
    return sum(int((~np.asarray(mask)).sum()) for mask in jax.tree.leaves(masks))


def random_scores(example, seed=0, levels=None):
    """Random importances, or only so many different ones, so that many are equal."""
    generator = np.random.default_rng(seed)

    def draw(leaf):
        values = generator.random(leaf.shape) if levels is None else generator.integers(levels, size=leaf.shape)
        return jnp.asarray(values, jnp.float32)

    layers = networks.layers(*example)
    return score.Scores(jax.tree.map(draw, examples.kernels(example.params)), layers=layers)


@given(sparsity=st.floats(0, 1), seed=st.integers(0, 99), levels=st.sampled_from([None, 1, 2]))
def test_exact_counts_in_every_scope(sparsity, seed, levels):
    example = examples.mlp()
    scores = random_scores(example, seed, levels)
    network = prune.one_shot(example.params, scores, sparsity)
    assert removed(network.masks) == round(sparsity * (35 + 42 + 18))
    layer = prune.one_shot(example.params, scores, sparsity, scope="layer")
    assert [removed(mask) for mask in jax.tree.leaves(layer.masks)] == [round(sparsity * n) for n in (35, 42, 18)]
    neuron = prune.one_shot(example.params, scores, sparsity, scope="neuron")
    for mask in jax.tree.leaves(neuron.masks):
        np.testing.assert_array_equal((~np.asarray(mask)).sum(0), round(sparsity * mask.shape[0]))


@given(sparsity=st.floats(0, 1), seed=st.integers(0, 99), scope=st.sampled_from(prune.SCOPES))
def test_the_least_important_go(sparsity, seed, scope):
    example = examples.mlp()
    scores = random_scores(example, seed)
    masks = prune.one_shot(example.params, scores, sparsity, scope=scope).masks
    both = map(jax.tree.leaves, (scores.importance, masks))
    pairs = [(np.asarray(i), np.asarray(m)) for i, m in zip(*both, strict=True)]
    if scope == "network":
        groups = [tuple(np.concatenate([part.ravel() for part in parts]) for parts in zip(*pairs, strict=True))]
    elif scope == "layer":
        groups = [(i.ravel(), m.ravel()) for i, m in pairs]
    else:
        groups = [(i[:, neuron], m[:, neuron]) for i, m in pairs for neuron in range(i.shape[1])]
    for importance, kept in groups:
        if kept.any() and not kept.all():
            assert importance[~kept].max() < importance[kept].min()


def test_ties_go_by_position():
    params = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.ones((2, 2))}}
    masks = prune.one_shot(params, score.Scores(params), 0.4).masks
    np.testing.assert_array_equal(masks["a"]["kernel"], [[False] * 3, [False, True, True]])
    assert masks["b"]["kernel"].all()


def test_removed_weights_are_zero_and_the_rest_is_untouched():
    example = examples.mlp()
    before = jax.tree.map(np.array, example.params)
    pruned = prune.one_shot(example.params, random_scores(example), 0.6)
    for path, mask in networks.by_path(pruned.masks).items():
        kernel, old = networks.by_path(pruned.params)[path], networks.by_path(before)[path]
        np.testing.assert_array_equal(kernel, np.where(mask, old, 0))
        assert kernel.dtype == old.dtype
        bias = examples.bias_path(path)
        np.testing.assert_array_equal(networks.by_path(pruned.params)[bias], networks.by_path(before)[bias])
    jax.tree.map(np.testing.assert_array_equal, example.params, before)  # nothing happened in place


def test_shifts_of_removed_weights_are_added_to_their_biases():
    example = examples.mlp()
    scores = score.elimination_compensation(*example)
    pruned = prune.one_shot(example.params, scores, 0.5)
    for path, mask in networks.by_path(pruned.masks).items():
        shift = networks.by_path(scores.bias_shift)[path]
        bias = examples.bias_path(path)
        expected = networks.by_path(example.params)[bias] + np.where(mask, 0, shift).sum(0)
        np.testing.assert_allclose(networks.by_path(pruned.params)[bias], expected, rtol=1e-5, atol=1e-6)


def test_all_and_nothing():
    example = examples.mlp()
    scores = score.elimination_compensation(*example)
    nothing = prune.one_shot(example.params, scores, 0)
    jax.tree.map(np.testing.assert_array_equal, nothing.params, example.params)
    assert prune.sparsity(nothing.masks) == 0.0
    everything = prune.one_shot(example.params, scores, 1)
    assert prune.sparsity(everything.masks) == 1.0
    outputs = example.network(everything.params, example.inputs)
    assert np.isfinite(outputs).all()
    np.testing.assert_allclose(outputs, jnp.broadcast_to(outputs[0], outputs.shape))  # a constant is left


@pytest.mark.slow
def test_a_convolution_prunes_by_definition():
    example = examples.convolution()
    scores = score.elimination_compensation_by_definition(*example)
    for scope in prune.SCOPES:
        pruned = prune.one_shot(example.params, scores, 0.5, scope=scope)
        assert prune.sparsity(pruned.masks) == 0.5
        assert np.isfinite(example.network(pruned.params, example.inputs)).all()


def test_under_jit_and_vmap_with_a_traced_sparsity():
    example = examples.mlp()
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), example.params)
    scores = jax.vmap(lambda p: score.elimination_compensation(example.network, p, example.inputs))(stacked)
    both = jax.jit(jax.vmap(prune.one_shot, in_axes=(0, 0, None)))(stacked, scores, jnp.float32(0.37))
    for seed in (0, 1):
        one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], (stacked, scores))
        alone = prune.one_shot(*one, 0.37)
        jax.tree.map(lambda a, b, s=seed: np.testing.assert_array_equal(a[s], b), both.masks, alone.masks)


def test_masks_of_a_plain_dict_fit_frozen_params():
    example, plain = examples.frozen(), examples.mlp()
    pruned = prune.one_shot(example.params, score.magnitude(*plain), 0.5)
    assert isinstance(pruned.params, type(example.params))
    assert prune.sparsity(pruned.masks) == pytest.approx(0.5, abs=0.01)


def test_apply_masks_is_idempotent():
    example = examples.mlp()
    pruned = prune.one_shot(example.params, random_scores(example), 0.5)
    jax.tree.map(np.testing.assert_array_equal, prune.apply_masks(pruned.params, pruned.masks), pruned.params)


def test_sparsity_counts_over_all_kernels():
    masks = {"a": {"kernel": jnp.array([[True, False]])}, "b": {"kernel": jnp.zeros((3, 2), bool)}}
    assert prune.sparsity(masks) == 7 / 8
    assert isinstance(prune.sparsity(masks), float)
    assert prune.sparsity({}) == 0.0
