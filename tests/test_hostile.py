"""Odd shapes, dtypes and scales: each call answers with finite numbers in bounds, or says what left the range."""

import functools
import itertools
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ecjax import compact, networks, prune, repair, score, surgeon
from tests import examples
from tests.examples import Example

OUT_OF_RANGE = r"NaN or infinity, from the params or because numbers on the way leave the range of"
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Shape(NamedTuple):
    """Of a network, its inputs and their numbers."""

    samples: int
    features: int
    widths: tuple[int, ...]
    dtype: str


ORDINARY = Shape(7, 3, (4, 2), "float32")
# One of each: compiled code is shared by all examples of a shape.
SHAPES = {
    "ordinary": ORDINARY,
    "one sample, one output": Shape(1, 3, (4, 1), "bfloat16"),
    "empty layer": Shape(7, 3, (0, 2), "float32"),
    "no outputs": Shape(7, 3, (4, 0), "float32"),
    "no features": Shape(7, 0, (4, 2), "float32"),
}
DOUBLE = ORDINARY._replace(dtype="float64")
ODDITIES = ("none", "constant feature", "duplicated feature", "dead layer", "zero inputs", "zero kernels")


@functools.cache
def _network(widths):
    return networks.from_linen(networks.MLP(widths, nn.relu))


def _made(shape: Shape, oddity="none", scales=(1, 1, 1), seed=0) -> Example:
    """A network with the scales of its inputs, of its first and of its other layers, and something odd."""
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(shape.samples, shape.features)) + 0.3
    if oddity == "constant feature":
        inputs[:, :1] = 0.7
    elif oddity == "duplicated feature":
        inputs[:, :1] = inputs[:, -1:]
    elif oddity == "zero inputs":
        inputs[:] = 0
    params = {}
    for layer, (into, out) in enumerate(itertools.pairwise((shape.features, *shape.widths))):
        kernel, bias = generator.normal(size=(into, out)), generator.normal(size=out) / 10
        if oddity == "zero kernels" or (oddity == "dead layer" and layer == 0):
            kernel, bias = np.zeros_like(kernel), np.full_like(bias, -1)
        scale = scales[min(layer + 1, 2)]
        params[f"Dense_{layer}"] = {
            "kernel": jnp.asarray(kernel * scale, shape.dtype),
            "bias": jnp.asarray(bias * scale, shape.dtype),
        }
    inputs = jnp.asarray(inputs * scales[0], jnp.promote_types(shape.dtype, jnp.float32))
    return Example(_network(shape.widths), params, inputs)


def _is_finite(tree) -> bool:
    return all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(tree))


def _removed(masks) -> int:
    return sum(int((~mask).sum()) for mask in jax.tree.leaves(masks))


def _weights(masks) -> int:
    return sum(mask.size for mask in jax.tree.leaves(masks))


def _scores(criterion):
    def check(network, params, inputs):
        scores = criterion(network, params, inputs)
        assert _is_finite(scores)
        assert all((np.asarray(leaf, np.float64) >= 0).all() for leaf in jax.tree.leaves(scores.importance))

    return check


def _params(call):
    return lambda *network: _assert_finite(call(*network))


def _assert_finite(params):
    assert _is_finite(params)


def _half(params):
    pruned = prune.one_shot(params, score.Scores(jax.tree.map(jnp.abs, examples.kernels(params))), 0.5)
    assert _removed(pruned.masks) == round(0.5 * _weights(pruned.masks))
    return pruned


def _staged(repair):
    def check(network, params, inputs):
        pruned = prune.staged(network, params, inputs, 0.5, stages=2, repair=repair)
        assert _is_finite(pruned.params)
        assert _removed(pruned.masks) == round(0.5 * _weights(pruned.masks))

    return check


