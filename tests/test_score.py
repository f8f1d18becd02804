import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from ecjax import networks, prune, score
from tests import examples, jacobians

pytestmark = pytest.mark.usefixtures("float64")
ACTIVATIONS = {"tanh": jnp.tanh, "gelu": nn.gelu, "relu": nn.relu}
METRICS = ["euclidean", "fisher"]


def parts(scores):
    return scores.importance, scores.bias_shift


def assert_same_scores(found, expected, rtol=1e-9):
    """Relative to the largest of each kernel, and weight by weight."""
    for part, other in zip(parts(found), parts(expected), strict=True):
        for path, leaf in networks.by_path(part).items():
            reference = networks.by_path(other)[path]
            np.testing.assert_allclose(leaf, reference, rtol=rtol, atol=rtol * np.abs(reference).max() * 1e-3)


def reference(example, metric):
    found = jacobians.jacobians(example, metric)
    kernels = examples.kernels(example.params)
    both = {
        path: jacobians.elimination_compensation(found, path, kernel)
        for path, kernel in networks.by_path(kernels).items()
    }
    return score.Scores(*(networks.replace(kernels, {path: pair[i] for path, pair in both.items()}) for i in (0, 1)))


class TestEliminationCompensation:
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_moments_definition_and_jacobians_agree(self, activation, metric):
        example = examples.mlp(activation=ACTIVATIONS[activation])
        expected = reference(example, metric)
        assert_same_scores(score.elimination_compensation_by_definition(*example, metric=metric), expected)
        for batch_size in (1, 5, 23, 1024):
            found = score.elimination_compensation(*example, metric=metric, batch_size=batch_size)
            assert_same_scores(found, expected)

    @pytest.mark.parametrize("name", examples.DENSE_EXAMPLES)
    def test_networks_as_users_write_them(self, name):
        example = examples.DENSE_EXAMPLES[name]()
        found = score.elimination_compensation(*example, metric="fisher", batch_size=10)
        assert_same_scores(found, score.elimination_compensation_by_definition(*example, metric="fisher"))
        assert jax.tree.structure(found.importance) == jax.tree.structure(examples.kernels(example.params))

    def test_reverse_mode_is_enough(self):
        example = examples.reverse_mode_only()
        assert_same_scores(score.elimination_compensation(*example), reference(example, "euclidean"))

    @pytest.mark.parametrize("metric", METRICS)
    def test_definition_on_a_convolution(self, metric):
        example = examples.convolution()
        assert_same_scores(
            score.elimination_compensation_by_definition(*example, metric=metric), reference(example, metric)
        )

    def test_definition_in_chunks(self):
        example = examples.mlp()
        whole = score.elimination_compensation_by_definition(*example, weights_at_once=1000)
        assert_same_scores(score.elimination_compensation_by_definition(*example, weights_at_once=4), whole)

    def test_outputs_as_many_as_a_thousand(self):
        example = examples.mlp(widths=(4, 1000), samples=5)
        exact = score.elimination_compensation(*example)
        assert_same_scores(exact, score.elimination_compensation_by_definition(*example))

    def test_one_output_and_one_class(self):
        example = examples.mlp(widths=(6, 1))
        assert_same_scores(score.elimination_compensation(*example), reference(example, "euclidean"))
        with pytest.raises(ValueError, match="the softmax of one logit is 1 whatever it is"):
            score.elimination_compensation(*example, metric="fisher")

    def test_probes_agree_on_average(self):
        example = examples.mlp(widths=(6, 30), samples=40)
        exact = score.elimination_compensation(*example).importance["Dense_0"]["kernel"]
        many = score.elimination_compensation(*example, probes=4000, key=jax.random.key(0))
        np.testing.assert_allclose(many.importance["Dense_0"]["kernel"], exact, rtol=0.1)

    def test_dead_neurons_are_exactly_zero(self):
        example = examples.mlp(activation=nn.relu)
        dead = networks.replace(example.params, {"Dense_0/bias": example.params["Dense_0"]["bias"].at[2].set(-1e6)})
        for criterion in (score.elimination_compensation, score.elimination_compensation_by_definition):
            found = criterion(example.network, dead, example.inputs)
            for part in parts(found):
                np.testing.assert_array_equal(part["Dense_0"]["kernel"][:, 2], 0)
                assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(part))
            # What a dead neuron feeds on is constant, so its outgoing weights cost nothing either.
            np.testing.assert_array_equal(found.importance["Dense_1"]["kernel"][2], 0)

    @pytest.mark.parametrize("activation", ["relu", "tanh"])
    def test_float32_is_accurate_on_inputs_far_from_zero(self, activation):
        generator = np.random.default_rng(0)
        inputs = 1000 + generator.normal(size=(3000, 20))
        kernel = generator.normal(size=(20, 8)) / 5
        params = {
            "Dense_0": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(-inputs.mean(0) @ kernel)},
            "Dense_1": {"kernel": jnp.asarray(generator.normal(size=(8, 4))), "bias": jnp.zeros(4)},
        }
        network = networks.from_linen(networks.MLP((8, 4), ACTIVATIONS[activation]))
        single = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (params, inputs))
        double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), single)  # the same numbers
        expected = score.elimination_compensation(network, *double)
        with jax.enable_x64(False):
            found = score.elimination_compensation(network, *single)
            assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
        for part, other in zip(parts(found), parts(expected), strict=True):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.01), part, other)

    def test_bfloat16_compute_scores_in_float32(self):
        with jax.enable_x64(False):
            example = examples.of_module(networks.MLP((6, 3), jnp.tanh, dtype=jnp.bfloat16), examples.inputs())
            exact = networks.from_linen(networks.MLP((6, 3), jnp.tanh))
            found = score.elimination_compensation(*example)
            expected = score.elimination_compensation(exact, example.params, example.inputs)
        for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert leaf.dtype == jnp.float32
            np.testing.assert_allclose(leaf, other, rtol=0.2, atol=0.02 * np.abs(other).max())

    def test_under_jit_and_vmap_over_seeds(self):
        example = examples.mlp()
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.5 * leaf]), example.params)
        both = jax.jit(jax.vmap(lambda p: score.elimination_compensation(example.network, p, example.inputs)))(stacked)
        for seed in (0, 1):
            params = jax.tree.map(lambda leaf, seed=seed: leaf[seed], stacked)
            alone = score.elimination_compensation(example.network, params, example.inputs)
            assert_same_scores(jax.tree.map(lambda leaf, seed=seed: leaf[seed], both), alone, rtol=1e-8)


