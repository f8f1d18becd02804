"""What every function that takes a network refuses, leaves alone, and gives back as it was."""

import functools
import inspect
import itertools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecjax import devices, moments, networks, prune, repair, score, surgeon, train
from ecjax.graph.layers import as_patterns
from tests import examples

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def labels(x):
    return jnp.arange(len(x)) % 3


def masks_of(network, params, x):
    return prune.one_shot(params, score.magnitude(network, params, x), 0.5).masks


TAKE_SAMPLES = {
    "elimination_compensation": score.elimination_compensation,
    "by_definition": score.elimination_compensation_by_definition,
    "nonlinear": score.nonlinear_elimination_compensation,
    "optimal_brain_damage": score.optimal_brain_damage,
    "gradient_magnitude": lambda n, p, x: score.gradient_magnitude(n, p, x, targets=labels(x), loss=cross_entropy),
    "neurons": score.neuron_elimination_compensation,
    "neuron_variance": score.neuron_variance,
    "moments": moments.of_inputs,
    "of_batches": lambda n, p, x: moments.of_batches(n, p, [x, x]),
    "loss_gradients": lambda n, p, x: surgeon.loss_gradients(n, p, x, labels(x), cross_entropy),
    "sparse_gpt": lambda n, p, x: surgeon.sparse_gpt(n, p, x, 0.5),
    "biases": lambda n, p, x: repair.Biases()(n, p, masks_of(n, p, x), x, n(p, x)),
    "survivors": lambda n, p, x: repair.Survivors()(n, p, masks_of(n, p, x), x, n(p, x)),
    "staged": lambda n, p, x: prune.staged(n, p, x, 0.5, stages=1, repair=None, criterion=score.magnitude),
    "staged_neurons": lambda n, p, x: prune.staged_neurons(n, p, x, 0.5, stages=1, criterion=score.neuron_norm),
}


class Normalised(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.BatchNorm(use_running_average=not self.train)(nn.Dense(6)(x)))
        return nn.Dense(3)(hidden)


@functools.cache
def normalised(train):
    module = Normalised(train)
    variables = module.init(jax.random.key(0), examples.inputs())

    def network(params, x):
        return module.apply({"params": params, "batch_stats": variables["batch_stats"]}, x, mutable="batch_stats")[0]

    return network, variables["params"], examples.inputs()


@pytest.mark.parametrize("name", TAKE_SAMPLES)
def test_batch_statistics_in_training_mode_are_refused(name):
    with pytest.raises(ValueError, match=r"the network mixes samples, in 'reduce_sum' of \(\d+, 6\).*evaluation mode"):
        TAKE_SAMPLES[name](*normalised(True))


def test_batch_statistics_in_evaluation_mode_are_part_of_the_network():
    found = score.elimination_compensation(*normalised(False))
    expected = score.elimination_compensation_by_definition(*normalised(False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected)


@pytest.mark.parametrize("name", TAKE_SAMPLES)
def test_outputs_that_are_not_one_matrix(name):
    network, params, x = examples.mlp()
    two = lambda p, x: (network(p, x), x)  # noqa: E731
    if name in ("biases", "survivors"):
        how = repair.REPAIRS[name]
        call = lambda: how(two, params, masks_of(network, params, x), x, network(params, x))  # noqa: E731
    else:
        call = functools.partial(TAKE_SAMPLES[name], two, params, x)
    with pytest.raises(ValueError, match=r"here \(\d+, K\), or .* it returns a tuple of shapes"):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :3], r"does not take inputs of shape \(\d+, 3\)"),
        (lambda x: x[:, :, None], r"does not take inputs of shape \(\d+, 5, 1\)"),
    ],
    ids=["width", "rank"],
)
@pytest.mark.parametrize("name", [name for name in TAKE_SAMPLES if name not in ("joint_biases", "survivors")])
def test_inputs_that_the_network_does_not_take(name, change, message):
    network, params, x = examples.mlp()
    with pytest.raises(ValueError, match=message) as refusal:
        TAKE_SAMPLES[name](network, params, change(x))
    assert refusal.value.__cause__ is not None  # the network's own words


