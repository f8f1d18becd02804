"""Scores of whole units of any network, against definitions that are written down for each network by hand."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecjax import _trees, metrics, networks, prune, score
from ecjax.score import units
from tests import examples
from tests.architectures import ARCHITECTURES
from tests.test_coupled import double
from tests.zoo import array

pytestmark = pytest.mark.usefixtures("float64")
N = 12


class Case(NamedTuple):
    """A network, and the same with gates on the units of one group and constants in their place.

    Attributes:
        network: function of params, inputs, gates (units,) and constants (units, values); a network without these two.
        params: its parameters.
        inputs: samples along the first axis.
        name: of the group.
        units: how many it has.
        values: how many a unit has that biases can make up for.
    """

    network: Callable
    params: dict
    inputs: jax.Array
    name: str
    units: int
    values: int


def _gated(values, gates):
    return values if gates is None else values * gates


def _moved(bias, shifts, kernel):
    """A bias that has taken constants over; as it is in the network itself."""
    return bias if shifts is None else bias + shifts @ kernel


def convnet() -> Case:
    """A channel that a padded convolution reads: its bias moves by what a constant adds inside."""
    params = {"a": array(3, 2, 4), "b": array(4), "c": array(3, 4, 5) / 2, "d": array(5)}
    params |= {"e": array(5, 3), "f": array(3)}

    def gated(params, x, gates=None, shifts=None):
        options = {"window_strides": (1,), "padding": "SAME", "dimension_numbers": ("NWC", "WIO", "NWC")}
        hidden = jnp.tanh(jax.lax.conv_general_dilated(x, params["a"], **options) + params["b"])
        moved = params["d"] if shifts is None else params["d"] + shifts[:, 0] @ params["c"].sum(0)
        hidden = jnp.tanh(jax.lax.conv_general_dilated(_gated(hidden, gates), params["c"], **options) + moved)
        return hidden.mean(1) @ params["e"] + params["f"]

    return Case(gated, params, array(N, 6, 2), "a", 4, 1)


def residual() -> Case:
    """A channel of a residual stream: read by both statistics of a norm and by two layers with biases."""
    params = {"a": array(5, 6), "b": array(6), "scale": array(6), "shift": array(6)}
    params |= {"c": array(6, 6) / 2, "d": array(6), "e": array(6, 3), "f": array(3)}

    def gated(params, x, gates=None, shifts=None):
        first, second = (None, None) if shifts is None else shifts.T
        hidden = jnp.tanh(x @ params["a"] + params["b"])
        mean = _gated(hidden, gates).mean(-1, keepdims=True)
        variance = _gated(hidden**2, gates).mean(-1, keepdims=True) - mean**2
        normed = (hidden - mean) * jax.lax.rsqrt(variance + 1e-6) * params["scale"] + params["shift"]
        block = jnp.tanh(_gated(normed, gates) @ params["c"] + _moved(params["d"], first, params["c"]))
        return _gated(hidden + block, gates) @ params["e"] + _moved(params["f"], second, params["e"])

    return Case(gated, params, array(N, 5), "a", 6, 2)


def _attention(params, x, heads=None, features=None, shifts=None):
    q, k, v = (jnp.einsum("ntd,dhf->nthf", x, params[name]) + params[f"{name}b"] for name in "qkv")
    shares = jax.nn.softmax(jnp.einsum("nthf,nshf->nhts", _gated(q, features), k))
    mixed = _gated(jnp.einsum("nhts,nshf->nthf", shares, v), None if heads is None else heads[:, None])
    moved = _moved(params["ob"], None if shifts is None else shifts.reshape(-1), params["o"].reshape(-1, 3))
    return (jnp.einsum("nthf,hfo->nto", mixed, params["o"]) + moved).mean(1)


def _attention_params():
    params = {name: array(4, 3, 2, seed=seed) / 2 for seed, name in enumerate("qkv")}
    params |= {f"{name}b": array(3, 2, seed=seed) for seed, name in enumerate("qkv")}
    return params | {"o": array(3, 2, 3), "ob": array(3)}


def heads() -> Case:
    """A head, with a constant for each of its features."""

    def gated(params, x, gates=None, shifts=None):
        return _attention(params, x, gates, None, shifts)

    return Case(gated, _attention_params(), array(N, 4, 4), "q", 3, 2)


def queries() -> Case:
    """A feature of queries and keys, which counts on one side."""

    def gated(params, x, gates=None, shifts=None):  # noqa: ARG001 nothing takes its place
        return _attention(params, x, None, gates)

    return Case(gated, _attention_params(), array(N, 4, 4), "q (2)", 2, 0)


def glu() -> Case:
    """A gated unit."""
    params = {"a": array(4, 6), "g": array(4, 6), "b": array(6, 3), "c": array(3)}

    def gated(params, x, gates=None, shifts=None):
        hidden = jax.nn.silu(x @ params["g"]) * (x @ params["a"])
        moved = _moved(params["c"], None if shifts is None else shifts[:, 0], params["b"])
        return _gated(hidden, gates) @ params["b"] + moved

    return Case(gated, params, array(N, 4), "g", 6, 1)


def scanned() -> Case:
    """A unit of a scanned layer: the same in every turn, with a constant for each."""
    params = {"in": array(4, 5), "w": array(3, 5, 6) / 2, "b": array(3, 6), "v": array(3, 6, 5) / 2, "d": array(3, 5)}
    params |= {"head": array(5, 2)}

    def gated(params, x, gates=None, shifts=None):
        def block(h, layer):
            w, b, v, d, shift = layer
            return h + _gated(jnp.tanh(h @ w + b), gates) @ v + _moved(d, shift, v), None

        layers = (*(params[name] for name in "wbvd"), None if shifts is None else shifts.T)
        return jax.lax.scan(block, x @ params["in"], layers)[0] @ params["head"]

    return Case(gated, params, array(N, 4), "w", 6, 3)


CASES = (residual, heads, queries)
LATER = [pytest.param(case, marks=pytest.mark.slow) for case in (convnet, glu, scanned)]


def reference(case: Case, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Importances and constants by least squares on Jacobians."""
    count = case.units
    start = jnp.ones(count), jnp.zeros((count, max(case.values, 1)))
    move = lambda gates, shifts: case.network(case.params, case.inputs, gates, shifts)  # noqa: E731
    outputs, of_gates, of_shifts = move(*start), *jax.jacfwd(move, (0, 1))(*start)
    if metric == "fisher":
        p = np.asarray(jax.nn.softmax(outputs))
        rows = np.sqrt(p)[..., None] * (np.eye(p.shape[-1]) - p[..., None, :])
        of_gates = np.einsum("...ij,...ju->...iu", rows, of_gates)
        of_shifts = np.einsum("...ij,...juv->...iuv", rows, of_shifts)
    a = np.asarray(of_gates).reshape(-1, count)
    b = np.asarray(of_shifts).reshape(-1, count, max(case.values, 1))[..., : case.values]
    constants = np.stack([np.linalg.lstsq(b[:, u], a[:, u])[0] for u in range(count)])
    left = [np.sum((a[:, u] - b[:, u] @ constants[u]) ** 2) for u in range(count)]
    return np.array(left) / len(case.inputs), constants


