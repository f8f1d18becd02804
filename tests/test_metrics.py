"""A metric's factor, product and distance are of one matrix M, for the library's own and for a user's."""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecjax import metrics, moments, networks, prune, repair, score
from tests import examples

pytestmark = pytest.mark.usefixtures("float64")


class Weighted(NamedTuple):
    """``Σ_k w_k δ_k²``."""

    weights: jax.Array

    def factor(self, _outputs, coefficients):
        return jnp.sqrt(self.weights) * coefficients

    def product(self, _outputs, change):
        return self.weights * change

    def distance(self, outputs, targets):
        return (self.weights * (outputs - targets) ** 2).sum(-1) / 2


METRICS = {
    "euclidean": lambda: metrics.Euclidean(),
    "fisher": lambda: metrics.Fisher(),
    "fisher, hot": lambda: metrics.Fisher(2.5),
    "weighted": lambda: Weighted(jnp.array([3.0, 0.0, 0.5])),
}


def matrix(metric, outputs):
    """M of one row of outputs, by the metric's product."""
    columns = jnp.broadcast_to(outputs, (len(outputs), len(outputs)))
    return np.asarray(metric.product(columns, jnp.eye(len(outputs))))


@pytest.mark.parametrize("name", METRICS)
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_factor_product_and_distance_are_of_one_matrix(name, outputs):
    metric, outputs = METRICS[name](), jnp.asarray(outputs)
    rows = metric.factor(jnp.broadcast_to(outputs, (3, 3)), jnp.eye(3))
    np.testing.assert_allclose(rows.T @ rows, matrix(metric, outputs), rtol=1e-9, atol=1e-12)
    at = lambda y: metric.distance(y[None], outputs[None])[0]  # noqa: E731
    np.testing.assert_allclose(jax.hessian(at)(outputs), matrix(metric, outputs), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(at(outputs), 0, atol=1e-12)
    np.testing.assert_allclose(jax.grad(at)(outputs), 0, atol=1e-12)
    change = jnp.array([[1.0, -2.0, 0.3]])
    squared = metrics.squared_norm(metric, outputs[None], change)
    np.testing.assert_allclose(squared, change @ matrix(metric, outputs) @ change[0], rtol=1e-9, atol=1e-12)


def test_fisher_by_its_definition():
    outputs, temperature = jnp.array([0.3, -1.0, 2.0]), 1.7
    p = np.exp(np.asarray(outputs) / temperature)
    p /= p.sum()
    expected = (np.diag(p) - np.outer(p, p)) / temperature**2
    np.testing.assert_allclose(matrix(metrics.Fisher(temperature), outputs), expected, rtol=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_scores_in_any_metric_are_those_of_the_definition(name):
    example, metric = examples.mlp(), METRICS[name]()
    found = score.elimination_compensation(*example, metric=metric)
    expected = score.elimination_compensation_by_definition(*example, metric=metric)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), found, expected)
    exact = score.nonlinear_elimination_compensation(*example, metric=metric)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(exact))


@pytest.mark.slow
def test_many_weights_and_samples_at_once_agree_with_few():
    """In float32, where a sum over the outputs was compiled wrongly for more than 16,384 weights × samples."""
    network, params, inputs = examples.mlp(widths=(20, 2), samples=300)
    params, inputs = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, inputs))
    found = score.elimination_compensation(network, params, inputs, metric="fisher").importance
    many, few = (
        score.elimination_compensation_by_definition(network, params, inputs, metric="fisher", weights_at_once=n)
        for n in (64, 1)
    )
    for importance in (many.importance, few.importance):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), importance, found)


@pytest.mark.slow
def test_equal_weights_are_euclidean_all_the_way():
    example, ones = examples.mlp(samples=60), Weighted(jnp.ones(3))
    found, expected = (
        prune.staged(*example, 0.5, stages=2, metric=metric, repair=how).params
        for metric, how in ((ones, repair.Survivors()), ("euclidean", "survivors"))
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9), found, expected)


def test_another_temperature_compiles_nothing_anew(compilations):
    example = examples.mlp()
    masks = prune.one_shot(example.params, score.magnitude(*example), 0.5).masks
    targets = example.network(example.params, example.inputs)

    def run(temperature):
        metric = metrics.Fisher(temperature)
        scores = score.elimination_compensation(*example, metric=metric)
        moved = repair.Survivors(metric=metric)(example.network, example.params, masks, example.inputs, targets)
        return jax.tree.leaves((scores, moved))

    first, before = run(1.0), compilations()
    second = run(3.0)
    assert compilations() == before
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_inside_a_jit_that_closes_over_everything(kind):
    network, params, inputs = examples.mlp()

    def of_sparsity(sparsity):
        scores = score.elimination_compensation(network, params, kind(inputs), metric="fisher")
        return prune.one_shot(params, scores, sparsity).masks["Dense_0"]["kernel"]

    np.testing.assert_array_equal(jax.jit(of_sparsity)(0.5), of_sparsity(0.5))