EXCLUDED = "Dense_1/*"
KEEP_OUT = {
    "elimination_compensation": score.elimination_compensation,
    "by_definition": score.elimination_compensation_by_definition,
    "nonlinear": score.nonlinear_elimination_compensation,
    "optimal_brain_damage": score.optimal_brain_damage,
    "magnitude": score.magnitude,
    "random": functools.partial(score.random, key=jax.random.key(0)),
    "gradient_magnitude": lambda n, p, x, **options: score.gradient_magnitude(
        n, p, x, targets=labels(x), loss=cross_entropy, **options
    ),
}


@pytest.mark.parametrize("name", KEEP_OUT)
def test_what_is_excluded_has_no_scores_and_does_not_count(name):
    example = examples.mlp()
    scores, all_scores = KEEP_OUT[name](*example, exclude=EXCLUDED), KEEP_OUT[name](*example)
    assert list(networks.by_path(scores.importance)) == ["Dense_0/kernel", "Dense_2/kernel"]
    if name != "random":
        for path, leaf in networks.by_path(scores.importance).items():
            np.testing.assert_allclose(leaf, networks.by_path(all_scores.importance)[path], rtol=1e-4, atol=1e-6)
    pruned = prune.one_shot(example.params, scores, 0.5)
    also = prune.one_shot(example.params, all_scores, 0.5, exclude=EXCLUDED)
    for found in (pruned, also):
        assert prune.sparsity(found.masks) == round(0.5 * (35 + 18)) / (35 + 18)
        jax.tree.map(np.testing.assert_array_equal, found.params["Dense_1"], example.params["Dense_1"])


def test_a_bias_that_is_excluded_keeps_every_bit_in_one_shot():
    example = examples.mlp()
    scores = score.elimination_compensation(*example)
    pruned = prune.one_shot(example.params, scores, 0.5, exclude="Dense_1/bias").params
    before, after = networks.by_path(example.params), networks.by_path(pruned)
    moved = {path for path in before if path.endswith("bias") and (after[path] != before[path]).any()}
    assert moved == {"Dense_0/bias", "Dense_2/bias"}


def test_a_criterion_for_neurons_that_scores_what_is_excluded():
    example = examples.mlp()
    message = "the criterion scores the units of 'Dense_1/kernel', of which a leaf is excluded: give it the same"
    with pytest.raises(ValueError, match=message):
        prune.staged_neurons(
            *example, 0.5, repair=None, exclude="Dense_2/*", criterion=lambda *given: score.neuron_norm(*given)
        )
    pruned = prune.staged_neurons(*example, 0.5, repair=None, exclude="Dense_2/*", criterion=score.neuron_norm)
    assert pruned.masks["Dense_2"]["kernel"] is None


@pytest.mark.parametrize("kind", [None, repair.Biases, repair.Survivors])
def test_what_is_excluded_and_frozen_keeps_every_bit_through_stages_and_repairs(kind):
    example, left = examples.mlp(), ("Dense_1/*", "Dense_2/bias")
    pruned = prune.staged(*example, 0.5, stages=2, repair=kind and kind(frozen=left), exclude=left)
    jax.tree.map(np.testing.assert_array_equal, pruned.params["Dense_1"], example.params["Dense_1"])
    np.testing.assert_array_equal(pruned.params["Dense_2"]["bias"], example.params["Dense_2"]["bias"])
    assert pruned.masks["Dense_1"]["kernel"] is None
    assert prune.sparsity(pruned.masks) == round(0.5 * (35 + 18)) / (35 + 18)
    assert (np.asarray(pruned.params["Dense_0"]["bias"]) != np.asarray(example.params["Dense_0"]["bias"])).any()


def test_the_surgeon_leaves_out_what_its_gradients_leave_out():
    network, params, x = examples.mlp()
    gradients = surgeon.loss_gradients(network, params, x, labels(x), cross_entropy, exclude=EXCLUDED)
    assert gradients["Dense_1"]["kernel"] is None
    masks = surgeon.combinatorial_selection(params, gradients, 0.5, start="magnitude", damping=1e-2)
    for update in (surgeon.combinatorial_update, surgeon.brain_surgeon_update):
        moved = update(params, masks, gradients, damping=1e-2)
        jax.tree.map(np.testing.assert_array_equal, moved["Dense_1"], params["Dense_1"])
    everything = prune.one_shot(params, score.magnitude(network, params, x), 0.5).masks
    with pytest.raises(ValueError, match="of different kernels: 'Dense_1/kernel' has no gradients"):
        surgeon.combinatorial_update(params, everything, gradients, damping=1e-2)