@pytest.mark.parametrize("make", [*CASES, *LATER])
def test_importances_and_constants_by_their_definition(make):
    case = make()
    for metric in ("euclidean", "fisher"):
        found = score.neuron_elimination_compensation(*case[:3], metric=metric, batch_size=5)
        importance, constants = reference(case, metric)
        np.testing.assert_allclose(found.importance[case.name], importance, rtol=1e-8, atol=1e-14)
        values = found.constant[case.name].reshape(len(importance), -1)
        np.testing.assert_allclose(values, constants, rtol=1e-7, atol=1e-10)


def shrunk(params, groups, factor):
    """The first unit of each group made small in all leaves."""
    found = dict(_trees.by_path(params))
    for group in groups.values():
        for place in group.places:
            shape = [-1 if axis == place.axis else 1 for axis in range(found[place.path].ndim)]
            along = np.where(np.asarray(place.units) == 0, factor, 1.0).reshape(shape)
            found[place.path] = found[place.path] * along
    return _trees.replace(params, found)


SHRUNK = ("low rank", "split heads")
SLOW = (
    "vision transformer",
    "gated transformer",
    "scanned blocks",
    "causal attention",
    "autoencoder",
    "u-net",
    "mixer",
)
SLOW += (
    "residual network",
    "dense connections",
    "squeeze and excitation",
    "equinox attention",
    "spectral",
    "recurrent",
)
SLOW += ("grouped convolutions", "convolutions", "tied embedding", "experts", "scanned attention", "rotary attention")