def test_names_are_the_defaults():
    example = examples.mlp()
    for name, metric in metrics.METRICS.items():
        jax.tree.map(
            np.testing.assert_array_equal,
            score.elimination_compensation(*example, metric=name),
            score.elimination_compensation(*example, metric=metric),
        )


CRITERIA = {
    "elimination_compensation": score.elimination_compensation,
    "by_definition": score.elimination_compensation_by_definition,
    "nonlinear": score.nonlinear_elimination_compensation,
    "optimal_brain_damage": score.optimal_brain_damage,
    "neurons": score.neuron_elimination_compensation,
    "neurons_by_definition": score.neuron_elimination_compensation_by_definition,
    "moments": moments.of_inputs,
    "of_batches": lambda n, p, x, **options: moments.of_batches(n, p, [x], **options),
    "staged": lambda n, p, x, **options: prune.staged(n, p, x, 0.5, stages=1, **options),
    "repaired": lambda n, p, x, metric: repair.Biases(metric=metric)(
        n, p, prune.one_shot(p, score.magnitude(n, p, x), 0.5).masks, x, n(p, x)
    ),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_the_softmax_of_one_logit_is_refused(name):
    example = examples.mlp(widths=(4, 1))
    with pytest.raises(ValueError, match="the softmax of one logit is 1 whatever it is"):
        CRITERIA[name](*example, metric="fisher")


@pytest.mark.parametrize("name", CRITERIA)
def test_a_network_that_ends_in_softmax_is_refused(name):
    network, params, inputs = examples.mlp()
    with pytest.raises(ValueError, match="takes logits, and the network ends in a softmax"):
        CRITERIA[name](lambda p, x: nn.softmax(network(p, x)), params, inputs, metric=metrics.Fisher(2.0))
    if name == "elimination_compensation":
        CRITERIA[name](lambda p, x: nn.log_softmax(network(p, x)), params, inputs, metric="fisher")


@dataclasses.dataclass(frozen=True)
class Unregistered(metrics.Euclidean):
    """Not a pytree: jit would not take it."""


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (3, "metric is 3; it must be one of 'euclidean', 'fisher', or a metric such as"),
        (metrics.Euclidean, "metric is Euclidean, a class; call it"),
        (metrics.Fisher(0.0), "temperature is 0.0; it must be above 0"),
        (metrics.Fisher(jnp.inf), "temperature is inf; it must be above 0, and finite"),
        (metrics.Fisher(None), "temperature is None; it must be one number above 0"),
        (metrics.Fisher(jnp.ones(3)), r"temperature is Array\(\[1., 1., 1.\].*; it must be one number above 0"),
        (metrics.Fisher(1e-30), "the metric Fisher sees no change in the outputs of this network"),
        (Unregistered(), "no pytree of numbers; make it a NamedTuple"),
        (repair.Survivors(), r"metric is Survivors\("),
    ],
)
def test_what_is_no_metric(metric, message):
    with pytest.raises(ValueError, match=message):
        score.elimination_compensation(*examples.mlp(), metric=metric)


class Alike(Weighted):
    """Weights where their roots belong."""

    def factor(self, _outputs, coefficients):
        return self.weights * coefficients


class Mean(Weighted):
    """One distance for all samples."""

    def distance(self, outputs, targets):
        return (self.weights * (outputs - targets) ** 2).mean()


class Doubled(Weighted):
    """Without the half."""

    def distance(self, outputs, targets):
        return (self.weights * (outputs - targets) ** 2).sum(-1)


class Negative(Weighted):
    """The wrong way round."""

    def distance(self, outputs, targets):
        return -super().distance(outputs, targets)


class Absolute(Weighted):
    """Without a second derivative."""

    def distance(self, outputs, targets):
        return (self.weights * jnp.abs(outputs - targets)).sum(-1)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (Doubled(jnp.ones(3)), "distance and product of Doubled do not belong together: .* for product w δ it is ½ w"),
        (Negative(jnp.ones(3)), "distance and product of Negative do not belong together"),
        (Absolute(jnp.ones(3)), "distance and product of Absolute do not belong together"),
        (Weighted(jnp.zeros(3)), "the metric Weighted sees no change in the outputs of this network: its product is 0"),
        (Weighted(jnp.ones((23, 3))), r"Weighted.factor does not take outputs of shape \(24, 3\)"),
        (Alike(jnp.array([3.0, 1.0, 2.0])), "factor and product of .* do not belong together"),
        (Mean(jnp.ones(3)), r"distance gives shape \(\) for outputs of shape \(24, 3\); it must give \(24,\)"),
        (Weighted(jnp.ones(4)), r"factor does not take outputs of shape \(24, 3\)"),
        (Weighted(jnp.ones((5, 1, 3))), r"factor gives shape \(5, 24, 3\) for outputs"),
    ],
)
def test_metrics_of_ones_own_that_do_not_fit(metric, message):
    with pytest.raises(ValueError, match=message):
        score.elimination_compensation(*examples.mlp(), metric=metric)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_a_temperature_of_another_dtype_changes_no_dtype(dtype):
    network, params, inputs = examples.mlp()
    params, inputs = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, inputs))
    for temperature in (2.0, jnp.float32(2.0)):
        metric = metrics.Fisher(temperature)
        found = score.elimination_compensation(network, params, inputs, metric=metric)
        masks = prune.one_shot(params, found, 0.5).masks
        moved = repair.Survivors(metric=metric)(network, params, masks, inputs, network(params, inputs))
        assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype(dtype)}


