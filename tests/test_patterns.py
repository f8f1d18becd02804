"""A sparsity for each pattern of paths."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecjax import networks, prune, score
from tests import examples

KERNELS = ("Dense_0/kernel", "Dense_1/kernel", "Dense_2/kernel")  # of 35, 42 and 18 weights


@pytest.fixture(scope="module")
def example():
    return examples.mlp()


@pytest.fixture(scope="module")
def scores(example):
    return score.elimination_compensation(*example)


def removed(masks):
    return {path: int((~np.asarray(mask)).sum()) for path, mask in networks.by_path(masks).items()}


def test_the_weights_of_a_pattern_compete_with_each_other(example, scores):
    masks = prune.one_shot(example.params, scores, {"Dense_0/*": 0.8, "*": 0.5}).masks
    assert removed(masks)["Dense_0/kernel"] == round(0.8 * 35)
    only = jax.tree.map(lambda _: None, scores.importance)
    others = networks.by_path(scores.importance)
    others = {"Dense_1": {"kernel": others[KERNELS[1]]}, "Dense_2": {"kernel": others[KERNELS[2]]}}
    alone = prune.one_shot(example.params, score.Scores(only | others), 0.5).masks
    for path, mask in networks.by_path(alone).items():
        np.testing.assert_array_equal(networks.by_path(masks)[path], mask)


def test_the_first_pattern_counts_and_kernels_without_one_stay_dense(example, scores):
    for each, expected in (
        ({"Dense_1/kernel": 0.5, "Dense_[12]/*": 1.0}, {"Dense_1/kernel": 21, "Dense_2/kernel": 18}),
        ({"Dense_2/*": 0.5}, {"Dense_2/kernel": 9}),
        ({"*": 0.5}, removed(prune.one_shot(example.params, scores, 0.5).masks)),
    ):
        pruned = prune.one_shot(example.params, scores, each)
        assert removed(pruned.masks) == expected
        dense = set(KERNELS) - set(expected)
        for path in dense:
            leaves = (networks.by_path(params)[path] for params in (pruned.params, example.params))
            np.testing.assert_array_equal(*leaves)
    assert prune.sparsity(prune.one_shot(example.params, scores, {"Dense_2/*": 0.5}).masks) == 0.5


def test_in_stages_each_pattern_follows_the_schedule(example):
    told = []
    each = {"Dense_0/*": 0.8, "Dense_1/*": 0.5}
    pruned = prune.staged(*example, each, stages=2, repair="biases", progress=told.append)
    assert removed(pruned.masks) == {"Dense_0/kernel": 28, "Dense_1/kernel": 21}
    assert told[0].sparsity == {"Dense_0/*": 0.8 * 0.875, "Dense_1/*": 0.5 * 0.875}
    np.testing.assert_array_equal(pruned.params["Dense_2"]["kernel"], example.params["Dense_2"]["kernel"])


def test_neurons(example):
    pruned = prune.staged_neurons(*example, {"Dense_1/*": 0.5}, stages=2, repair=None)
    masks = networks.by_path(pruned.masks)
    assert np.asarray(masks["Dense_0/kernel"]).all()
    assert int(np.asarray(masks["Dense_1/kernel"]).any(0).sum()) == 3
    with pytest.raises(
        ValueError, match=r"'Dense_2/\*' of the fraction gets no group.* Dense_0/kernel, Dense_1/kernel$"
    ):
        prune.staged_neurons(*example, {"Dense_2/*": 0.5}, stages=2, repair=None)


@pytest.mark.usefixtures("without_checked_types")
@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ({}, "sparsity is {}; give it a number for each pattern"),
        ({"*": 1.5}, r"sparsity is 1.5; it must be in \[0, 1\]"),
        ({3: 0.5}, "sparsity of 3; it must be of a pattern of paths"),
        ({"*": 0.5, "Dense_0/*": 0.8}, r"the pattern 'Dense_0/\*' of the sparsity gets no kernel: it matches none, or"),
        ({"head/*": 0.5}, "The kernels that may be pruned are Dense_0/kernel, Dense_1/kernel, Dense_2/kernel"),
    ],
)
def test_what_is_refused(example, scores, sparsity, message):
    with pytest.raises(ValueError, match=message):
        prune.one_shot(example.params, scores, sparsity)


def test_a_dict_that_jit_has_sorted(example, scores):
    one_shot = jax.jit(functools.partial(prune.one_shot, example.params, scores))
    each = {"Dense_0/*": jnp.float32(0.8), "*": jnp.float32(0.5)}
    with pytest.raises(
        ValueError, match=r"a dict that goes through jit loses its order; give a collections.OrderedDict"
    ):
        one_shot(each)
    expected = prune.one_shot(example.params, scores, each).masks
    jax.tree.map(np.testing.assert_array_equal, one_shot(collections.OrderedDict(each)).masks, expected)