def linear_example(features, width, outputs, samples, seed):
    return examples.mlp((width, outputs), _identity, samples, features, seed)


def _identity(z):
    return z


class TestWhatTheMathematicsClaims:
    @given(shape=st.sampled_from([(1, 1, 1, 1), (3, 2, 4, 9), (5, 4, 1, 6), (2, 5, 3, 1)]), seed=st.integers(0, 99))
    def test_without_activations_the_importance_is_the_measured_change(self, shape, seed):
        example = linear_example(*shape, seed)
        scores = score.elimination_compensation(*example)
        before = example.network(example.params, example.inputs)
        generator = np.random.default_rng(seed)
        for path, importance in networks.by_path(scores.importance).items():
            index = tuple(generator.integers(size) for size in importance.shape)
            chosen = {p: jnp.ones(leaf.shape) for p, leaf in networks.by_path(scores.importance).items()}
            chosen[path] = chosen[path].at[index].set(0)  # the only one to go
            only = dataclasses.replace(scores, importance=networks.replace(scores.importance, chosen))
            weights = sum(leaf.size for leaf in jax.tree.leaves(scores.importance))
            after = example.network(prune.one_shot(example.params, only, 1 / weights).params, example.inputs)
            measured = jnp.mean(jnp.sum((after - before) ** 2, -1))
            scale = jnp.mean(jnp.sum(before**2, -1))
            np.testing.assert_allclose(importance[index], measured, rtol=1e-9, atol=1e-13 * (1 + scale))

    @given(constant=st.integers(1, 4), seed=st.integers(0, 99), offset=st.floats(-3, 3))
    def test_weights_on_constant_inputs_cost_nothing(self, constant, seed, offset):
        example = examples.mlp(activation=jnp.tanh, seed=seed)
        inputs = example.inputs.at[:, :constant].set(offset)
        scores = score.elimination_compensation(example.network, example.params, inputs)
        removed = jax.random.bernoulli(jax.random.key(seed), 0.7, (constant, 7))
        first = jnp.ones((5, 7)).at[:constant].set(jnp.where(removed, 0, 1))
        choice = networks.replace(jax.tree.map(jnp.ones_like, scores.importance), {"Dense_0/kernel": first})
        fraction = int(removed.sum()) / sum(leaf.size for leaf in jax.tree.leaves(choice))
        pruned = prune.one_shot(example.params, dataclasses.replace(scores, importance=choice), fraction)
        assert int((pruned.params["Dense_0"]["kernel"] == 0).sum()) == int(removed.sum())
        np.testing.assert_allclose(
            example.network(pruned.params, inputs), example.network(example.params, inputs), rtol=1e-9, atol=1e-10
        )

    @given(seed=st.integers(0, 99), metric=st.sampled_from(METRICS))
    def test_within_a_neuron_the_independent_shifts_add_up_to_the_joint_optimum(self, seed, metric):
        example = examples.mlp(seed=seed)
        found = jacobians.jacobians(example, metric)
        shifts = score.elimination_compensation(*example, metric=metric).bias_shift["Dense_1"]["kernel"]
        kernel = np.asarray(example.params["Dense_1"]["kernel"])
        chosen = np.random.default_rng(seed).random(kernel.shape) < 0.5
        for neuron in range(kernel.shape[1]):
            removed = kernel[:, neuron] * chosen[:, neuron]
            removal = np.einsum("nkj,j->nk", found.of("Dense_1/kernel")[..., neuron], removed)
            bias = found.of("Dense_1/bias")[..., neuron]
            joint = np.linalg.lstsq(bias.reshape(-1, 1), removal.ravel(), rcond=None)[0][0]
            np.testing.assert_allclose((shifts[:, neuron] * chosen[:, neuron]).sum(), joint, rtol=1e-8, atol=1e-10)

    @given(seed=st.integers(0, 99), offset=st.floats(-50, 50))
    def test_a_shift_of_the_inputs_that_the_bias_absorbs_changes_no_importance(self, seed, offset):
        example = examples.mlp(seed=seed)
        first = example.params["Dense_0"]
        moved = networks.replace(example.params, {"Dense_0/bias": first["bias"] - offset * first["kernel"].sum(0)})
        found = score.elimination_compensation(example.network, moved, example.inputs + offset)
        expected = score.elimination_compensation(*example)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found.importance, expected.importance)

    @given(seed=st.integers(0, 99))
    def test_compensation_never_costs_more_than_none(self, seed):
        example = examples.mlp(seed=seed)
        with_bias = score.elimination_compensation(*example).importance
        without = score.optimal_brain_damage(*example).importance
        jax.tree.map(lambda a, b: np.testing.assert_array_less(a, b * (1 + 1e-12) + 1e-30), with_bias, without)


