"""Coupled axes, and networks with fewer units: architectures of every kind, and what is not understood."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.interpreters import mlir

from ecjax import _trees, graph, networks
from ecjax.graph.atoms import Atoms
from tests import examples
from tests.architectures import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("float64")
QUICK = ("vision transformer", "dense connections", "scanned blocks", "straight through")
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]


def double(tree):
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )


def half(groups, seed=0):
    generator = np.random.default_rng(seed)
    return {
        index: generator.permutation(group.length)[: (group.length + 1) // 2]
        for index, group in enumerate(groups)
        if group.free
    }


def size(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params) if _trees.is_array(leaf))


def compared(network, params, inputs, groups, removed, differentiated=True):
    """The gradients and outputs of a smaller network, next to those of the network with zeros; the smaller network."""
    network, params, _ = _trees.split(network, params)
    smaller, small = graph.without_units(network, params, groups, removed)
    zeros = graph.zeroed(params, groups, removed)

    def with_gradient(network, params, inputs):
        def loss(params):
            outputs = network(params, inputs)
            return (jnp.sin(outputs) * jnp.arange(outputs.size).reshape(outputs.shape)).sum(), outputs

        return jax.grad(loss, has_aux=True, allow_int=True)(params) if differentiated else (None, loss(params)[1])

    found, expected = jax.jit(
        lambda small, zeros, inputs: (with_gradient(smaller, small, inputs), with_gradient(network, zeros, inputs))
    )(small, zeros, inputs)
    return found, expected, smaller, small


@pytest.mark.parametrize("name", CASES)
def test_half_of_the_units_go_and_the_rest_computes_the_same(name):
    (network, params, inputs), free, reasons = ARCHITECTURES[name]()
    params, inputs = double(_trees.arrays(params)), double(inputs)
    network = _trees.WithStatic(network, _trees.static_leaves(ARCHITECTURES[name]().example.params))
    groups = networks.groups(network, params, inputs)
    assert sorted(group.length for group in groups if group.free) == sorted(free), groups
    for reason in reasons:
        assert any(reason in told for group in groups for told in group.reasons), groups
    removed = half(groups)
    given, differentiated = (network, params, inputs, groups, removed), name != "looped"  # no loop has a gradient
    (gradient, outputs), (of_zeros, expected), smaller, small = compared(*given, differentiated)
    scale = float(jnp.abs(expected).max())
    precise = 1e-12 if outputs.dtype == jnp.float64 else 1e-5  # layers that compute in single precision
    np.testing.assert_allclose(outputs, expected, rtol=precise, atol=precise * scale)
    assert size(small) < size(params)
    for path, leaf in _trees.by_path(gradient).items():
        full = np.asarray(_trees.by_path(of_zeros)[path])
        for axis, kept in enumerate(graph.smaller.kept_of(params, groups, removed)[path]):
            full = full.compress(kept, axis)
        atol = 100 * precise * max(np.abs(full).max(initial=0), 1)
        np.testing.assert_allclose(leaf, full, rtol=100 * precise, atol=atol, err_msg=path)
    one = smaller(small, inputs[:1])
    np.testing.assert_allclose(one, expected[:1], rtol=precise, atol=precise * scale)


def made_up_primitive():
    """What no library can know: it reverses the units, so that leaving one out would give another answer."""
    primitive = core.Primitive("made_up")
    primitive.def_impl(lambda x: x[:, ::-1])
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(primitive, mlir.lower_fun(lambda x: x[:, ::-1], multiple_results=False))
    return primitive.bind


def test_an_unknown_primitive_costs_a_group_and_no_answer():
    made_up = made_up_primitive()
    example = examples.mlp(widths=(7, 6, 3))

    def network(params, x):
        hidden = made_up(jnp.tanh(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]))
        return jnp.tanh(hidden @ params["Dense_1"]["kernel"]) @ params["Dense_2"]["kernel"]

    groups = networks.groups(network, example.params, example.inputs)
    assert [group.length for group in groups if group.free] == [6]
    reasons = {group.reasons for group in groups if group.length == 7}
    assert reasons == {(f"goes through 'made_up' of ({len(example.inputs)}, 7), which is not known here",)}
    with pytest.raises(ValueError, match=r"units made by Dense_0/kernel can't go: goes through 'made_up'"):
        graph.without_units(network, example.params, groups, {0: [1]})
    given = (network, example.params, example.inputs, groups, {1: [0, 2]})
    found, expected, _, small = compared(*given, differentiated=False)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-12)
    assert small["Dense_1"]["kernel"].shape == (7, 4)


@pytest.mark.parametrize(
    ("norm", "free"),
    [
        (lambda h: h - h.mean(-1, keepdims=True), True),
        (lambda h: h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-6), True),
        (lambda h: nn.standardize(h, variance=h.var(-1, keepdims=True)), False),
        (jax.nn.softmax, False),
        (lambda h: h / h.max(-1, keepdims=True), False),
        (lambda h: h[:, ::-1], False),
        (lambda h: jnp.cumsum(h, 1), False),
        (lambda h: jnp.sort(h, 1), False),
        (lambda h: h[:, ::2], False),
        (lambda h: jnp.roll(h, 1, axis=1), True),
        (lambda h: jax.nn.sigmoid(h).sum(-1, keepdims=True) * h, False),
        (lambda h: jnp.tanh(h).sum(-1, keepdims=True) * h, True),
        (lambda h: h * jnp.arange(6.0), True),
        (lambda h: jnp.where(h > 0, h, -0.3 * h).reshape(-1, 3, 2).sum(1), True),
    ],
)
def test_norms_and_orders_of_units(norm, free):
    """What mixes units keeps them, unless it adds them up and a unit without weights adds nothing."""
    generator = np.random.default_rng(0)
    inputs = jnp.asarray(generator.normal(size=(5, 4)))
    params = {"a": jnp.asarray(generator.normal(size=(4, 6))), "b": jnp.asarray(generator.normal(size=6))}
    width = norm(inputs @ params["a"]).shape[1]
    params["c"] = jnp.asarray(generator.normal(size=(width, 2)))
    network = lambda params, x: norm(x @ params["a"] + params["b"]) @ params["c"]  # noqa: E731
    groups = networks.groups(network, params, inputs)
    own = [group for group in groups if any(place.path == "a" and place.axis == 1 for place in group.places)]
    assert any(group.free for group in own) == free, groups
    for index, group in enumerate(groups):
        if group.free:
            smaller, small = graph.without_units(network, params, groups, {index: [0]})
            expected = network(graph.zeroed(params, groups, {index: [0]}), inputs)
            np.testing.assert_allclose(smaller(small, inputs), expected, rtol=1e-12, atol=1e-13)


def test_shifted_units_are_one_unit():
    """Of axes that are shifted against each other every entry is the same unit; none can go alone."""
    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((5, 2))}

    def network(params, x):
        hidden = x @ params["a"]
        return jnp.tanh(hidden[:, 1:] * hidden[:, :-1]) @ params["b"]

    groups = networks.groups(network, params, jnp.ones((3, 4)))
    assert all(group.length == 1 or not group.free for group in groups)


def test_a_smaller_network_is_a_network():
    example = examples.mlp(widths=(7, 6, 3))
    groups = networks.groups(*example)
    smaller, small = graph.without_units(example.network, example.params, groups, {0: [0, 3], 1: [5]})
    expected = example.network(graph.zeroed(example.params, groups, {0: [0, 3], 1: [5]}), example.inputs)
    for found in (
        jax.jit(smaller)(small, example.inputs),
        jax.vmap(lambda x: smaller(small, x[None])[0])(example.inputs),
        jnp.concatenate([smaller(small, example.inputs[i : i + 3]) for i in range(0, len(example.inputs), 3)]),
        jax.vmap(smaller, (0, None))(jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), small), example.inputs)[1],
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    again = networks.groups(smaller, small, example.inputs)
    assert [group.length for group in again if group.free] == [5, 5]
    smallest, fewest = graph.without_units(smaller, small, again, {0: [1], 1: [0, 1, 2, 3, 4]})
    assert fewest["Dense_2"]["kernel"].shape == (0, 3)
    np.testing.assert_allclose(smallest(fewest, example.inputs)[0], example.params["Dense_2"]["bias"], rtol=1e-12)
    with pytest.raises(ValueError, match=r"do not fit the smaller network at 'Dense_0/bias': \(7,\) given, not \(5,\)"):
        smaller(example.params, example.inputs)
    with pytest.raises(ValueError, match="units \\[7\\] are to go, of a group of 7"):
        graph.without_units(example.network, example.params, groups, {0: [7]})


def test_groups_are_shown_as_a_table_and_as_html():
    example = examples.mlp(widths=(7, 3))
    groups = networks.groups(*example)
    assert str(groups).splitlines()[0].split() == ["units", "made", "by", "read", "by", "can", "go"]
    assert "<td>no: is an axis of the outputs</td>" in groups._repr_html_()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), example.params)
    assert networks.groups(example.network, shapes, jax.ShapeDtypeStruct((1, 5), float)) == groups


def test_axes_are_matched_position_by_position():
    atoms = Atoms()
    whole, parts = atoms.new(12), [atoms.new(5), atoms.new(7)]
    atoms.unify(whole, atoms.joined(parts), "does not fit")
    assert atoms.smallest(whole) == [*parts[0], *parts[1]]
    heads = atoms.reshaped((atoms.new(12),), (3, 4), "torn")
    merged = atoms.reshaped(heads, (12,), "torn")
    assert [atoms.lengths[atom] for atom in atoms.expand(merged[0])] == [3, 4]
    atoms.unify(merged[0], atoms.new(12), "does not fit")
    assert not atoms.pins
    atoms.unify(merged[0], whole, "does not fit")
    assert atoms.pinned(whole) == atoms.pinned(merged[0]) == ("does not fit",)


def test_a_cut_that_tears_an_atom_pins_it():
    atoms = Atoms()
    (axis,) = atoms.reshaped((atoms.new(3), atoms.new(4)), (12,), "torn")
    first, second = atoms.cut(axis, (8, 4), "cut")
    assert [atoms.lengths[a] for a in atoms.expand(first)] == [2, 4]
    assert not atoms.pins
    atoms.cut(axis, (6, 6), "cut in half")
    assert atoms.pinned(axis) == atoms.pinned(first) == atoms.pinned(second) == ("cut in half",)


def test_reshapes_split_and_merge_block_by_block():
    atoms = Atoms()
    axes = tuple(map(atoms.new, (4, 6, 1, 5)))
    found = atoms.reshaped(axes, (2, 2, 3, 2, 1, 5), "torn")
    assert found[5] == axes[3]
    assert found[4] == axes[2]
    assert atoms.expand(axes[0]) == (*found[0], *found[1])
    atoms.reshaped(axes, (8, 3, 5), "torn")
    assert not atoms.pinned(axes[3])
    assert functools.reduce(set.union, (set(atoms.pins[atom]) for atom in atoms.smallest(axes[0]))) <= {"torn"}