def test_linen_collections_and_arguments_of_the_call():
    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            hidden = nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(hidden)))

    with pytest.raises(ValueError, match=r"from_linen takes a flax.linen.Module, got type; for Flax NNX there is"):
        networks.from_linen(Normalised)
    module, inputs = Normalised(), examples.mlp().inputs
    variables = module.init(jax.random.key(0), inputs, train=False)
    network = networks.from_linen(module, variables=variables, train=False)
    expected = module.apply(variables, inputs, train=False)
    np.testing.assert_array_equal(network(variables["params"], inputs), expected)
    assert len(networks.layers(network, variables["params"], inputs)) == 2
    for options in ({"train": False}, {"variables": variables, "train": True}):
        bad = networks.from_linen(module, **options)
        with pytest.raises(ValueError, match=r"Normalised can't be called as a pure function .*evaluation mode"):
            bad(variables["params"], inputs)
        with pytest.raises(ValueError, match="Normalised can't be called as a pure function"):
            score.elimination_compensation(bad, variables["params"], inputs)


def entropies(logits, temperature):
    """``H(softmax(y / T))`` of each row, in NumPy."""
    scaled = np.asarray(logits, np.float64) / temperature
    p = np.exp(scaled - scaled.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


@given(
    outputs=st.integers(2, 20),
    positions=st.sampled_from([(), (3,), (2, 2)]),
    scale=st.floats(-3, 5),
    entropy=st.floats(0.01, 0.99),
    least=st.sampled_from([1, 2.0, 5.0]),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_temperature_by_its_definition(outputs, positions, scale, entropy, least, weighted, seed):
    generator = np.random.default_rng(seed)
    logits = np.exp(scale) * generator.normal(size=(7, *positions, outputs))
    weights = generator.random(logits.shape[:-1] if seed % 2 else 7) if weighted else None
    found = float(metrics.temperature(logits, weights, entropy=entropy, least=least))
    each = np.ones(7) if weights is None else weights
    each = np.broadcast_to(each.reshape(each.shape + (1,) * (logits.ndim - 1 - each.ndim)), logits.shape[:-1])
    said, wanted = (np.average(entropies(logits, T), weights=each) for T in (found, found / 1.001))
    assert found >= least
    assert said >= entropy * np.log(outputs) * (1 - 1e-9)
    assert found == least or wanted < entropy * np.log(outputs)


def test_the_temperature_of_what_is_masked():
    """Minus infinity and its like do not count: labels say all that they can, and padded words change nothing."""
    labels = jnp.log(jax.nn.one_hot(jnp.arange(5), 5))
    assert float(metrics.temperature(labels)) == 1
    logits = 9 * jax.random.normal(jax.random.key(0), (40, 6))
    alone = float(metrics.temperature(logits))
    assert alone > 2
    for value in (-jnp.inf, -1e30, -1e9):
        padded = jnp.concatenate([logits, jnp.full((40, 50), value)], 1)
        np.testing.assert_allclose(float(metrics.temperature(padded)), alone, rtol=1e-4)
    assert float(metrics.temperature(jnp.zeros((3, 1)))) == 1
    assert float(metrics.temperature(logits, jnp.zeros(40))) == 1


def test_the_temperature_may_be_traced_and_of_few_bits():
    logits = 9 * jax.random.normal(jax.random.key(0), (3, 40, 6))
    each = [float(metrics.temperature(some)) for some in logits]
    np.testing.assert_allclose(jax.jit(jax.vmap(metrics.temperature))(logits), each, rtol=1e-6)
    found = metrics.temperature(logits[0].astype(jnp.bfloat16))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(float(found), each[0], rtol=1e-2)


@pytest.mark.parametrize(
    ("outputs", "options", "message"),
    [
        (np.zeros((2, 3)), {"entropy": 1}, "entropy is 1; it must be between 0 and 1"),
        (np.zeros((2, 3)), {"entropy": 0.0}, "entropy is 0.0; it must be between 0 and 1"),
        (np.zeros((2, 3)), {"least": 0}, "least is 0; it must be above 0"),
        (np.full((2, 3), np.nan), {}, "NaN or infinity"),
        (np.full((2, 4), 0.25), {}, "probabilities; give logits"),
    ],
)
def test_what_has_no_temperature(outputs, options, message):
    with pytest.raises(ValueError, match=message):
        metrics.temperature(outputs, **options)
