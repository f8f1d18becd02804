"""Whole units of any network removed: how many go, what they cost, and what stays at zero afterwards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecjax import _trees, compact, graph, networks, prune, repair, score, staged, train
from ecjax.graph import costs
from ecjax.prune import units
from tests import examples
from tests.architectures import ARCHITECTURES
from tests.test_coupled import double, size
from tests.test_units import convnet, glu, heads, residual, scanned
from tests.zoo import array

pytestmark = pytest.mark.usefixtures("float64")


def left_in(case, pruned):
    """How many units of each group have an entry that is not zero."""
    found = networks.groups(*case[:3]).named
    leaves = _trees.by_path(pruned.params)
    alive = {name: graph.gone.gone({name: group}, leaves, {})[name] for name, group in found.items()}
    return {name: int((~gone).sum()) for name, gone in alive.items()}


def assert_smaller(network, pruned, inputs, most):
    """The compacted network answers alike and has at most so many parameters."""
    smaller, small = compact.compact(network, pruned.params, inputs)
    expected = network(pruned.params, inputs)
    np.testing.assert_allclose(smaller(small, inputs), expected, rtol=1e-9, atol=1e-11)
    assert size(small) <= most
    return small


def test_a_channel_of_a_residual_stream_goes_from_every_leaf():
    case = residual()
    pruned = prune.neurons(*case[:3], 0.5)
    small = assert_smaller(case.network, pruned, case.inputs, size(case.params))
    shapes = {name: leaf.shape for name, leaf in small.items()}
    assert shapes == {
        "a": (5, 3),
        "b": (3,),
        "scale": (3,),
        "shift": (3,),
        "c": (3, 3),
        "d": (3,),
        "e": (3, 3),
        "f": (3,),
    }
    assert {name for name, mask in pruned.masks.items() if mask is not None} == {"a", "c", "e"}
    kept = 5 * 3 + 3 * 3 + 3 * 3
    np.testing.assert_allclose(prune.sparsity(pruned.masks), 1 - kept / (5 * 6 + 6 * 6 + 6 * 3))


def test_constants_of_two_groups_are_added_once_where_they_meet():
    """A head and a feature have entries in common: the outputs are those of the network without both."""
    case = heads()
    ones = {"q": jnp.ones((3, 2)), "q (2)": jnp.zeros((2, 0)), "v": jnp.ones((2, 3))}
    importance = {"q": jnp.array([0.0, 5, 5]), "q (2)": jnp.array([5.0, 5]), "v": jnp.array([0.0, 5])}
    scores = score.NeuronScores(importance, ones)
    pruned = prune.neurons(*case[:3], 2 / 7, criterion=lambda *_: scores)
    gone = np.zeros((3, 2), bool)
    gone[0], gone[:, 0] = True, True
    moved = case.params["ob"] + np.einsum("hf,hfo->o", gone, case.params["o"])
    np.testing.assert_allclose(pruned.params["ob"], moved)
    assert left_in(case, pruned) == {"q": 2, "q (2)": 2, "v": 1}


@pytest.mark.parametrize("by", ["parameters", "flops"])
@pytest.mark.parametrize("make", [residual, pytest.param(heads, marks=pytest.mark.slow)])
def test_a_fraction_of_what_the_network_costs(make, by):
    case = make()
    pruned = prune.neurons(*case[:3], 0.4, by=by)
    coupled = graph.groups.couple(case.network, case.params, case.inputs)
    atoms = [atom for atom, group in graph.groups.by_atom(coupled).items() if group.free]
    left = left_in(case, pruned)
    cost = lambda left: costs.COSTS[by](coupled, dict(zip(atoms, left, strict=True)))  # noqa: E731
    now, before = cost(left.values()), cost([len(v) for v in score.neuron_norm(*case[:3]).importance.values()])
    assert now <= 0.6 * before
    one_more = [cost([count + (name == more) for name, count in left.items()]) for more in left]
    assert max(one_more) > 0.6 * before  # and no more went than had to
    if by == "parameters":
        assert assert_smaller(case.network, pruned, case.inputs, now) is not None
        assert before == size(case.params)


def test_floating_point_operations_by_hand():
    def flops(case, **left):
        coupled = graph.groups.couple(case.network, case.params, case.inputs)
        groups = graph.groups.by_atom(coupled)
        named = zip(graph.Groups(groups.values()).named, [a for a, group in groups.items() if group.free], strict=True)
        return costs.flops(coupled, {atom: left[name] for name, atom in named if name in left}) / len(case.inputs)

    terms = 6 * 3 - 2  # two of a window are padded zeros
    assert flops(convnet()) == 2 * (terms * 2 * 4 + terms * 4 * 5 + 5 * 3)
    assert flops(convnet(), a=3) == 2 * (terms * 2 * 3 + terms * 3 * 5 + 5 * 3)
    assert flops(scanned()) == 2 * (4 * 5 + 3 * 2 * 5 * 6 + 5 * 2)  # three turns
    assert flops(scanned(), w=2) == 2 * (4 * 5 + 3 * 2 * 5 * 2 + 5 * 2)
    projections, mixing = 4 * 3 * (4 * 6) + 4 * 6 * 3, 2 * 4 * 4 * 6
    assert flops(heads()) == 2 * (projections + mixing)
    assert flops(heads(), q=1) == 2 * (projections + mixing) / 3

    case = residual()  # what compaction leaves takes what was counted
    pruned = prune.neurons(*case[:3], 0.4, criterion="neuron_norm")
    smaller, small = compact.compact(case.network, pruned.params, case.inputs)
    counted = graph.count_flops(smaller, small, case.inputs).products / len(case.inputs)
    assert flops(case, a=left_in(case, pruned)["a"]) == counted


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    fraction=st.floats(0, 1),
    multiple_of=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_blocks_of_the_least_important_units_go(lengths, fraction, multiple_of, seed):
    generator = np.random.default_rng(seed)
    importance = {str(i): jnp.asarray(generator.integers(0, 5, n).astype(float)) for i, n in enumerate(lengths)}
    kept = units.kept(importance, fraction, multiple_of=multiple_of)
    traced = jax.jit(functools.partial(units.kept, multiple_of=multiple_of))(importance, fraction)
    jax.tree.map(np.testing.assert_array_equal, kept, traced)
    gone = sum(int((~stay).sum()) for stay in kept.values())
    able = sum(int(units.sizes_of(n, multiple_of).sum()) for n in lengths)
    wanted = round(fraction * sum(lengths))
    assert min(wanted, able) <= gone < wanted + max(multiple_of, max(lengths))
    if multiple_of == 1:
        assert gone == min(wanted, able)
    for name, stay in kept.items():
        count = int(stay.sum())
        assert count == len(stay) or (count % multiple_of == 0 and count > 0)
        values = np.asarray(importance[name])
        assert values[~np.asarray(stay)].max(initial=-1) <= values[np.asarray(stay)].min(initial=9)


def test_stages_that_went_further_than_they_were_asked_to_go_on_from_there():
    importance = {"a": jnp.array([-jnp.inf, -jnp.inf, 3.0, 1.0]), "b": jnp.array([0.0, 5.0, 5.0, 5.0])}
    kept = units.kept(importance, 0.125, multiple_of=2)
    assert [stay.tolist() for stay in kept.values()] == [[False, False, True, True], [True] * 4]
    cost = lambda left: 10 * left[0] + left[1]  # noqa: E731 two units of the first group are nearly half
    for fraction, gone in ((0.4, 0), (0.47, 1)):
        kept = units.kept(importance, fraction, cost=cost)
        assert [stay.tolist() for stay in kept.values()] == [[False, False, True, True], [not gone, *[True] * 3]]


def test_multiples_for_accelerators():
    example = examples.mlp(widths=(12, 9, 3))
    pruned = prune.neurons(*example, 0.2, multiple_of=4, criterion="neuron_norm")
    small = compact.fold(example.network, pruned.params, example.inputs)
    widths = [small[f"Dense_{layer}"]["kernel"].shape[1] for layer in (0, 1)]
    assert widths in ([12, 4], [8, 8], [8, 9], [4, 9])
    assert sum(widths) <= 21 - round(0.2 * 21)


@pytest.mark.parametrize("how", [*repair.REPAIRS, pytest.param(None, marks=pytest.mark.slow)])
def test_stages_keep_removed_units_at_zero_in_all_leaves(how):
    case = residual()
    told = []
    options = {"stages": 2, "repair": how, "metric": "fisher", "progress": told.append}
    pruned = prune.staged_neurons(*case[:3], 0.5, **options)
    assert left_in(case, pruned) == {"a": 3}
    assert [stage.sparsity for stage in told] == [0.4375, 0.5]
    assert_smaller(case.network, pruned, case.inputs, 5 * 3 + 3 * 3 + 9 + 3 + 9 + 3)


def test_repairs_and_fine_tuning_leave_scales_and_biases_of_removed_units_alone():
    case = residual()
    once = prune.neurons(*case[:3], 0.5)
    targets = case.network(case.params, case.inputs)
    moved = repair.Survivors(iterations=2)(case.network, *once, case.inputs, targets)
    squares = lambda outputs, targets: ((outputs - targets) ** 2).sum(-1)  # noqa: E731
    fit = {"loss": squares, "optimizer": optax.sgd(0.01), "key": jax.random.key(0), "epochs": 1}
    tuned = train.fit(case.network, once.params, case.inputs, targets, masks=once.masks, **fit).params
    for params in (moved, tuned):
        found = prune.Pruned(params, once.masks)
        assert left_in(case, found) == {"a": 3}
        assert (params["scale"] != once.params["scale"]).sum() == 3
        assert_smaller(case.network, found, case.inputs, 5 * 3 + 3 * 3 + 9 + 3 + 9 + 3)

    def own(network, params, masks, inputs, targets):  # noqa: ARG001 a repair that moves everything
        return jax.tree.map(lambda leaf: leaf + 0.1, params)

    state = staged.start(*case[:3], repair=own)
    how = {"criterion": "neuron_norm", "repair": own}
    state = staged.step(case.network, state, case.inputs, 0.5, **how)
    assert left_in(case, staged.finish(state)) == {"a": 3}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vision transformer", "residual network", "scanned blocks", "causal attention"])
def test_half_of_the_operations_of_a_network_in_stages(name):
    network, params, inputs = ARCHITECTURES[name]().example
    params, inputs = double(params), double(inputs)
    inputs = jnp.concatenate([inputs + 0.3 * i for i in range(8)])
    options = {"stages": 2, "by": "flops", "repair": repair.Survivors(iterations=1)}
    pruned = prune.staged_neurons(network, params, inputs, 0.5, **options)
    small = assert_smaller(network, pruned, inputs, 0.9 * size(params))
    assert size(small) < size(params)


def test_networks_of_which_nothing_can_go():
    params = {"w": array(4, 3)}
    network = lambda params, x: jax.nn.softmax(x @ params["w"])  # noqa: E731
    with pytest.raises(ValueError, match=r"no unit of this network can go: the 3 made by w \(.* as softmax does"):
        prune.neurons(network, params, array(5, 4), 0.5)
    assert score.neuron_elimination_compensation(network, params, array(5, 4)).importance == {}
    looped = ARCHITECTURES["looped"]().example
    with pytest.raises(ValueError, match="the units made by 'in' can't be scored"):
        prune.staged_neurons(*looped, 0.5, repair=None)
    pruned = prune.neurons(*looped, 0.5, criterion="neuron_norm")
    assert left_in(looped, pruned) == {"in": 3}


def test_units_are_removed_under_jit_and_vmap():
    case = glu()
    removed = lambda params, fraction: prune.neurons(case.network, params, case.inputs, fraction)  # noqa: E731
    expected = removed(case.params, 0.5)
    found = jax.jit(removed)(case.params, 0.5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), found, expected)
    seeds = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), case.params)
    both = jax.vmap(lambda params: removed(params, 0.5))(seeds)
    np.testing.assert_allclose(both.params["b"][0], expected.params["b"], rtol=1e-9)
    assert (both.masks["b"].any(-1).sum(-1) == 3).all()
