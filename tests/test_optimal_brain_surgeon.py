"""One weight after another goes, and all that is left makes up for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecjax import metrics, networks, prune, score
from ecjax.score import surgeon
from tests import examples

pytestmark = pytest.mark.usefixtures("float64")
DAMPING = 0.02


def curvature(network, params, inputs, metric, weights, places):
    """``E[JᵀMJ] + λ`` of these entries, from the whole Jacobian of each sample."""
    leaves = networks.by_path(params)

    def outputs_of(flat):
        parts = jnp.split(flat, np.cumsum([len(where) for where in places.values()])[:-1])
        moved = {
            path: jnp.ravel(leaves[path]).at[where].set(part).reshape(leaves[path].shape)
            for part, (path, where) in zip(parts, places.items(), strict=True)
        }
        return network(networks.replace(params, moved), inputs)

    flat = jnp.concatenate([jnp.ravel(leaves[path])[where] for path, where in places.items()])
    outputs, jacobian = outputs_of(flat), jax.jacobian(outputs_of)(flat)
    change = jnp.moveaxis(jacobian, -1, 0)  # of the outputs, for each entry
    after = jax.vmap(functools.partial(metric.product, outputs))(change)
    weighted = after if weights is None else after * np.reshape(weights, (-1, *(1,) * (outputs.ndim - 1)))
    found = np.reshape(change, (len(flat), -1)) @ np.reshape(weighted, (len(flat), -1)).T / len(inputs)
    return np.asarray(flat), found + DAMPING * np.mean(np.diag(found)) * np.eye(len(flat))


def risen(weights, matrix, gone):
    """For each row of ``gone``, the least of ``½ δᵀHδ`` where what is gone is at zero, by a dense solve."""
    change = np.where(gone, -weights, 0.0)
    system = np.where(gone[:, :, None] | gone[:, None, :], np.eye(len(weights)), matrix)
    change = np.linalg.solve(system, np.where(gone, change, -change @ matrix)[..., None])[..., 0]
    return np.einsum("ci,ij,cj->c", change, matrix, change) / 2


def expected(network, params, inputs, metric, weights=None):
    """By path, what the quadratic has risen to when each weight goes: greedily, each time from solves of its own."""
    leaves, layers = networks.by_path(params), networks.layers(network, params, inputs)
    kernels = {layer.kernel: np.flatnonzero(leaves[layer.kernel]) for layer in layers}
    biases = {layer.bias: np.arange(leaves[layer.bias].size) for layer in layers if layer.bias is not None}
    values, matrix = curvature(network, params, inputs, metric, weights, kernels | biases)
    count = sum(map(len, kernels.values()))
    importance, gone = np.zeros(count), np.zeros(len(values), bool)
    for _ in range((count + 1) // 2):
        costs = np.where(gone, np.inf, risen(values, matrix, gone | np.eye(len(values), dtype=bool)))[:count]
        goes = np.argmin(costs)
        importance[goes], gone[goes] = costs[goes], True
    costs = risen(values, matrix, gone | np.eye(len(values), dtype=bool))[:count]
    importance = np.where(gone[:count], importance, costs)
    parts = np.split(importance, np.cumsum([len(where) for where in kernels.values()])[:-1])
    found = {}
    for part, (path, where) in zip(parts, kernels.items(), strict=True):
        found[path] = np.zeros(leaves[path].size)
        found[path][where] = part
    return found


def with_zeros(params, seed, share=0.25):
    generator = np.random.default_rng(seed)

    def fewer(leaf):  # as many in each kernel for all seeds, so that they share what is compiled
        gone = generator.permutation(leaf.size) < share * leaf.size
        return jnp.where(gone.reshape(leaf.shape), 0, leaf) if leaf.ndim > 1 else leaf

    return jax.tree.map(fewer, params)


@given(seed=st.integers(0, 99), fisher=st.booleans(), weighted=st.booleans())
def test_importances_by_their_definition(seed, fisher, weighted):
    network, dense, inputs = examples.mlp(widths=(3, 2), features=3, samples=19, seed=seed)
    params = with_zeros(dense, seed)
    metric = metrics.Fisher(2.0) if fisher else metrics.Euclidean()
    weights = np.random.default_rng(seed).random(len(inputs)) if weighted else None
    how = {"metric": metric, "weights": weights, "damping": DAMPING, "batch_size": 8}
    found = networks.by_path(score.optimal_brain_surgeon(network, params, inputs, **how).importance)
    for path, importance in expected(network, params, inputs, metric, weights).items():
        np.testing.assert_allclose(np.ravel(found[path]), importance, rtol=1e-8, atol=1e-14)


def test_a_block_of_columns_and_the_next(monkeypatch):
    """More eliminations than a block has columns, and weights without biases."""
    monkeypatch.setattr(surgeon, "_BLOCK", 9)
    network = lambda params, x: jnp.tanh(x @ params[0]) @ params[1]  # noqa: E731
    generator = np.random.default_rng(3)
    params = [jnp.asarray(generator.normal(size=shape)) for shape in ((5, 6), (6, 3))]
    params = with_zeros(params, 3)
    inputs = examples.inputs(40, 5)
    found = score.optimal_brain_surgeon(network, params, inputs, damping=DAMPING).importance
    for path, importance in expected(network, params, inputs, metrics.Euclidean()).items():
        np.testing.assert_allclose(np.ravel(networks.by_path(found)[path]), importance, rtol=1e-7, atol=1e-14)


def test_a_kernel_that_is_used_at_many_positions():
    def network(params, x):
        hidden = jnp.tanh(x @ params["first"] + params["shift"])
        return hidden @ params["second"]

    generator = np.random.default_rng(0)
    shapes = {"first": (3, 4), "shift": (4,), "second": (4, 2)}
    params = {name: jnp.asarray(generator.normal(size=shape)) for name, shape in shapes.items()}
    inputs = jnp.asarray(generator.normal(size=(11, 5, 3)))
    found = score.optimal_brain_surgeon(network, params, inputs, metric="fisher", damping=DAMPING).importance
    for path, importance in expected(network, params, inputs, metrics.Fisher()).items():
        np.testing.assert_allclose(np.ravel(found[path]), importance, rtol=1e-8, atol=1e-14)


def test_one_output_makes_every_probe_exact():
    network, params, inputs = examples.mlp(widths=(5, 1))
    exact = score.optimal_brain_surgeon(network, params, inputs)
    drawn = score.optimal_brain_surgeon(network, params, inputs, probes=1, key=jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), exact.importance, drawn.importance)


def test_some_of_the_samples_are_those_alone():
    network, params, inputs = examples.mlp(samples=24)
    few = score.optimal_brain_surgeon(network, params, inputs, samples=8)
    alone = score.optimal_brain_surgeon(network, params, inputs[::3])
    jax.tree.map(np.testing.assert_array_equal, few, alone)
    most = score.optimal_brain_surgeon(network, params, inputs, samples=16)  # of the end as of the beginning
    alone = score.optimal_brain_surgeon(network, params, inputs[np.arange(16) * 24 // 16])
    jax.tree.map(np.testing.assert_array_equal, most, alone)


def test_some_of_the_samples_are_among_those_that_count():
    """Every second one is padding, as would be all that are evenly spaced."""
    network, params, inputs = examples.mlp(samples=24)
    weights = jnp.arange(24) % 2.0
    few = score.optimal_brain_surgeon(network, params, inputs, weights=weights, samples=6).importance
    alone = score.optimal_brain_surgeon(network, params, inputs[1::4]).importance
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / 2, rtol=1e-9), few, alone)


@pytest.mark.slow
def test_float32_orders_as_float64_does():
    network, params, inputs = examples.mlp(widths=(8, 6, 3), samples=200)
    fine = score.optimal_brain_surgeon(network, params, inputs, metric="fisher")
    with jax.enable_x64(False):
        single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, inputs))
        rough = score.optimal_brain_surgeon(network, *single, metric="fisher")
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rough.importance))
    masks = [prune.one_shot(params, scores, 0.5).masks for scores in (rough, fine)]
    same = [np.mean(np.asarray(a == b)) for a, b in zip(*map(jax.tree.leaves, masks), strict=True)]
    assert min(same) > 0.95


def test_a_network_without_curvature_goes_by_squares():
    network = lambda params, x: 0 * (x @ params["kernel"])  # noqa: E731
    params = {"kernel": jnp.array([[3.0, -1.0], [2.0, 0.0]])}
    found = score.optimal_brain_surgeon(network, params, jnp.ones((4, 2))).importance["kernel"]
    assert np.argsort(np.ravel(found)).tolist() == [3, 1, 2, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0}, "damping is 0; it must be above 0"),
        ({"samples": 0}, "samples is 0; it must be a whole number of at least 1"),
        ({"probes": 1}, "probes=1 draws random signs: give it a key"),
        ({"key": jax.random.key(0)}, "key is for probes="),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        score.optimal_brain_surgeon(*examples.mlp(), **options)


def test_too_many_weights_are_refused_by_their_number(monkeypatch):
    network, params, inputs = examples.mlp(widths=(7, 6, 3))
    monkeypatch.setattr(surgeon, "MOST", 100)
    with pytest.raises(ValueError, match=r"111 weights and biases are left, .* at most 100\. Remove more with another"):
        score.optimal_brain_surgeon(network, params, inputs)


def test_weights_that_cannot_be_counted():
    network, params, inputs = examples.mlp()
    with pytest.raises(ValueError, match="optimal_brain_surgeon counts the weights that are left, which can't be seen"):
        jax.jit(lambda given: score.optimal_brain_surgeon(network, given, inputs).importance)(params)
