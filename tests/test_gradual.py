import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecjax import networks, prune, score, train
from tests.test_train import blobs, cross_entropy

ADAM = optax.adam(1e-2)
HOW = {"optimizer": ADAM, "key": jax.random.key(0), "epochs": 4, "batch_size": 64}


def kept(masks):
    return sum(int(mask.sum()) for mask in jax.tree.leaves(masks))


def test_nothing_to_remove_is_training():
    example = blobs()
    found, expected = train.gradually(*example, cross_entropy, 0.0, **HOW), train.fit(*example, cross_entropy, **HOW)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found.params, expected.params)
    np.testing.assert_allclose(found.losses, expected.losses, atol=1e-6)
    assert prune.sparsity(found.masks) == 0
    again = train.gradually(*example, cross_entropy, 0.0, **HOW)
    jax.tree.map(np.testing.assert_array_equal, found, again)


def test_the_sparsity_grows_along_the_cubic_while_the_others_are_trained():
    network, params, inputs, labels = blobs()
    seen = []

    def watched(network, params, inputs):
        seen.append(networks.by_path(params))
        return score.magnitude(network, params, inputs)

    # 4 steps an epoch, 12 in all: weights go after the steps 3, 5, 7 and 9.
    options = HOW | {"epochs": 3, "stages": 4, "begin": 1 / 12, "end": 9 / 12}
    found = train.gradually(network, params, inputs, labels, cross_entropy, 0.9, criterion=watched, **options)
    weights = 5 * 8 + 8 * 3
    zeros = [sum(int((leaf == 0).sum()) for path, leaf in leaves.items() if "kernel" in path) for leaves in seen]
    assert zeros == [0] + [round(0.9 * (1 - (1 - number / 4) ** 3) * weights) for number in (1, 2, 3)]
    assert kept(found.masks) == weights - round(0.9 * weights)
    for before, after in zip(seen, [*seen[1:], networks.by_path(found.params)], strict=True):
        for path in before:
            assert ((after[path] != before[path]) | (before[path] == 0)).mean() > 0.9, path  # each of them moves on
            if "kernel" in path:
                assert not ((before[path] == 0) & (after[path] != 0)).any()


def test_trained_while_pruned_is_better_than_pruned_after():
    network, params, inputs, labels = blobs()
    trained = train.fit(network, params, inputs, labels, cross_entropy, **HOW | {"epochs": 20}).params
    gradual = train.gradually(network, trained, inputs, labels, cross_entropy, 0.85, **HOW | {"epochs": 20})
    one_shot = prune.one_shot(trained, score.magnitude(network, trained, inputs), 0.85)
    losses = [float(cross_entropy(network(p.params, inputs), labels).mean()) for p in (gradual, one_shot)]
    assert losses[0] < 0.5 * losses[1]
    for path, mask in networks.by_path(gradual.masks).items():
        np.testing.assert_array_equal(networks.by_path(gradual.params)[path] != 0, mask)


