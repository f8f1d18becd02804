import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecjax import _batches, metrics, networks, prune, repair, score
from ecjax.repair import gauss_newton
from ecjax.repair.repairs import movable
from tests import examples

pytestmark = pytest.mark.usefixtures("float64")


def pruned_example(seed=0, sparsity=0.6, **options):
    """A small network, its outputs, and random masks for it."""
    example = examples.mlp(seed=seed, **options)
    masks = prune.one_shot(example.params, score.random(*example, key=jax.random.key(seed)), sparsity).masks
    return example, example.network(example.params, example.inputs), masks


def mean_objective(metric, outputs, targets, temperature=1.0):
    """The objective by its definition, in NumPy."""
    outputs, targets = np.asarray(outputs), np.asarray(targets)
    if metric == "euclidean":
        return 0.5 * ((outputs - targets) ** 2).sum(-1).mean()
    expected, found = (np.exp(logits / temperature) for logits in (targets, outputs))
    expected, found = (p / p.sum(-1, keepdims=True) for p in (expected, found))
    return (expected * np.log(expected / found)).sum(-1).mean()


@given(
    seed=st.integers(0, 999),
    sparsity=st.floats(0.1, 1),
    metric=st.sampled_from(["euclidean", "fisher"]),
    kind=st.sampled_from([repair.Biases, repair.Survivors]),
)
def test_the_objective_never_rises_and_zeros_stay(seed, sparsity, metric, kind):
    example, targets, masks = pruned_example(seed % 7, sparsity)
    params = prune.apply_masks(example.params, masks)
    how = kind(metric=metric, damping=10.0 ** (seed % 5 - 4), iterations=3)
    moved = how(example.network, example.params, masks, example.inputs, targets)
    before, after = (mean_objective(metric, example.network(p, example.inputs), targets) for p in (params, moved))
    assert after <= before * (1 + 1e-12)
    if sparsity < 0.9:
        assert after < before
    for path, mask in networks.by_path(masks).items():
        kernel = np.asarray(networks.by_path(moved)[path])
        np.testing.assert_array_equal(kernel[~np.asarray(mask)], 0)
        if kind is repair.Biases:
            np.testing.assert_array_equal(kernel, networks.by_path(params)[path])


@pytest.mark.parametrize(
    ("metric", "outputs", "numbers"),
    [
        (metrics.Fisher(3.0), 3, {"iterations": 10, "products": 15, "curvature_samples": 1000}),
        (None, 10, {"iterations": 10, "products": 15, "curvature_samples": 1000}),
        (None, 9, {"iterations": 30, "products": 30, "curvature_samples": 2500}),
    ],
)
def test_how_far_a_repair_goes_that_does_not_say_so(metric, outputs, numbers):
    example, targets, masks = pruned_example(sparsity=0.8, samples=3000, widths=(6, outputs))
    given = example.network, example.params, masks, example.inputs, targets
    found = repair.Survivors(metric=metric)(*given)
    jax.tree.map(np.testing.assert_array_equal, found, repair.Survivors(metric=metric, **numbers)(*given))
    for name, number in numbers.items():  # each of them counts
        other = repair.Survivors(metric=metric, **numbers | {name: number // 2})(*given)
        assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), found, other)))


def test_one_layer_is_least_squares():
    example, targets, masks = pruned_example(widths=(3,), samples=40, sparsity=0.5)
    network, inputs = example.network, example.inputs
    options = {"damping": 1e-6, "iterations": 4, "products": 40}
    moved = repair.Survivors(**options)(network, example.params, masks, inputs, targets)["Dense_0"]
    for neuron in range(3):
        kept = np.asarray(masks["Dense_0"]["kernel"])[:, neuron]
        design = np.concatenate([np.asarray(inputs)[:, kept], np.ones((40, 1))], 1)
        solution = np.linalg.lstsq(design, np.asarray(targets)[:, neuron])[0]
        found = np.append(np.asarray(moved["kernel"])[kept, neuron], moved["bias"][neuron])
        np.testing.assert_allclose(found, solution, rtol=1e-5, atol=1e-6)
    params = prune.apply_masks(example.params, masks)
    biases = repair.Biases(**options)(network, params, masks, inputs, targets)["Dense_0"]["bias"]
    gap = (targets - network(params, inputs)).mean(0)
    np.testing.assert_allclose(biases, params["Dense_0"]["bias"] + gap, rtol=1e-6)