def _staged_neurons(network, params, inputs):
    pruned = prune.staged_neurons(network, params, inputs, 0.5, stages=2, repair=None)
    assert _is_finite(pruned.params)
    following = pruned.masks["Dense_1"]["kernel"]
    if following.shape[1]:  # without outputs no neuron has a weight to keep
        assert (~following.any(1)).sum() == round(0.5 * following.shape[0])


def _labels(inputs):
    return jnp.zeros(len(inputs), int)


def _gradients(network, params, inputs):
    return surgeon.loss_gradients(network, params, inputs, _labels(inputs), cross_entropy)


def _selection(start):
    def check(network, params, inputs):
        gradients = _gradients(network, params, inputs)
        options = {"start": start, "key": jax.random.key(0), "draws": 3}
        masks = surgeon.combinatorial_selection(params, gradients, 0.5, **options)
        assert _removed(masks) == round(0.5 * _weights(masks))

    return check


def _sparse(kind):
    def check(network, params, inputs):
        pruned = _half(params).params
        activation, given = (nn.relu, inputs) if kind == "bcsr" else (lambda z: np.maximum(z, 0), np.asarray(inputs))
        with np.errstate(all="ignore"):
            found = compact.forward(compact.to_sparse(network, pruned, inputs, kind), given, activation)
        np.testing.assert_allclose(*(np.asarray(y, np.float64) for y in (found, network(pruned, inputs))), rtol=2e-2)

    return check


def _files(params, tmp_path):
    pruned = _half(params).params
    compact.save(tmp_path / "net", pruned)
    found = networks.by_path(compact.load(tmp_path / "net").params)
    assert {p: leaf.tobytes() for p, leaf in found.items()} == {
        p: np.asarray(leaf).tobytes() for p, leaf in networks.by_path(pruned).items()
    }


def _report(network, params, inputs):
    relu = {"activation": nn.relu, "numpy_activation": lambda z: np.maximum(z, 0)}
    pruned = _half(params).params
    forms = compact.report(network, pruned, *compact.compact(network, pruned, inputs), inputs, **relu, repeats=1)
    assert len(forms) == 6
    assert all(0 < seconds < np.inf for form in forms for seconds in form.seconds.values())


