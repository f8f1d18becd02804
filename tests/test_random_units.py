"""Random networks lose random units: the rest computes what the network does whose params are zero there.

``ECJAX_RANDOM_NETWORKS=500 pytest tests/test_random_units.py`` draws more of them, and
``python -m tests.test_random_units 500`` prints how many lost units.
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecjax import _trees, compact, graph, networks, prune
from tests import random_networks

pytestmark = pytest.mark.usefixtures("float64")
COUNT = int(os.environ.get("ECJAX_RANDOM_NETWORKS", "40"))
CHUNK = 5
LATER = [pytest.param(first, marks=pytest.mark.slow) for first in range(CHUNK, COUNT, CHUNK)]
PRECISION = 1e-11


@pytest.mark.parametrize("first", [0, *LATER])
def test_random_networks_without_random_units(first):
    outcomes = [outcome(seed) for seed in range(first, min(first + CHUNK, COUNT))]
    assert first or outcomes.count("smaller") >= CHUNK // 2
    jax.clear_caches()  # no network is seen again


def test_a_flat_kernel_loses_all_units():
    """Of a kernel that is one axis nothing is left then, which tells not whether inputs or neurons have gone."""
    assert outcome(294) == "smaller"


def outcome(seed: int) -> str:
    """Checks one random network; returns "smaller", or "whole" where no unit can go."""
    case = random_networks.draw(seed)
    told = f"seed {seed}: {case.description}"
    groups = networks.groups(case.network, case.params, case.inputs)
    random = np.random.default_rng([seed, 1])
    removed = {
        index: np.flatnonzero(random.random(group.length) < 0.5) for index, group in enumerate(groups) if group.free
    }
    if not any(units.size for units in removed.values()):
        return "whole"
    if seed % 2 == 0:
        assert_pruned(case, groups, told)
    zeros = graph.zeroed(case.params, groups, removed)
    expected = case.network(zeros, case.inputs)
    precision = {"rtol": PRECISION, "atol": PRECISION * float(np.abs(expected).max(initial=1)), "err_msg": told}
    smaller, small = graph.without_units(case.network, case.params, groups, removed)
    np.testing.assert_allclose(smaller(small, case.inputs), expected, **precision)
    np.testing.assert_allclose(smaller(small, case.inputs[:2]), expected[:2], **precision)
    if seed % 3 == 0:  # what is zero is found again
        compacted, least = compact.compact(case.network, zeros, case.inputs)
        np.testing.assert_allclose(compacted(least, case.inputs), expected, **precision)
        for path, leaf in _trees.by_path(_trees.arrays(small)).items():
            found = _trees.by_path(least)[path].shape
            assert all(a <= b for a, b in zip(found, leaf.shape, strict=True)), f"{told}: {path} {found} {leaf.shape}"
    return "smaller"


def assert_pruned(case, groups, told):
    """Units that score low go, with what is theirs in every leaf; what compaction leaves is no more than the rest."""
    if all(group.length == 1 for group in groups.named.values()):
        return
    inputs = jnp.concatenate([case.inputs + 0.1 * i for i in range(12)])
    criterion = "neuron_norm" if case.refused else None
    pruned = prune.neurons(case.network, case.params, inputs, 0.5, criterion=criterion)
    smaller, small = compact.compact(case.network, pruned.params, inputs)
    expected = case.network(pruned.params, inputs)
    scale = float(np.abs(expected).max(initial=1))
    np.testing.assert_allclose(smaller(small, inputs), expected, rtol=PRECISION, atol=PRECISION * scale, err_msg=told)
    gone = graph.gone.gone(groups.named, _trees.by_path(_trees.arrays(pruned.params)), _trees.by_path(pruned.masks))
    removed = {index: np.flatnonzero(gone[name]) for name, index in zip(groups.named, _free(groups), strict=True)}
    before = graph.without_units(case.network, case.params, groups, removed)[1]
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(_trees.arrays(tree))) for tree in (small, before, case.params)]
    assert sizes[0] <= sizes[1] < sizes[2], f"{told}: {sizes}"


def _free(groups):
    return [index for index, group in enumerate(groups) if group.free]


if __name__ == "__main__":
    with jax.enable_x64(True):
        random_networks.count_outcomes(outcome, *map(int, sys.argv[1:]))