class TestNonlinear:
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_importance_is_the_minimum_of_the_true_change(self, activation, metric):
        example = examples.mlp((4, 3), ACTIVATIONS[activation], samples=15)
        found = score.nonlinear_elimination_compensation(*example, metric=metric, steps=12)
        dense = np.asarray(example.network(example.params, example.inputs))
        factors = np.stack([jacobians.factor(y, metric) for y in dense])
        kernel, bias = (np.asarray(example.params["Dense_0"][name]) for name in ("kernel", "bias"))
        run = jax.jit(example.network)
        start = score.elimination_compensation(*example, metric=metric).bias_shift
        tolerance = 1.02 if activation == "relu" else 1 + 1e-6  # Newton steps may circle around a kink

        for index in ((0, 0), (2, 3), (4, 1)):
            removed = kernel.copy()
            removed[index] = 0

            def change(shift, removed=removed, neuron=index[1]):
                moved = bias + shift * np.eye(4)[neuron]
                params = networks.replace(example.params, {"Dense_0/kernel": removed, "Dense_0/bias": moved})
                delta = np.asarray(run(params, example.inputs)) - dense
                return np.mean(np.sum(np.einsum("nrk,nk->nr", factors, delta) ** 2, -1))

            importance, shift = (float(part["Dense_0"]["kernel"][index]) for part in parts(found))
            np.testing.assert_allclose(change(shift), importance, rtol=1e-9)
            assert importance <= change(start["Dense_0"]["kernel"][index]) * (1 + 1e-12)
            nearby = scipy.optimize.minimize(lambda s: change(s[0]), [shift], method="Nelder-Mead", tol=1e-12)
            assert importance <= nearby.fun * tolerance

    def test_equals_the_linear_criterion_on_a_linear_network(self):
        example = linear_example(4, 3, 2, 9, 0)
        assert_same_scores(
            score.nonlinear_elimination_compensation(*example), score.elimination_compensation(*example), rtol=1e-7
        )

    def test_keeps_a_dead_neuron_asleep(self):
        """Only one negative weight keeps this neuron dead, and the linear shift of 0 would wake it."""
        params = {
            "Dense_0": {"kernel": jnp.array([[-5.0], [1.0]]), "bias": jnp.zeros(1)},
            "Dense_1": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)},
        }
        network = networks.from_linen(networks.MLP((1, 1), nn.relu))
        inputs = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, (50, 2)))
        linear = score.elimination_compensation(network, params, inputs)
        found = score.nonlinear_elimination_compensation(network, params, inputs, steps=8)
        importance, shift = (part["Dense_0"]["kernel"][:, 0] for part in parts(found))
        np.testing.assert_array_equal(linear.bias_shift["Dense_0"]["kernel"], 0)
        assert shift[0] < -1
        assert importance[0] < 1e-3 < jnp.mean(inputs[:, 1] ** 2)
        np.testing.assert_array_equal(importance[1], 0)

    @pytest.mark.parametrize("name", ["residual", "fourier", "plain_jax"])
    def test_networks_as_users_write_them(self, name):
        example = examples.DENSE_EXAMPLES[name]()
        small = networks.replace(
            example.params,
            {path: 1e-4 * kernel for path, kernel in networks.by_path(examples.kernels(example.params)).items()},
        )
        found = score.nonlinear_elimination_compensation(example.network, small, example.inputs)
        linear = score.elimination_compensation(example.network, small, example.inputs)
        for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(linear), strict=True):
            np.testing.assert_allclose(leaf, other, rtol=1e-2, atol=1e-3 * np.abs(other).max())