CRITERIA = {
    "euclidean": score.elimination_compensation,
    "fisher": functools.partial(score.elimination_compensation, metric="fisher"),
    "probes": functools.partial(score.elimination_compensation, probes=2, key=jax.random.key(0)),
    "definition": score.elimination_compensation_by_definition,
    "nonlinear": functools.partial(score.nonlinear_elimination_compensation, metric="fisher", steps=2),
    "brain damage": score.optimal_brain_damage,
    "magnitude": score.magnitude,
    "gradient magnitude": lambda n, p, x: score.gradient_magnitude(n, p, x, targets=_labels(x), loss=cross_entropy),
    "random": functools.partial(score.random, key=jax.random.key(0)),
    "neurons": score.neuron_elimination_compensation,
    "neurons, definition": score.neuron_elimination_compensation_by_definition,
    "neuron norm": score.neuron_norm,
    "neuron variance": score.neuron_variance,
    "brain surgeon": lambda n, p, x: surgeon.brain_surgeon_saliency_from_gradients(p, _gradients(n, p, x)),
}
DECISIONS = {
    "staged": _staged(None),
    "staged, biases": _staged("biases"),
    "staged, survivors": _staged("survivors"),
    "staged neurons": _staged_neurons,
    "selection, magnitude": _selection("magnitude"),
    "selection, rmp": _selection("rmp"),
}
REPAIRS = {
    "joint biases": lambda n, p, x: repair.Biases()(n, *_half(p), x, n(p, x)),
    "survivors": lambda n, p, x: repair.Survivors(metric="fisher")(n, *_half(p), x, n(p, x)),
    "combinatorial update": lambda n, p, x: surgeon.combinatorial_update(p, _half(p).masks, _gradients(n, p, x)),
    "surgeon update": lambda n, p, x: surgeon.brain_surgeon_update(p, _half(p).masks, _gradients(n, p, x)),
    "removal cost": lambda n, p, x: surgeon.removal_cost(p, _half(p).masks, _gradients(n, p, x)),
    "compact": lambda n, p, x: compact.compact(n, _half(p).params, x)[1],
}
CALLS = (
    {name: _scores(criterion) for name, criterion in CRITERIA.items()}
    | DECISIONS
    | {name: _params(how) for name, how in REPAIRS.items()}
)
SCALES = st.sampled_from([1e-20, 1e-10, 1, 1e10, 1e20])


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=5)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    oddity=st.sampled_from(ODDITIES),
    scales=st.tuples(SCALES, SCALES, SCALES),
    seed=st.integers(0, 9),
)
@example(shape="ordinary", oddity="none", scales=(1, 1, 1), seed=0)
@example(shape="ordinary", oddity="constant feature", scales=(1, 1, 1), seed=0)
@example(shape="ordinary", oddity="duplicated feature", scales=(1, 1, 1), seed=0)
@example(shape="ordinary", oddity="dead layer", scales=(1, 1, 1), seed=0)
@example(shape="ordinary", oddity="none", scales=(1e20, 1e-20, 1), seed=0)
@example(shape="ordinary", oddity="none", scales=(1, 1e20, 1e20), seed=0)
@example(shape="ordinary", oddity="none", scales=(1e-20, 1, 1), seed=0)
@example(shape="one sample, one output", oddity="none", scales=(1, 1, 1), seed=0)
@example(shape="empty layer", oddity="none", scales=(1, 1, 1), seed=0)
@example(shape="no outputs", oddity="none", scales=(1, 1, 1), seed=0)
@example(shape="no features", oddity="none", scales=(1, 1, 1), seed=0)
def test_finite_numbers_or_the_documented_error(name, shape, oddity, scales, seed):
    try:
        CALLS[name](*_made(SHAPES[shape], oddity, scales, seed))
    except ValueError as error:
        one_logit = shape == "one sample, one output" and "the softmax of one logit is 1" in str(error)
        far_apart = max(scales) > 1 and "sees no change in the outputs" in str(error)
        no_units = shape == "empty layer" and "no unit of this network can go" in str(error)
        if not (one_logit or far_apart or no_units) and (max(scales) <= 1 or not re.search(OUT_OF_RANGE, str(error))):
            raise


@pytest.mark.slow
@pytest.mark.parametrize("name", ["euclidean", "fisher", "definition", "brain damage", "gradient magnitude", "neurons"])
@settings(max_examples=5)
@given(oddity=st.sampled_from(ODDITIES), scales=st.tuples(SCALES, SCALES, SCALES))
@example(oddity="none", scales=(1e20, 1e20, 1e20))
@example(oddity="none", scales=(1e20, 1e-20, 1e-20))
def test_double_precision_always_answers(name, oddity, scales):
    with jax.enable_x64(True):
        try:
            CALLS[name](*_made(DOUBLE, oddity, scales))
        except ValueError as error:  # a softmax of logits 1e20 apart has nothing to say in any precision
            if name != "fisher" or "sees no change in the outputs" not in str(error):
                raise


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-20, 1, 1e20])
def test_smaller_forms(shape, scale, tmp_path):
    made = _made(SHAPES[shape], scales=(1 / scale, scale, 1))
    _sparse("bcsr")(*made)
    _sparse("csr")(*made)
    _files(made.params, tmp_path)
    if scale == 1:
        _report(*made)


@pytest.mark.parametrize("criterion", [score.elimination_compensation, score.optimal_brain_damage])
def test_small_weights_of_large_inputs_keep_their_importance(criterion):
    """W² alone is 1e-40, below float32; with the variance of the inputs the importance is not."""
    one_layer = ORDINARY._replace(widths=(2,))
    network, params, inputs = _made(one_layer)
    expected = criterion(network, params, inputs).importance["Dense_0"]["kernel"]
    network, params, inputs = _made(one_layer, scales=(1e15, 1e-20, 1))
    found = criterion(network, params, inputs).importance["Dense_0"]["kernel"]
    np.testing.assert_allclose(found, 1e-10 * expected, rtol=1e-5)


