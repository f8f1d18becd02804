import types

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecjax import compact, networks, prune, repair, score
from tests import examples, jacobians

pytestmark = pytest.mark.usefixtures("float64")


def reference(example, metric, path):
    """Importance and constant of each neuron read by the layer at ``path``, by least squares on stacked Jacobians."""
    found = jacobians.jacobians(example, metric)
    kernel = np.asarray(networks.by_path(example.params)[path])
    by_row = np.einsum("nkji,ji->nkj", found.of(path), kernel)
    by_biases = np.einsum("nki,ji->nkj", found.of(examples.bias_path(path)), kernel)
    importance, constant = np.zeros(len(kernel)), np.zeros(len(kernel))
    for neuron in range(len(kernel)):
        removal, shift = by_row[..., neuron].ravel(), by_biases[..., neuron].ravel()
        if shift.any():
            constant[neuron] = np.linalg.lstsq(shift[:, None], removal)[0][0]
        importance[neuron] = np.sum((removal - constant[neuron] * shift) ** 2) / len(by_row)
    return importance, constant


@pytest.mark.parametrize("metric", ["euclidean", "fisher"])
@pytest.mark.parametrize("activation", [nn.relu, jnp.tanh])
def test_moments_definition_and_jacobians_agree(activation, metric):
    example = examples.mlp(activation=activation)
    by_definition = score.neuron_elimination_compensation_by_definition(*example, metric=metric)
    for batch_size in (5, 1024):
        found = score.neuron_elimination_compensation(*example, metric=metric, batch_size=batch_size)
        for own, following in (("Dense_0/kernel", "Dense_1/kernel"), ("Dense_1/kernel", "Dense_2/kernel")):
            importance, constant = reference(example, metric, following)
            for scores in (found, by_definition):
                np.testing.assert_allclose(scores.importance[own], importance, rtol=1e-8, atol=1e-12)
                np.testing.assert_allclose(scores.constant[own], constant, rtol=1e-8, atol=1e-12)


def test_a_constant_neuron_costs_nothing_and_its_constant_takes_its_place():
    example = examples.mlp(activation=jnp.tanh)
    first = example.params["Dense_0"]
    params = example.params | {"Dense_0": first | {"kernel": first["kernel"].at[:, 2].set(0)}}
    scores = score.neuron_elimination_compensation(example.network, params, example.inputs)
    assert float(scores.importance["Dense_0/kernel"].argmin()) == 2
    np.testing.assert_allclose(scores.importance["Dense_0/kernel"][2], 0, atol=1e-20)
    pruned = prune.neurons(example.network, params, example.inputs, 1 / 13)
    before, after = (example.network(p, example.inputs) for p in (params, pruned.params))
    np.testing.assert_allclose(after, before, atol=1e-12)


@given(fraction=st.floats(0, 1), seed=st.integers(0, 99), scope=st.sampled_from(["network", "layer"]))
def test_exact_counts_and_all_weights_of_a_neuron(fraction, seed, scope):
    example = examples.mlp(seed=seed % 5)
    pruned = prune.neurons(*example, fraction, scope=scope, criterion="neuron_norm")
    masks = networks.by_path(pruned.masks)
    read = [np.asarray(masks[f"Dense_{layer}/kernel"]).any(0) for layer in (0, 1)]
    written = [np.asarray(masks[f"Dense_{layer + 1}/kernel"]).any(1) for layer in (0, 1)]
    gone = [np.flatnonzero(~(into | out)) for into, out in zip(read, written, strict=True)]
    if scope == "network":
        assert len(gone[0]) + len(gone[1]) == min(round(fraction * 13), 11)  # each layer keeps one
    else:
        assert [len(part) for part in gone] == [min(round(fraction * 7), 6), min(round(fraction * 6), 5)]
    for layer, neurons in enumerate(gone):
        assert not np.asarray(masks[f"Dense_{layer}/kernel"])[:, neurons].any()
    smaller, small = compact.compact(example.network, pruned.params, example.inputs)
    assert small["Dense_0"]["kernel"].shape[1] <= 7 - len(gone[0])
    outputs = smaller(small, example.inputs)
    np.testing.assert_allclose(outputs, example.network(pruned.params, example.inputs), atol=1e-12)


def test_the_baselines_by_their_definitions():
    example = examples.mlp(activation=nn.relu)
    norm = score.neuron_norm(*example).importance["Dense_1/kernel"]
    np.testing.assert_allclose(norm, np.sqrt((np.asarray(example.params["Dense_1"]["kernel"]) ** 2).sum(0)))
    hidden = np.asarray(
        nn.relu(example.inputs @ example.params["Dense_0"]["kernel"] + example.params["Dense_0"]["bias"])
    )
    variance = score.neuron_variance(*example)
    np.testing.assert_allclose(variance.importance["Dense_0/kernel"], hidden.var(0))
    np.testing.assert_allclose(variance.constant["Dense_0/kernel"], hidden.mean(0))


@pytest.mark.parametrize("how", [None, *repair.REPAIRS])
def test_repaired_stages_keep_more_than_one_shot(how):
    example = examples.mlp(widths=(20, 20, 3), activation=jnp.tanh, samples=200)
    targets = example.network(example.params, example.inputs)

    def error(params):
        return float(((example.network(params, example.inputs) - targets) ** 2).mean())

    at_once = prune.neurons(*example, 0.5)
    staged = prune.staged_neurons(*example, 0.5, repair=how, stages=5)
    assert sum(int(there.sum()) for there in _alive(staged)) == 20
    # Without a repair, later stages only see the damage of the earlier ones.
    assert error(staged.params) < error(at_once.params) * {None: 2, "biases": 0.8, "survivors": 0.1}[how]