@pytest.mark.parametrize("name", [*SHRUNK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_removing_a_small_unit_changes_the_outputs_by_its_importance(name):
    network, params, inputs = ARCHITECTURES[name]().example
    network = _trees.WithStatic(network, _trees.static_leaves(params))
    inputs = double(inputs)
    more = [inputs + 0.3 * i if inputs.dtype == jnp.float64 else (inputs + i) % 7 for i in range(6)]
    inputs = jnp.concatenate(more)
    groups = networks.groups(network, double(_trees.arrays(params)), inputs).named
    params = shrunk(double(_trees.arrays(params)), groups, 1e-3)
    scores, outputs = score.neuron_elimination_compensation(network, params, inputs), network(params, inputs)
    for group in groups:
        length = len(scores.importance[group])
        chosen = score.NeuronScores({group: jnp.arange(length)}, {group: scores.constant[group]})
        pruned = prune.neurons(network, params, inputs, 1 / length, criterion=lambda *_, chosen=chosen: chosen)
        change = float(((network(pruned.params, inputs) - outputs) ** 2).sum() / len(inputs))
        np.testing.assert_allclose(scores.importance[group][0], change if length > 1 else 0, rtol=1e-2, atol=1e-20)


def test_a_multilayer_perceptron_gets_the_same_from_its_moments():
    example = examples.mlp()
    groups = tuple(networks.groups(*example).named.items())
    asked = units.Asked(example.network, groups, (), batch_size=5)
    given = metrics.Fisher(), example.params, example.inputs, None, None
    importance, constants = units.importance_and_constants(asked, *given)
    found = score.neuron_elimination_compensation(*example, metric="fisher", batch_size=5)
    for name, _ in groups:
        np.testing.assert_allclose(importance[name], found.importance[name], rtol=1e-9)
        np.testing.assert_allclose(constants[name][:, 0], found.constant[name], rtol=1e-9)


@pytest.mark.slow
def test_probes_stand_in_for_all_rows():
    case = heads()
    exact = score.neuron_elimination_compensation(*case[:3], metric="fisher").importance
    given = {"metric": "fisher", "probes": 400, "key": jax.random.key(0)}
    found = score.neuron_elimination_compensation(*case[:3], **given).importance
    for name, values in exact.items():
        np.testing.assert_allclose(found[name], values, rtol=0.2)


def test_samples_of_no_weight_and_one_sample_and_jit():
    network, params, inputs, name, *_ = glu()
    found = score.neuron_elimination_compensation(network, params, inputs[:7])
    weights = jnp.where(jnp.arange(N) < 7, 1.0, 0)
    half = score.neuron_elimination_compensation(network, params, inputs, weights=weights, batch_size=4)
    np.testing.assert_allclose(half.importance[name] * N, found.importance[name] * 7, rtol=1e-9)
    jitted = jax.jit(lambda params, x: score.neuron_elimination_compensation(network, params, x))(params, inputs[:7])
    np.testing.assert_allclose(jitted.importance[name], found.importance[name], rtol=1e-9)
    one = score.neuron_elimination_compensation(network, params, inputs[:1])
    hidden = jax.nn.silu(inputs[0] @ params["g"]) * (inputs[0] @ params["a"])
    np.testing.assert_allclose(one.constant[name], hidden, rtol=1e-9)  # what it is there is all that is known
    np.testing.assert_allclose(one.importance[name], 0, atol=1e-12)


def test_values_far_from_zero_cancel_nothing_in_single_precision():
    case = heads()
    params = case.params | {"vb": case.params["vb"] + 1000}  # nearly the same for all samples
    expected = score.neuron_elimination_compensation(case.network, params, case.inputs).importance["q"]
    single = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)  # noqa: E731
    found = score.neuron_elimination_compensation(case.network, single(params), single(case.inputs)).importance["q"]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-2)