def test_moments_go_on_without_what_they_leave_out():
    network, params, x = examples.mlp()
    seen = moments.of_batches(network, params, np.split(np.asarray(x)[:20], 4), exclude=EXCLUDED)
    assert sorted(seen.layers) == ["Dense_0/kernel", "Dense_2/kernel"]
    found = score.elimination_compensation_from_moments(params, seen).importance
    assert found["Dense_1"]["kernel"] is None
    with pytest.raises(ValueError, match="these moments were taken in different ways"):
        moments.merge(seen, moments.of_inputs(network, params, x))


@pytest.mark.parametrize("exclude", [3, ("Dense_0/*", 3), b"Dense_0/*", iter(["Dense_0/*"])])
def test_patterns_that_are_none(exclude):
    with pytest.raises(ValueError, match="must be one or several patterns of paths"):
        inspect.unwrap(as_patterns)(exclude)  # as it is without the tests' own type checks


@pytest.mark.slow
def test_an_equinox_module_as_it_is():
    """Its activation is a leaf that is no array: it comes back untouched from everything."""
    module = eqx.nn.MLP(5, 3, width_size=8, depth=2, activation=jnp.tanh, key=jax.random.key(0))
    network, x = lambda mlp, x: jax.vmap(mlp)(x), examples.inputs(samples=60)
    fit = {"loss": cross_entropy, "optimizer": optax.adam(1e-2), "key": jax.random.key(1)}
    trained = train.fit(network, module, x, labels(x), epochs=2, **fit).params
    scores = score.elimination_compensation(network, trained, x, metric="fisher")
    expected = score.elimination_compensation_by_definition(network, trained, x, metric="fisher")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-6), scores, expected)
    assert scores.importance.layers[0].weight.shape == (8, 5)
    assert scores.importance.layers[0].bias is None
    once = prune.one_shot(trained, scores, 0.5)
    staged = prune.staged(network, trained, x, 0.5, stages=2, metric="fisher")
    biases = repair.Biases()(network, *once, x, network(trained, x))
    survivors = repair.Survivors()(network, *once, x, network(trained, x))
    tuned = train.fit(network, once.params, x, labels(x), epochs=1, masks=once.masks, **fit).params
    neurons = prune.staged_neurons(network, trained, x, 0.5, stages=2, repair="biases")
    spread = devices.shard_params(network, trained, x, devices.mesh(devices=jax.devices()[:1]))
    for found in (trained, once.params, staged.params, biases, survivors, tuned, neurons.params, spread):
        assert isinstance(found, eqx.nn.MLP)
        assert found.activation is module.activation
        assert np.isfinite(network(found, x)).all()
    for found, masks in ((staged.params, staged.masks), (survivors, once.masks), (tuned, once.masks)):
        for path, mask in networks.by_path(masks).items():
            np.testing.assert_array_equal(networks.by_path(found)[path][~np.asarray(mask)], 0)
    assert prune.sparsity(staged.masks) == 0.5
    np.testing.assert_allclose(network(spread, x), network(trained, x))


def test_layers_with_misleading_names_are_pruned_in_order():
    """Sorted by name, the decoder comes before the encoder; all widths fit both ways."""
    generator = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(generator.normal(size=shape), jnp.float32)  # noqa: E731
    names = ("input", "hidden", "output"), ("encoder", "middle", "decoder"), ("c", "b", "a")
    for order in names:
        params = {name: {"kernel": draw(5, 5), "bias": draw(5)} for name in order}

        def network(params, x, order=order):
            for name in order:
                x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
            return x

        x = examples.inputs(samples=40, dtype=jnp.float32)
        found = networks.layers(network, params, x)
        assert [layer.kernel for layer in found] == [f"{name}/kernel" for name in order]
        hidden = jnp.tanh(x @ params[order[0]]["kernel"] + params[order[0]]["bias"])
        variance = score.neuron_variance(network, params, x).importance
        np.testing.assert_allclose(variance[f"{order[0]}/kernel"], hidden.var(0), rtol=1e-4)
        pruned = prune.staged_neurons(network, params, x, 0.4, stages=2, repair=None)
        kept = [np.asarray(networks.by_path(pruned.masks)[f"{name}/kernel"]) for name in order]
        for before, after in itertools.pairwise(kept):
            np.testing.assert_array_equal(before.any(0), after.any(1))