class TestBaselines:
    @pytest.mark.parametrize("metric", METRICS)
    def test_optimal_brain_damage_by_jacobians(self, metric):
        example = examples.mlp()
        found = score.optimal_brain_damage(*example, metric=metric, batch_size=6)
        assert found.bias_shift is None
        expected = jacobians.jacobians(example, metric)
        for path, importance in networks.by_path(found.importance).items():
            kernel = networks.by_path(example.params)[path]
            np.testing.assert_allclose(importance, jacobians.optimal_brain_damage(expected, path, kernel), rtol=1e-9)

    def test_optimal_brain_damage_needs_no_biases(self):
        params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))}
        found = score.optimal_brain_damage(lambda p, x: x @ p["kernel"], params, examples.inputs())
        expected = params["kernel"] ** 2 * np.mean(examples.inputs() ** 2, axis=0)[:, None]
        np.testing.assert_allclose(found.importance["kernel"], expected, rtol=1e-12)

    def test_magnitude(self):
        example = examples.mlp()
        found = score.magnitude(*example)
        assert found.bias_shift is None
        assert jax.tree.structure(found.importance) == jax.tree.structure(examples.kernels(example.params))
        np.testing.assert_array_equal(
            found.importance["Dense_1"]["kernel"], np.abs(example.params["Dense_1"]["kernel"])
        )

    def test_gradient_magnitude_by_finite_differences(self):
        example = examples.mlp()
        labels = jnp.arange(23) % 3
        loss = optax.softmax_cross_entropy_with_integer_labels
        found = score.gradient_magnitude(*example, targets=labels, loss=loss).importance["Dense_1"]["kernel"]
        kernel = example.params["Dense_1"]["kernel"]

        def mean_loss(value):
            params = networks.replace(example.params, {"Dense_1/kernel": kernel.at[3, 2].set(value)})
            return loss(example.network(params, example.inputs), labels).mean()

        slope = (mean_loss(kernel[3, 2] + 1e-5) - mean_loss(kernel[3, 2] - 1e-5)) / 2e-5
        np.testing.assert_allclose(found[3, 2], abs(kernel[3, 2] * slope), rtol=1e-6)

    def test_random_depends_on_the_key_alone(self):
        example = examples.mlp()
        first, again = (score.random(*example, key=jax.random.key(1)).importance for _ in range(2))
        other = score.random(*example, key=jax.random.key(2)).importance
        jax.tree.map(np.testing.assert_array_equal, first, again)
        draws = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(first)])
        assert len(np.unique(draws)) == draws.size
        assert 0 <= draws.min() < 0.1 < 0.9 < draws.max() < 1
        assert not np.array_equal(first["Dense_0"]["kernel"], other["Dense_0"]["kernel"])