@given(rows=st.integers(1, 6), values=st.integers(0, 4), dropped=st.integers(0, 3), seed=st.integers(0, 99))
def test_the_least_of_a_parabola_in_several_constants(rows, values, dropped, seed):
    generator = np.random.default_rng(seed)
    a, b = (
        generator.normal(size=(rows, 2)),
        generator.normal(size=(rows, 2, values)) * 10.0 ** generator.integers(-3, 3),
    )
    b[:, :, :dropped] = b[:, :, :1]  # that can't be told apart
    sums = units.Sums((a**2).sum(0), np.einsum("nu,nuv->uv", a, b), np.einsum("nuv,nuw->uvw", b, b))
    left, constant = units.least(units.Sums(*map(jnp.asarray, sums)))
    for unit in range(2):
        expected = np.linalg.lstsq(b[:, unit], a[:, unit])[0] if values else np.zeros(0)
        remainder = ((a[:, unit] - b[:, unit] @ expected) ** 2).sum()
        np.testing.assert_allclose(left[unit], remainder, atol=1e-9 * (1 + (a[:, unit] ** 2).sum()))
        found = ((a[:, unit] - b[:, unit] @ np.asarray(constant[unit])) ** 2).sum()
        np.testing.assert_allclose(found, remainder, atol=1e-9 * (1 + (a[:, unit] ** 2).sum()))


def test_baselines_of_groups():
    case = heads()
    found = score.neuron_norm(*case[:3]).importance["q"]
    kernels = [case.params[name] for name in "qkv"]
    np.testing.assert_allclose(found, np.sqrt(sum((np.asarray(k) ** 2).sum((0, 2)) for k in kernels)))
    squares = sum((np.asarray(k) ** 2).sum((0, 2)) for k in kernels) + (np.asarray(case.params["o"]) ** 2).sum((1, 2))
    np.testing.assert_allclose(score.neuron_group_norm(*case[:3]).importance["q"], squares / squares.mean())
    found = score.neuron_variance(*case[:3])
    v = jnp.einsum("ntd,dhf->nthf", case.inputs, case.params["v"]) + case.params["vb"]
    q, k = (jnp.einsum("ntd,dhf->nthf", case.inputs, case.params[n]) + case.params[f"{n}b"] for n in "qk")
    mixed = jnp.einsum("nhts,nshf->nthf", jax.nn.softmax(jnp.einsum("nthf,nshf->nhts", q, k)), v)
    np.testing.assert_allclose(found.importance["q"], mixed.var((0, 1)).mean(1))
    np.testing.assert_allclose(found.constant["q"], mixed.mean((0, 1)))
    draw = lambda key: score.neuron_random(*case[:3], key=jax.random.key(key)).importance  # noqa: E731
    assert {name: leaf.shape for name, leaf in draw(0).items()} == {"q": (3,), "q (2)": (2,), "v": (2,)}
    np.testing.assert_array_equal(draw(0)["v"], draw(0)["v"])
    assert (draw(0)["v"] != draw(1)["v"]).all()


def test_units_that_are_read_out_of_sight_are_refused_and_others_scored():
    network, params, inputs = ARCHITECTURES["looped"]().example
    for criterion in (score.neuron_elimination_compensation, score.neuron_variance):
        with pytest.raises(
            ValueError, match=r"'in' can't be scored: they are summed over inside a (branch|while loop)"
        ):
            criterion(network, params, inputs)
    assert score.neuron_norm(network, params, inputs).importance["in"].shape == (6,)


def test_too_few_rows_to_tell_constants_by():
    network, params, inputs, *_ = heads()
    with pytest.raises(ValueError, match=r"'q' has 2 values .* 1 inputs give only 3 rows of the metric .* at least 4"):
        score.neuron_elimination_compensation(network, params, inputs[:1])
    given = {"probes": 1, "key": jax.random.key(0)}
    with pytest.raises(ValueError, match="3 inputs with 1 probes give only 3 rows"):
        score.neuron_elimination_compensation(network, params, inputs[:3], **given)


def test_an_excluded_bias_does_not_move_and_its_groups_go_on():
    case = glu()
    free = score.neuron_elimination_compensation(*case[:3])
    held = score.neuron_elimination_compensation(*case[:3], exclude="c")
    assert held.constant["g"].shape == (6, 0)
    assert (held.importance["g"] >= free.importance["g"]).all()
    pruned = prune.neurons(*case[:3], 0.5, exclude="c")
    np.testing.assert_array_equal(pruned.params["c"], case.params["c"])