def test_what_overflows_is_named_and_fits_in_double_precision():
    with pytest.raises(ValueError, match=r"importances 'Dense_0/kernel': .* the range of float32; scale .* float64"):
        score.elimination_compensation(*_made(ORDINARY, scales=(1e20, 1, 1)))
    with jax.enable_x64(True):
        # Next to such inputs the biases are nothing: the scale comes out squared.
        for_scale = [
            np.asarray(
                score.elimination_compensation(*_made(DOUBLE, scales=(scale, 1, 1))).importance["Dense_1"]["kernel"]
            )
            for scale in (1e20, 1e21)
        ]
    np.testing.assert_allclose(for_scale[1], 100 * for_scale[0], rtol=1e-9)


def test_under_jit_values_are_not_looked_at():
    network, params, inputs = _made(ORDINARY, scales=(1e20, 1, 1))
    scores = jax.jit(lambda p, x: score.elimination_compensation(network, p, x))(params, inputs)
    assert not _is_finite(scores)
    with pytest.raises(ValueError, match=r"importances 'Dense_0/kernel' hold NaN; they can't be ranked"):
        prune.one_shot(params, scores, 0.5)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_norms_of_neurons_neither_overflow_nor_vanish(scale):
    def norms(scale):
        return score.neuron_norm(*_made(ORDINARY, scales=(1, scale, 1))).importance["Dense_0/kernel"]

    np.testing.assert_allclose(norms(scale), scale * norms(1), rtol=1e-6)


def test_shifts_that_overflow_are_refused():
    made = _made(ORDINARY)
    params, layers = made.params, networks.layers(*made)
    importance = score.magnitude(*made).importance
    shifts = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 3e38), importance)
    with pytest.raises(ValueError, match=r"shifted biases 'Dense_\d/bias': NaN or infinity"):
        prune.one_shot(params, score.Scores(importance, shifts, layers), 1.0)
    constants = {"Dense_0/kernel": jnp.full(4, 3e38)}
    scores = score.NeuronScores({"Dense_0/kernel": jnp.ones(4)}, constants)
    with pytest.raises(ValueError, match=r"shifted biases 'Dense_1/bias': NaN or infinity"):
        prune.neurons(*made, 1.0, criterion=lambda *_: scores)


def test_constants_that_overflow_are_refused():
    params = {
        "Dense_0": {"kernel": jnp.zeros((3, 4)), "bias": jnp.full(4, 1e20)},
        "Dense_1": {"kernel": jnp.full((4, 2), 1e20), "bias": jnp.zeros(2)},
    }
    with pytest.raises(ValueError, match="folded biases 'Dense_1/bias': NaN or infinity"):
        compact.fold(_network((4, 2)), params, jnp.ones((2, 3)))