CRITERIA = {
    "by name": "elimination_compensation",
    "draws": "random",
    "options of its own": functools.partial(score.optimal_brain_damage, metric="fisher", probes=1),
    "labels": lambda network, params, inputs: score.gradient_magnitude(
        network, params, inputs, targets=blobs()[3], loss=cross_entropy
    ),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_any_criterion(name):
    found = train.gradually(*blobs(), cross_entropy, 0.5, criterion=CRITERIA[name], stages=2, **HOW)
    assert kept(found.masks) == 32


def test_a_criterion_may_see_fewer_inputs():
    network, params, inputs, labels = blobs()
    seen = []

    def watched(network, params, inputs):
        seen.append(inputs.shape)
        return score.magnitude(network, params, inputs)

    options = {"criterion": watched, "calibration": inputs[:7], "stages": 2}
    train.gradually(network, params, inputs, labels, cross_entropy, 0.5, **options, **HOW)
    assert seen == [(7, 5)] * 2


def test_what_is_excluded_keeps_every_bit_and_what_the_criterion_leaves_out_is_trained():
    network, params, inputs, labels = blobs()
    found = train.gradually(network, params, inputs, labels, cross_entropy, 0.5, exclude="Dense_1/*", **HOW)
    jax.tree.map(np.testing.assert_array_equal, found.params["Dense_1"], params["Dense_1"])
    assert found.masks["Dense_1"]["kernel"] is None
    assert kept(found.masks) == 20
    criterion = functools.partial(score.magnitude, exclude="Dense_1/*")
    found = train.gradually(network, params, inputs, labels, cross_entropy, 0.5, criterion=criterion, **HOW)
    assert (found.params["Dense_1"]["kernel"] != params["Dense_1"]["kernel"]).all()
    assert kept(found.masks) == 20


def test_stages_and_sparsities_compile_nothing_more(compilations):
    example = blobs()
    train.gradually(*example, cross_entropy, 0.5, stages=3, **HOW)
    before = compilations()
    train.gradually(*example, cross_entropy, 0.9, stages=9, end=1.0, **HOW | {"key": jax.random.key(1)})
    assert compilations() == before


def test_several_seeds_are_one_vmapped_call():
    network, params, inputs, labels = blobs()

    def one_seed(key):
        return train.gradually(network, params, inputs, labels, cross_entropy, 0.5, stages=2, **HOW | {"key": key})

    keys = jax.random.split(jax.random.key(5), 2)
    together = jax.jit(jax.vmap(one_seed))(keys)
    for seed, key in enumerate(keys):
        alone = one_seed(key)
        np.testing.assert_allclose(together.losses[seed], alone.losses, rtol=1e-4)
        jax.tree.map(lambda a, b, seed=seed: np.testing.assert_array_equal(a[seed], b), together.masks, alone.masks)


def test_a_module_that_is_its_own_params():
    _, _, inputs, labels = blobs()
    module = eqx.nn.MLP(5, 3, 8, 1, key=jax.random.key(0))
    found = train.gradually(_of_equinox, module, inputs, labels, cross_entropy, 0.5, stages=2, **HOW)
    assert kept(found.masks) == 32
    assert found.params.activation is module.activation
    assert found.losses[-1] < found.losses[0]


def _of_equinox(module, inputs):
    return jax.vmap(module)(inputs)


def test_a_sparsity_for_each_pattern_and_n_of_m():
    network, params, inputs, labels = blobs()
    seen = []
    given = network, params, inputs, labels, cross_entropy
    each = train.gradually(*given, {"Dense_0/*": 0.75}, stages=3, progress=seen.append, **HOW)
    assert each.masks["Dense_1"]["kernel"] is None
    assert prune.sparsity(each.masks) == 0.75
    assert [stage.sparsity["Dense_0/*"] for stage in seen][-1] == 0.75
    assert seen[-1].objective < seen[0].objective
    assert ((each.params["Dense_0"]["kernel"] != 0) == each.masks["Dense_0"]["kernel"]).all()
    pattern = train.gradually(*given, scope=(2, 4), stages=3, **HOW)
    assert (pattern.masks["Dense_1"]["kernel"].reshape(-1, 4, 3).sum(1) == 2).all()


BAD = {
    "sparsity": ({"sparsity": 50}, r"sparsity is 50; it must be in \[0, 1\]"),
    "begin": ({"begin": 0.8}, "begin is 0.8 and end is 0.75; they are fractions of the training steps"),
    "end": ({"end": 1.5}, "begin is 0.0 and end is 1.5"),
    "stages": ({"stages": 0}, "stages is 0; it must be a whole number of at least 1"),
    "epochs": ({"epochs": 1.5}, "epochs is 1.5"),
    "scope": ({"scope": (2, 4)}, r"scope \(2, 4\) says itself how many weights stay; leave the sparsity out"),
    "progress": ({"progress": 1.5}, "progress is 1.5; it must be True"),
    "criterion": ({"criterion": "size"}, "criterion is 'size'; it must be one of"),
    "scores": ({"criterion": score.neuron_norm}, "the criterion gave NeuronScores; score.Scores is needed here"),
    "targets": ({"targets": jnp.zeros(7, int)}, r"targets of shape \(7,\) do not match the 300 samples"),
    "exclude": ({"exclude": "head/*"}, "the pattern 'head/.*' matches no leaf"),
    "key": ({"key": 0}, "key is 0; it must be a random key"),
    "loss": ({"loss": lambda outputs, _: outputs.sum(-1) * jnp.nan}, "NaN or infinity, from the params"),
}


@pytest.mark.usefixtures("without_checked_types")
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    network, params, inputs, labels = blobs()
    given = HOW | {"inputs": inputs, "targets": labels, "loss": cross_entropy, "sparsity": 0.5, "stages": 1}
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        train.gradually(network, params, **given | change)
