"""Every random network is scored as its per-sample Jacobians say, or refused for a reason that its making gives.

``ECJAX_RANDOM_NETWORKS=500 pytest tests/test_random_networks.py`` draws more of them, and
``python -m tests.test_random_networks 500`` prints how many ended which way.
"""

import collections
import os
import sys

import jax
import numpy as np
import pytest

from ecjax import score
from tests import jacobians, random_networks

pytestmark = pytest.mark.usefixtures("float64")
COUNT = int(os.environ.get("ECJAX_RANDOM_NETWORKS", "40"))
CHUNK = 10
LATER = [pytest.param(first, marks=pytest.mark.slow) for first in range(CHUNK, COUNT, CHUNK)]
PRECISION = 1e-9


@pytest.mark.parametrize("first", [0, *LATER])
def test_random_networks_are_scored_exactly_or_refused_by_name(first):
    for seed in range(first, min(first + CHUNK, COUNT)):
        outcome(seed)
    jax.clear_caches()  # no network is seen again


def test_both_outcomes_occur():
    cases = [random_networks.draw(seed) for seed in range(40)]
    refused = sum(bool(case.refused) for case in cases)
    assert 3 <= refused <= 20
    kernels = [kernel for case in cases if not case.refused for kernel in case.kernels.values()]
    assert sum(kernel.bias is None for kernel in kernels) > 10
    assert sum(kernel.bias is not None for kernel in kernels) > 30


def outcome(seed: int) -> str:
    """Checks one random network; returns "scored" or "refused"."""
    case = random_networks.draw(seed)
    told = f"seed {seed}: {case.description}"
    found, refusal = None, ""
    try:
        found = score.elimination_compensation(case.network, case.params, case.inputs, metric=case.metric)
    except ValueError as error:
        refusal = str(error)
    if found is None:
        assert case.refused, f"{told}: refused, though it can be scored: {refusal}"
        assert any(f"'{path}'" in refusal for path in case.refused), f"{told}: {refusal} names none of {case.refused}"
        return "refused"
    assert not case.refused, f"{told}: scored, though {sorted(case.refused)} can't be"
    importance, shift = _by_path(found.importance), _by_path(found.bias_shift)
    assert set(importance) == set(shift) == set(case.kernels), told
    assert jax.tree.structure(importance) == jax.tree.structure(shift)
    for path, (expected, size) in expected_scores(case).items():
        np.testing.assert_allclose(importance[path], expected.importance, PRECISION, PRECISION * size, err_msg=told)
        scale = PRECISION * np.abs(expected.shift).max(initial=0)
        np.testing.assert_allclose(shift[path], expected.shift, PRECISION, scale, err_msg=told)
    return "scored"


Expected = collections.namedtuple("Expected", ("importance", "shift"))


def expected_scores(case) -> dict[str, tuple[Expected, float]]:
    """Importance and shift of every kernel from per-sample Jacobians, and the largest importance without a shift."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(case.params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    values = [leaf for _, leaf in paths]
    wanted = {*case.kernels, *(kernel.bias for kernel in case.kernels.values())} - {None}
    moved = {name: leaf for name, leaf in zip(names, values, strict=True) if name in wanted}

    def of_one(x):
        def outputs(moved):
            leaves = [moved.get(name, leaf) for name, leaf in zip(names, values, strict=True)]
            return case.network(jax.tree_util.tree_unflatten(treedef, leaves), x[None])[0]

        return outputs(moved), jax.jacrev(outputs)(moved)

    outputs, leaves = jax.jit(jax.vmap(of_one))(case.inputs)
    factors = np.stack([jacobians.factor(np.asarray(output), case.metric) for output in outputs])
    found = jacobians.Jacobians({name: np.asarray(leaf) for name, leaf in leaves.items()}, factors)
    return {path: _expected(found, path, kernel, np.asarray(moved[path])) for path, kernel in case.kernels.items()}


def _expected(found, path, kernel, weights) -> tuple[Expected, float]:
    samples = len(found.factor)
    of_weights = found.of(path)
    without = weights**2 * np.sum(of_weights**2, (0, 1)) / samples
    if kernel.bias is None:
        return Expected(without, np.zeros(weights.shape)), without.max(initial=0)
    of_bias = found.of(kernel.bias)
    of_bias = of_bias.reshape(*of_bias.shape[:2], -1)[..., kernel.beside]
    squares, products = np.sum(of_bias**2, (0, 1)), np.sum(of_bias * of_weights, (0, 1))
    shift = weights * np.divide(products, squares, out=np.zeros(weights.shape), where=squares > 0)
    left = np.sum((of_weights * weights - of_bias * shift) ** 2, (0, 1)) / samples
    return Expected(left, shift), without.max(initial=0)


def _by_path(kernels) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(kernels)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


if __name__ == "__main__":
    with jax.enable_x64(True):
        random_networks.count_outcomes(outcome, *map(int, sys.argv[1:]))