@pytest.mark.parametrize("metric", ["euclidean", "fisher"])
def test_a_step_solves_the_damped_normal_equations(metric):
    example, targets, masks = pruned_example(widths=(4, 3), samples=200)
    params = prune.apply_masks(example.params, masks)
    biases = {"Dense_0/bias": params["Dense_0"]["bias"], "Dense_1/bias": params["Dense_1"]["bias"]}
    problem = gauss_newton.Problem(example.network, 1, products=30, batch_size=64, curvature_samples=200)
    start, value = gauss_newton.start(params, 1e-6), metrics.named(metric)
    free = {path: jnp.ones(leaf.shape, bool) for path, leaf in biases.items()}
    moved = gauss_newton.take_steps(problem, value, start, free, example.inputs, targets, steps=1).params

    def flat_outputs(flat):
        leaves = {"Dense_0/bias": flat[:4], "Dense_1/bias": flat[4:]}
        return example.network(networks.replace(params, leaves), example.inputs)

    flat = jnp.concatenate(list(biases.values()))
    jacobian, outputs = np.asarray(jax.jacobian(flat_outputs)(flat)), np.asarray(flat_outputs(flat))
    if metric == "euclidean":
        matrices, gap = np.broadcast_to(np.eye(3), (200, 3, 3)), np.asarray(targets) - outputs
    else:
        p, q = (np.asarray(jax.nn.softmax(logits)) for logits in (outputs, targets))
        matrices, gap = np.einsum("nk,kl->nkl", p, np.eye(3)) - np.einsum("nk,nl->nkl", p, p), q - p
    curvature = np.einsum("nki,nkl,nlj->ij", jacobian, matrices, jacobian) / 200
    right = np.einsum("nki,nk->i", jacobian, gap) / 200
    damping = 1e-6 * np.trace(curvature) / len(flat)
    if metric == "euclidean":
        expected = np.linalg.solve(curvature + damping * np.eye(len(flat)), right)
        step = np.concatenate([moved["Dense_0"]["bias"], moved["Dense_1"]["bias"]]) - np.asarray(flat)
    else:  # all output biases at once change nothing, so there the step is compared where it matters
        step = np.concatenate([moved["Dense_0"]["bias"], moved["Dense_1"]["bias"]]) - np.asarray(flat)
        expected, step = right, curvature @ step
    np.testing.assert_allclose(step, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.slow
def test_batches_bound_the_memory_and_change_nothing_else():
    example, targets, masks = pruned_example(samples=64)
    arguments = example.network, example.params, masks, example.inputs, targets
    options = {"curvature_samples": 64, "iterations": 2, "products": 4}
    whole = repair.Survivors(batch_size=64, **options)(*arguments)
    parts = repair.Survivors(batch_size=9, **options)(*arguments)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), whole, parts)

    def temporary_bytes(samples):
        inputs, outputs = jnp.zeros((samples, 5)), jnp.zeros((samples, 3))
        problem = gauss_newton.Problem(example.network, 1, 5, batch_size=100, curvature_samples=100)
        free = movable(repair.Survivors(), networks.layers(*example), example.params, masks)
        given = metrics.Fisher(), gauss_newton.start(example.params, 0.1), free, inputs, outputs
        lowered = gauss_newton.take_steps.lower(problem, *given, steps=2)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(40_000) < 1.05 * temporary_bytes(10_000)


def test_labels_outputs_and_mixtures_of_them():
    example, outputs, masks = pruned_example()
    labels = jnp.asarray(np.random.default_rng(0).integers(3, size=23))
    options = {"metric": "fisher", "iterations": 2}
    arguments = example.network, example.params, masks, example.inputs
    by_label = repair.Survivors(**options)(*arguments, labels)
    by_mixture = repair.Survivors(**options)(*arguments, repair.mixture(outputs, labels, 1))
    jax.tree.map(np.testing.assert_array_equal, by_label, by_mixture)
    unmixed = jax.nn.softmax(repair.mixture(outputs, labels, 0))
    np.testing.assert_allclose(unmixed, jax.nn.softmax(outputs), rtol=1e-12)
    half = jax.nn.softmax(repair.mixture(outputs, labels, 0.5))
    np.testing.assert_allclose(half, (jax.nn.softmax(outputs) + np.eye(3)[labels]) / 2, rtol=1e-12)
    # Labels teach what they say.
    longer = repair.Survivors(metric="fisher", iterations=30)(*arguments, labels)
    fitted, outright = (
        (np.asarray(example.network(p, example.inputs)).argmax(-1) == labels).mean() for p in (longer, example.params)
    )
    assert fitted > outright + 0.2