@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1e-30, 1e-20, 1.0, 1e20, 3e38]), min_size=20, max_size=20),
    sparsity=st.floats(0, 1),
)
def test_exact_counts_and_ties_by_position(values, sparsity):
    made = _made(ORDINARY)
    params = made.params
    flat = np.array(values, np.float32)
    kernels = {"Dense_0": {"kernel": jnp.asarray(flat[:12].reshape(3, 4))}}
    kernels |= {"Dense_1": {"kernel": jnp.asarray(flat[12:].reshape(4, 2))}}
    scores = score.Scores(kernels, layers=networks.layers(*made))

    def expected(values, count):
        kept = np.ones(values.size, bool)
        kept[np.argsort(values, kind="stable")[:count]] = False  # NumPy's too takes ±0 for equals
        return kept

    masks = {scope: prune.one_shot(params, scores, sparsity, scope=scope).masks for scope in prune.SCOPES}
    whole = np.concatenate([np.asarray(mask).ravel() for mask in jax.tree.leaves(masks["network"])])
    np.testing.assert_array_equal(whole, expected(flat, round(sparsity * 20)))
    groups = prune.one_shot(params, scores, scope=(1, 2)).masks
    for name in ("Dense_0", "Dense_1"):
        layer = np.asarray(kernels[name]["kernel"])
        in_layer, in_neurons, in_groups = (m[name]["kernel"] for m in (masks["layer"], masks["neuron"], groups))
        np.testing.assert_array_equal(np.ravel(in_layer), expected(layer.ravel(), round(sparsity * layer.size)))
        for neuron in range(layer.shape[1]):
            count = round(sparsity * layer.shape[0])
            np.testing.assert_array_equal(in_neurons[:, neuron], expected(layer[:, neuron], count))
            np.testing.assert_array_equal(in_groups[:2, neuron], expected(layer[:2, neuron], 1))


def test_a_layer_kept_out_by_infinity_is_not_pruned_all_the_same():
    made = _made(ORDINARY)
    importance = networks.replace(
        score.magnitude(*made).importance,
        {"Dense_1/kernel": jnp.full((4, 2), jnp.inf), "Dense_0/kernel": jnp.ones((3, 4))},
    )
    assert prune.sparsity(prune.one_shot(made.params, score.Scores(importance), 12 / 20).masks) == 12 / 20
    with pytest.raises(ValueError, match=r"more weights than there are of finite importance.*exclude=\('Dense_1/ker"):
        prune.one_shot(made.params, score.Scores(importance), 0.99)
    masks = prune.one_shot(made.params, score.Scores(importance), 0.99, exclude="Dense_1/*").masks
    assert masks["Dense_1"]["kernel"] is None
    assert prune.sparsity(masks) == 1.0


def test_what_was_removed_stays_removed_whatever_the_criterion_says():
    """Importances below 0 are no importances, but must not bring removed weights back."""
    network, params, inputs = _made(ORDINARY)
    seen = []

    def negative(_, params, inputs):  # noqa: ARG001
        seen.append(examples.kernels(params))
        return score.Scores(jax.tree.map(lambda leaf: -5 - jnp.abs(leaf), examples.kernels(params)))

    masks = prune.staged(network, params, inputs, 0.8, stages=3, repair=None, criterion=negative).masks
    assert _removed(masks) == 16
    for kernels in seen:
        for kernel, mask in zip(jax.tree.leaves(kernels), jax.tree.leaves(masks), strict=True):
            assert not np.asarray(mask)[np.asarray(kernel) == 0].any()


def test_damping_that_large_gradients_drown_is_refused():
    """Samples alike make ``GGᵀ`` singular, and λ is lost next to 2⁸⁰."""
    made = _made(ORDINARY)
    gradients = jax.tree.map(lambda leaf: jnp.zeros_like(leaf).at[:, 0, 0].set(2.0**40), _gradients(*made))
    with pytest.raises(ValueError, match=r"saliencies .* or raise the damping, 0.01 may be too small"):
        surgeon.brain_surgeon_saliency_from_gradients(made.params, gradients)


def test_gradients_that_are_not_finite_are_refused():
    network, params, inputs = _made(ORDINARY)
    gradients = jax.tree.map(lambda leaf: leaf.at[0].set(np.inf), _gradients(network, params, inputs))
    masks = _half(params).masks
    for call in (
        lambda: surgeon.brain_surgeon_saliency_from_gradients(params, gradients),
        lambda: surgeon.combinatorial_update(params, masks, gradients),
        lambda: surgeon.combinatorial_selection(params, gradients, 0.5, start="magnitude"),
        lambda: surgeon.removal_cost(params, masks, gradients),
    ):
        with pytest.raises(ValueError, match=re.escape("gradients 'Dense_0/kernel': NaN or infinity")):
            call()
