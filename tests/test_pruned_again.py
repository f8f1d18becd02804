"""Pruning what is pruned already: what was removed stays removed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecjax import networks, prune, repair, score, staged, train
from tests import examples


def removed(masks):
    return np.concatenate([~np.asarray(mask).ravel() for mask in jax.tree.leaves(masks)])


def zeros(params):
    return np.concatenate([np.asarray(leaf).ravel() == 0 for leaf in jax.tree.leaves(examples.kernels(params))])


def with_dead_neurons():
    """A network in which many weights have importance 0 without being 0."""
    example = examples.mlp((12, 6, 3), jax.nn.relu)
    params = dict(example.params)
    params["Dense_0"] = params["Dense_0"] | {"bias": params["Dense_0"]["bias"].at[:5].set(-100.0)}
    return example._replace(params=params)


def test_masks_grow():
    network, params, inputs = with_dead_neurons()
    pruned = prune.one_shot(params, score.magnitude(network, params, inputs), 0.3)
    scores = score.elimination_compensation(network, pruned.params, inputs)
    anew, further = (prune.one_shot(pruned.params, scores, 0.6, masks=masks) for masks in (None, pruned.masks))
    assert (removed(pruned.masks) & ~removed(anew.masks)).any()  # the test sees what it looks for
    assert not (removed(pruned.masks) & ~removed(further.masks)).any()
    assert removed(further.masks).sum() == removed(anew.masks).sum() == round(0.6 * removed(anew.masks).size)
    with pytest.raises(ValueError, match="weights that are removed would come back"):
        prune.one_shot(pruned.params, scores, 0.2, masks=pruned.masks)
    with pytest.raises(ValueError, match="masks are boolean"):
        prune.one_shot(pruned.params, scores, 0.6, masks=examples.kernels(params))


@pytest.mark.slow
def test_weights_and_then_units():
    """Both ways to remove units leave masks that hold what was removed before, and repairs do not fill it again."""
    network, params, inputs = examples.mlp((12, 8, 3))
    sparse = prune.one_shot(params, score.magnitude(network, params, inputs), 0.5)
    dense = network(params, inputs)
    fewer = prune.neurons(network, sparse.params, inputs, 0.4, masks=sparse.masks)
    moved = repair.Survivors(iterations=2)(network, fewer.params, fewer.masks, inputs, dense)
    in_stages = prune.staged_neurons(network, sparse.params, inputs, 0.4, stages=2, masks=sparse.masks)
    filled = prune.staged_neurons(network, sparse.params, inputs, 0.4, stages=2)
    for found in (fewer.params, moved, in_stages.params):
        assert zeros(found)[removed(sparse.masks)].all()
    for masks in (fewer.masks, in_stages.masks):
        assert removed(masks)[removed(sparse.masks)].all()
        assert (~masks["Dense_0"]["kernel"]).all(0).sum() + (~masks["Dense_1"]["kernel"]).all(0).sum() >= 8
    assert not zeros(filled.params)[removed(sparse.masks)].all()


def test_stages_that_begin_with_masks():
    network, params, inputs = examples.mlp()
    sparse = prune.one_shot(params, score.magnitude(network, params, inputs), 0.5)
    state = staged.start(network, params, inputs, repair="survivors", masks=sparse.masks)  # of dense params
    assert (removed(state.masks) == removed(sparse.masks)).all()
    state = staged.step(network, state, inputs, 0.7)
    assert (removed(sparse.masks) <= removed(state.masks)).all()
    assert zeros(state.params)[removed(sparse.masks)].all()
    with pytest.raises(ValueError, match="masks say what stays of 'Dense_2/kernel', which is excluded"):
        staged.start(network, params, inputs, masks=sparse.masks, exclude="Dense_2/*")


def test_biases_are_shifted_once():
    """Also where the scores are still those of the dense params."""
    network, params, inputs = examples.mlp(widths=(8, 7, 3))
    scores = score.elimination_compensation(network, params, inputs)
    first = prune.one_shot(params, scores, 0.5)
    second = prune.one_shot(first.params, scores, 0.7, masks=first.masks)
    at_once = prune.one_shot(params, scores, 0.7)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), second, at_once)


@pytest.mark.parametrize("wanted", [0.8, {"Dense_0/*": 0.9, "*": 0.75}])
def test_a_pruned_network_is_pruned_further_in_stages(wanted):
    """Towards labels, which would let weights come back; and along the cubic from where the masks are."""
    network, params, inputs = examples.mlp(widths=(8, 7, 3))
    sparse = prune.one_shot(params, score.magnitude(network, params, inputs), 0.7)
    targets, reached = -2 * network(params, inputs), []
    options = {"stages": 3, "targets": targets, "progress": lambda stage: reached.append(stage.sparsity)}
    assert zeros(sparse.params)[removed(sparse.masks)].all()
    anew = prune.staged(network, sparse.params, inputs, wanted, **options)
    assert (removed(sparse.masks) & ~removed(anew.masks)).any()  # the test sees what it looks for
    reached.clear()
    further = prune.staged(network, sparse.params, inputs, wanted, masks=sparse.masks, **options)
    assert not (removed(sparse.masks) & ~removed(further.masks)).any()
    assert zeros(further.params)[removed(further.masks)].all()
    if wanted == 0.8:
        assert removed(further.masks).sum() == round(0.8 * removed(further.masks).size)
        begun = removed(sparse.masks).mean()
        np.testing.assert_allclose(reached, [begun + (0.8 - begun) * (1 - (1 - t / 3) ** 3) for t in (1, 2, 3)])
    with pytest.raises(ValueError, match="would come back"):
        prune.staged(network, sparse.params, inputs, 0.5, stages=2, masks=sparse.masks)


def test_params_are_no_masks():
    params = examples.mlp().params
    with pytest.raises(ValueError, match="masks are boolean"):
        train.keep_pruned(params)
    masks = jax.tree.map(lambda leaf: leaf > 0, examples.kernels(params))
    assert isinstance(train.keep_pruned(masks), optax.GradientTransformation)


@pytest.mark.parametrize("length", [3, 200])
def test_a_key_does_for_any_number_of_positions(length):
    """One probe is taken of many rows, all rows of few; the call is the same."""

    def network(params, x):
        return jnp.tanh(x[..., None] @ params["hidden"]) @ params["last"]

    params = {
        "hidden": jax.random.normal(jax.random.key(0), (1, 4)),
        "last": jax.random.normal(jax.random.key(1), (4, 2)),
    }
    inputs, key = jax.random.normal(jax.random.key(2), (6, length)), jax.random.key(3)
    assert [layer.kernel for layer in networks.layers(network, params, inputs)] == ["hidden", "last"]
    assert prune.sparsity(prune.staged(network, params, inputs, 0.5, stages=1, key=key).masks) == 0.5
    prune.neurons(network, params, inputs, 0.5, key=key)