def test_any_network_with_other_parameters_in_it():
    example = examples.residual()
    masks = prune.one_shot(example.params, score.magnitude(*example), 0.5).masks
    targets = example.network(example.params, example.inputs)
    moved = repair.Survivors()(example.network, example.params, masks, example.inputs, targets)
    assert not np.array_equal(moved["LayerNorm_0"]["scale"], example.params["LayerNorm_0"]["scale"])
    only = repair.Biases()(example.network, example.params, masks, example.inputs, targets)
    np.testing.assert_array_equal(only["LayerNorm_0"]["bias"], example.params["LayerNorm_0"]["bias"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_params_keep_their_dtype(dtype):
    example, targets, masks = pruned_example()
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), example.params)
    inputs = example.inputs.astype(dtype)
    moved = repair.Survivors()(example.network, params, masks, inputs, targets.astype(dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype(dtype)}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))


@pytest.mark.parametrize(
    ("samples", "widths", "metric"),
    [(1, (4, 1), "euclidean")]
    + [(*few, metric) for few in ((1, (4, 2)), (2, (1, 1, 2)), (1, (3,))) for metric in ("euclidean", "fisher")],
)
def test_few_samples_few_outputs_and_dead_layers_stay_finite(samples, widths, metric):
    example, targets, masks = pruned_example(widths=widths, activation=nn.relu, samples=samples, sparsity=1.0)
    for params in (example.params, jax.tree.map(jnp.zeros_like, example.params)):
        moved = repair.Survivors(metric=metric)(example.network, params, masks, example.inputs, targets)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))


@pytest.mark.slow
def test_seeds_side_by_side():
    both = [pruned_example(seed) for seed in (0, 1)]
    network, inputs = both[0][0].network, both[0][0].inputs
    params, masks = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
        for parts in ([e.params for e, _, _ in both], [m for _, _, m in both])
    )
    targets = jax.vmap(network, in_axes=(0, None))(params, inputs)
    options = {"iterations": 2, "products": 4}  # more of them would amplify rounding

    def repaired_of(params, masks, targets):
        return repair.Survivors(**options)(network, params, masks, inputs, targets)

    repaired = jax.vmap(repaired_of)(params, masks, targets)
    for seed in (0, 1):
        p, m, t = (jax.tree.map(lambda leaf, seed=seed: leaf[seed], tree) for tree in (params, masks, targets))
        alone = repaired_of(p, m, t)
        jax.tree.map(lambda a, b, seed=seed: np.testing.assert_allclose(a, b[seed], rtol=1e-5), alone, repaired)


@pytest.mark.parametrize(
    ("given", "how", "message"),
    [
        ({"targets": jnp.zeros((23, 4))}, {}, r"targets of shape \(23, 4\) do not fit outputs of shape \(23, 3\)"),
        ({"targets": jnp.zeros((22, 3))}, {}, "do not match the 23 samples"),
        ({"targets": jnp.zeros(23, int)}, {}, r"do not fit outputs of shape \(23, 3\); labels are for the"),
        ({"targets": jnp.full(23, 3)}, {"metric": "fisher"}, r"labels must be in \[0, 3\)"),
        ({"targets": jnp.zeros(23)}, {"metric": "fisher"}, "labels must be 23 whole numbers, got float32"),
        ({"targets": jnp.eye(3)[jnp.arange(23) % 3]}, {"metric": "fisher"}, r"Pass labels.argmax\(-1\)"),
        ({"targets": jnp.full((23, 3), 1 / 3)}, {"metric": "fisher"}, r"or jnp.log\(probabilities\)"),
        (
            {"targets": jnp.zeros((23, 3)).at[0, 0].set(jnp.nan)},
            {"metric": "fisher"},
            "targets of shape .*: NaN or infinity",
        ),
        ({"targets": jnp.zeros((23, 3)).at[0, 0].set(jnp.inf)}, {}, "targets of shape .*: NaN or infinity"),
        ({"targets": jnp.eye(3, dtype=int)[jnp.arange(23) % 3]}, {"metric": "fisher"}, r"Pass labels.argmax\(-1\)"),
        ({}, {"metric": "hinge"}, "metric is 'hinge'"),
        (
            {},
            {"metric": repair.Biases()},
            r"metric is Biases\(.*; it must be one of 'euclidean', 'fisher', or a metric",
        ),
        ({}, {"metric": metrics.Fisher}, "metric is Fisher, a class; call it"),
        ({}, {"damping": 0.0}, "damping is 0.0; it must be above 0"),
        ({}, {"metric": metrics.Fisher(-1)}, "temperature is -1; it must be above 0"),
        ({}, {"iterations": 0}, "iterations is 0; it must be a whole number of at least 1"),
        ({}, {"products": 0}, "products is 0"),
        ({}, {"frozen": "head/*"}, "'head/\\*' matches no leaf of the params"),
        ({}, {"frozen": "Dense_9"}, "'Dense_9' matches no leaf of the params"),
        ({"inputs": jnp.zeros((23, 5)).at[0, 0].set(jnp.nan)}, {}, "hold NaN or infinity"),
    ],
)
def test_what_is_refused(given, how, message):
    example, targets, masks = pruned_example()
    arguments = {"inputs": example.inputs, "targets": targets} | given
    with pytest.raises(ValueError, match=message):
        repair.Survivors(**how)(example.network, example.params, masks, **arguments)