def _alive(pruned):
    masks = networks.by_path(pruned.masks)
    return [np.asarray(masks[f"Dense_{layer}/kernel"]).any(1) for layer in (1, 2)]


def test_every_neuron_but_one_of_each_layer_may_go():
    example = examples.mlp()
    pruned = prune.neurons(*example, 1.0)
    small = compact.fold(example.network, pruned.params, example.inputs)
    assert [small[f"Dense_{layer}"]["kernel"].shape for layer in range(3)] == [(5, 1), (1, 1), (1, 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": 1.2}, r"fraction is 1.2; it must be in \[0, 1\], the fraction of units"),
        ({"fraction": {"nothing": 0.5}}, "the pattern 'nothing' of the fraction gets no group: .* The groups that may"),
        ({"scope": "neuron"}, "scope is 'neuron'; for neurons it must be one of 'network', 'layer'"),
        (
            {"criterion": lambda *_: score.NeuronScores({"Dense_0/kernel": np.zeros(3)})},
            r"importances of the units of 'Dense_0/kernel' are of shape \(3,\), and there are 7",
        ),
        (
            {"criterion": lambda *_: score.NeuronScores({"scale": np.zeros(3)})},
            "no units named 'scale' that could go; those that can are named 'Dense_0/kernel', 'Dense_1/kernel'",
        ),
        (
            {"criterion": lambda *_: score.NeuronScores(*({"Dense_0/kernel": np.zeros(n)} for n in (7, 3)))},
            "constants of the units of 'Dense_0/kernel' are 3 numbers; biases can take over 1 values of each of 7",
        ),
        ({"by": "bytes"}, "by is 'bytes'; it must be one of 'units', 'parameters', 'flops'"),
        ({"by": "flops", "scope": "layer"}, "by='flops' is a fraction of the whole network: give one number"),
        ({"by": "parameters", "fraction": {"*": 0.5}}, "by='parameters' is a fraction of the whole network"),
        ({"by": "flops", "fraction": types.MappingProxyType({"*": 0.5})}, "by='flops' is a fraction of the whole"),
        ({"by": "parameters", "fraction": 0.99}, "fraction=0.99 of the parameters can't go: .* 0.8"),
        ({"multiple_of": 0}, "multiple_of is 0; it must be a whole number of at least 1"),
        ({"multiple_of": 8}, r"can go: the 7 made by Dense_0/kernel \(are 7, of which a multiple of 8 is kept\)"),
        ({"exclude": "*"}, "every kernel is excluded|no kernel to prune"),
        (
            {"exclude": "Dense_1/*"},
            "no unit of this network can go: .*'Dense_1/bias' is excluded.*an axis of the outputs",
        ),
        ({"metric": "fisher", "criterion": "neuron_norm"}, "is not read by this criterion; leave it out, or let it"),
    ],
)
def test_what_is_refused(change, message):
    example = examples.mlp()
    with pytest.raises(ValueError, match=message):
        prune.neurons(*example, **({"fraction": 0.5} | change))


@pytest.mark.slow
@given(inputs=st.integers(1, 19), stay=st.integers(1, 4), more=st.integers(1, 4), seed=st.integers(0, 99))
def test_patterns_keep_the_best_of_every_group(inputs, stay, more, seed):
    group = stay + more
    generator = np.random.default_rng(seed)
    params = {"kernel": jnp.asarray(generator.normal(size=(inputs, 3)))}
    layers = networks.layers(lambda params, x: x @ params["kernel"], params, jnp.ones((2, inputs)))
    importance = jnp.asarray(generator.integers(0, 4, (inputs, 3)).astype(float))
    scores = score.Scores({"kernel": importance}, layers=layers)
    mask = np.asarray(prune.one_shot(params, scores, scope=(stay, group)).masks["kernel"])
    for start in range(0, inputs, group):
        kept = mask[start : start + group]
        importance = np.asarray(scores.importance["kernel"])[start : start + group]
        assert (kept.sum(0) == min(stay, len(kept))).all()
        for neuron in range(3):
            order = np.argsort(importance[:, neuron], kind="stable")  # among equals, the first go
            assert set(order[len(kept) - min(stay, len(kept)) :]) == set(np.flatnonzero(kept[:, neuron]))


def test_patterns_that_are_none():
    example = examples.mlp()
    scores = score.elimination_compensation(*example)
    pruned = prune.one_shot(example.params, scores, scope=(2, 4))
    assert not np.array_equal(pruned.params["Dense_0"]["bias"], example.params["Dense_0"]["bias"])
    for scope in ((4, 4), (0, 4), (5, 4)):
        with pytest.raises(ValueError, match=r"a pattern \(N, M\) keeps N of M inputs, with 0 < N < M"):
            prune.one_shot(example.params, scores, scope=scope)
    with pytest.raises(ValueError, match="leave the sparsity out"):
        prune.one_shot(example.params, scores, 0.5, scope=(2, 4))
    with pytest.raises(ValueError, match="scope 'network' needs a sparsity"):
        prune.one_shot(example.params, scores)
    with pytest.raises(ValueError, match="leave the sparsity out"):
        prune.staged(*example, 0.5, scope=(2, 4))