def test_other_errors():
    example, targets, masks = pruned_example()
    integers = jax.tree.map(lambda mask: mask.astype(int), masks)
    with pytest.raises(ValueError, match="masks are boolean"):
        repair.Survivors()(example.network, example.params, integers, example.inputs, targets)
    with pytest.raises(ValueError, match="share is 2; it must be in"):
        repair.mixture(targets, jnp.zeros(23, int), 2)
    without, kept = {"kernel": jnp.ones((5, 3))}, {"kernel": jnp.ones((5, 3), bool)}
    with pytest.raises(ValueError, match="the network has no bias of a kernel that could move"):
        repair.Biases()(lambda params, x: x @ params["kernel"], without, kept, example.inputs, targets)


def test_what_is_frozen_does_not_move():
    example, targets, masks = pruned_example()
    moved = repair.Survivors(frozen=("Dense_1/*", "Dense_0/kernel"))(*example[:2], masks, example.inputs, targets)
    before = networks.by_path(prune.apply_masks(example.params, masks))
    changed = {path for path, leaf in networks.by_path(moved).items() if (leaf != before[path]).any()}
    assert changed == {"Dense_0/bias", "Dense_2/bias", "Dense_2/kernel"}


@pytest.mark.parametrize(("samples", "size"), [(3000, 2500), (4999, 2500), (7, 3), (2500, 2500), (10, 1), (5, 9)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_every_sample_gets_its_turn_in_the_curvature(samples, size, blocks):
    array = jnp.arange(blocks * samples)
    turns = range(-(-samples // min(max(size // blocks, 1), samples)))
    taken = [np.asarray(_batches.every(array, size, jnp.asarray(turn), blocks)) for turn in turns]
    assert all(len(set(some)) == len(some) == len(taken[0]) for some in taken)
    assert set(np.concatenate(taken)) == set(range(blocks * samples))


def test_samples_of_no_weight_take_no_part_in_the_curvature():
    """Every second one is padding: of samples that are evenly spaced, a step would see all or none that count."""
    (network, params, inputs), targets, masks = pruned_example()
    weights, odd = jnp.arange(len(inputs)) % 2.0, slice(1, None, 2)
    how = repair.Survivors(iterations=3, curvature_samples=len(inputs) // 2)
    found = how(network, params, masks, inputs, targets, weights=weights)
    alone = how(network, params, masks, inputs[odd], targets[odd], weights=weights[odd] * weights.mean())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, alone)


def test_a_network_that_cannot_be_differentiated_forwards_is_refused_by_name():
    @jax.custom_vjp
    def sign(x):
        return jnp.sign(x)

    sign.defvjp(lambda x: (jnp.sign(x), None), lambda _, slope: (slope,))
    params, inputs = {"w": jnp.ones((4, 3)), "v": jnp.eye(3, 2)}, jnp.cos(jnp.arange(24.0)).reshape(6, 4)
    network = lambda p, x: sign(x @ p["w"]) @ p["v"]  # noqa: E731
    with pytest.raises(ValueError, match=r"holds a function with jax.custom_vjp.* or prune with repair=None"):
        prune.staged(network, params, inputs, 0.5, stages=1, repair=repair.Survivors(iterations=1, products=2))


def test_a_leaf_in_a_loop_of_unknown_length_has_to_be_frozen():
    def network(params, x):
        _, w = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, 0.9 * c[1]), (0, params["w"]))
        return jnp.tanh(x @ params["v"]) @ w

    params, inputs = {"v": jnp.ones((4, 3)), "w": jnp.eye(3, 2)}, jnp.cos(jnp.arange(24.0)).reshape(6, 4)
    given, options = (network, params, inputs, 0.5), {"stages": 1, "exclude": "w"}
    with pytest.raises(ValueError, match=r"a loop of unknown length .* name its leaves in repair.Survivors\(frozen="):
        prune.staged(*given, **options)
    pruned = prune.staged(*given, **options, repair=repair.Survivors(frozen="w", iterations=1, products=2))
    np.testing.assert_array_equal(pruned.params["w"], params["w"])
