import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ecjax import networks, prune, repair, score, staged
from tests import examples
from tests.trained import DATA, INPUTS, NETWORK, params

VALIDATION, VALIDATION_LABELS = (jnp.asarray(part[1000:]) for part in (DATA.train_inputs, DATA.train_targets))


@pytest.fixture(scope="module")
def trained():
    return params()


def accuracy(params):
    return (NETWORK(params, VALIDATION).argmax(-1) == VALIDATION_LABELS).mean()


SMALL = examples.mlp()
QUICK = {"repair": None, "criterion": "magnitude"}
afford = functools.partial(prune.afford, SMALL.network, SMALL.params, SMALL.inputs, **QUICK)
unchecked = functools.partial(  # as it is without the tests' own type checks
    inspect.unwrap(prune.afford), SMALL.network, SMALL.params, SMALL.inputs, **QUICK
)


def kept(params):
    """How many weights are not zero."""
    return sum(int(jnp.sum(leaf != 0)) for leaf in jax.tree.leaves(examples.kernels(params)))


WEIGHTS = kept(SMALL.params)


@pytest.mark.slow
def test_the_digits_with_a_validation_split(trained):
    told = []
    found = prune.afford(NETWORK, trained, INPUTS, accuracy, most_lost=0.02, metric="fisher", progress=told.append)
    assert accuracy(found.params) >= accuracy(trained) - 0.02
    assert float(accuracy(found.params)) == found.found.value
    assert prune.sparsity(found.masks) == found.found.sparsity > 0.9
    assert not any(tried.affordable for tried in found.curve if tried.sparsity > found.found.sparsity)
    above = min(tried.sparsity for tried in found.curve if tried.sparsity > found.found.sparsity)
    assert above - found.found.sparsity < 0.01
    assert sorted(told) == list(found.curve)
    assert (found.stages, found.evaluations) == (16, 17)
    for path, mask in networks.by_path(found.masks).items():
        np.testing.assert_array_equal(np.asarray(networks.by_path(found.params)[path])[~np.asarray(mask)], 0)


def test_the_run_is_that_of_staged(trained):
    how = {"repair": repair.Biases(iterations=1), "metric": "fisher"}
    found = prune.afford(NETWORK, trained, INPUTS, lambda _: 0.0, most_lost=0, sparsest=0.9, stages=3, **how)
    pruned = prune.staged(NETWORK, trained, INPUTS, 0.9, stages=3, **how)
    jax.tree.map(np.testing.assert_array_equal, (found.params, found.masks), tuple(pruned))
    assert "Nothing sparser was tried: raise sparsest." in repr(found)


@given(
    values=st.lists(st.floats(-10, 10), min_size=WEIGHTS + 1, max_size=WEIGHTS + 1),
    most_lost=st.floats(0, 20),
    sparsest=st.floats(0, 1),
    stages=st.integers(1, 5),
    halvings=st.integers(1, 5),
)
def test_whatever_the_values_what_comes_back_is_the_sparsest_affordable(values, most_lost, sparsest, stages, halvings):
    """Values of any order, by the number of weights that are left."""
    options = {"most_lost": most_lost, "sparsest": sparsest, "stages": stages, "halvings": halvings}
    dense = values[WEIGHTS]
    assume(not 0 < dense <= 1 <= most_lost)
    found = afford(lambda params: values[kept(params)], **options)
    assert found.least == dense - most_lost
    assert found.found in found.curve
    assert values[kept(found.params)] == found.found.value >= dense - most_lost
    assert kept(found.params) == round(WEIGHTS * (1 - found.found.sparsity))
    for tried in found.curve:
        assert tried.value == values[round(WEIGHTS * (1 - tried.sparsity))]
        assert tried.affordable == (tried.value >= dense - most_lost)
        assert not (tried.affordable and tried.sparsity > found.found.sparsity)
    assert found.curve[0].sparsity == 0
    assert stages <= found.stages <= stages + halvings
    assert found.evaluations == found.stages + 1


@pytest.mark.parametrize("halvings", [1, 2, 20])
def test_bisection_comes_to_the_last_weight_that_may_go(halvings):
    """Where what may go is a number of weights, the gap that is left is at most as long as halvings say."""
    found = afford(lambda params: float(kept(params) >= 41), most_lost=0.5, sparsest=1.0, stages=1, halvings=halvings)
    assert 0 <= kept(found.params) - 41 <= WEIGHTS / 2**halvings + 1
    assert halvings < 20 or kept(found.params) == 41
    assert halvings < 20 or found.stages < 10


def test_the_dense_network_comes_back_where_nothing_may_go():
    found = afford(lambda params: float(kept(params) == WEIGHTS), most_lost=0.5)
    jax.tree.map(np.testing.assert_array_equal, found.params, SMALL.params)
    assert prune.sparsity(found.masks) == 0.0
    assert jax.tree.structure(found.masks) == jax.tree.structure(examples.kernels(SMALL.params))
    assert repr(found).splitlines()[-2] == "No weight may go; 0.5 is affordable, the dense network has 1."


def test_a_sparsity_for_each_pattern():
    found = afford(
        lambda params: float(kept(params) >= 40), most_lost=0, sparsest={"Dense_0/*": 0.9, "Dense_1/*": 0.45}
    )
    first, second = (prune.sparsity(found.masks[name]) for name in ("Dense_0", "Dense_1"))
    assert abs(first - 2 * second) < 0.05
    assert found.masks["Dense_2"]["kernel"] is None
    none = afford(lambda params: float(kept(params) == WEIGHTS), most_lost=0, sparsest={"Dense_0/*": 0.9})
    assert [path for path, _ in networks.by_path(none.masks).items()] == ["Dense_0/kernel"]


def test_excluded_leaves_and_scope():
    found = afford(lambda _: 0.0, most_lost=0, sparsest=0.5, stages=2, scope="layer", exclude="Dense_2/*")
    assert found.masks["Dense_2"]["kernel"] is None
    assert [prune.sparsity(found.masks[name]) for name in ("Dense_0", "Dense_1")] == [18 / 35, 0.5]


def test_runs_repeat_and_draw_anew_in_every_stage():
    how = {"most_lost": 0, "sparsest": 0.5, "stages": 2, "criterion": "random"}
    first, again, other = (afford(lambda _: 0.0, key=jax.random.key(seed), **how) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first.masks, again.masks)
    assert not np.array_equal(first.masks["Dense_0"]["kernel"], other.masks["Dense_0"]["kernel"])


def test_the_loop_can_be_told_apart_from_evaluation():
    """What is evaluated is what the stages by hand give."""
    seen = []
    afford(lambda params: seen.append(params) or 0.0, most_lost=0, sparsest=0.6, stages=2, halvings=1)
    state = staged.start(SMALL.network, SMALL.params, SMALL.inputs, repair=None)
    for number, reached in enumerate((0.6 * 0.875, 0.6), 1):
        state = staged.step(SMALL.network, state, SMALL.inputs, reached, **QUICK)
        jax.tree.map(np.testing.assert_array_equal, seen[number], state.params)


def test_the_table():
    found = afford(lambda params: float(kept(params)), most_lost=40, sparsest=0.8, stages=2, halvings=1)
    assert repr(found) == (
        "sparsity  value  objective  affordable\n"
        "──────────────────────────────────────\n"
        "0.0000    95                yes\n"
        "0.3474    62                yes\n"
        "0.6947    29                no\n"
        "0.8000    19                no\n"
        "Sparsity 0.3474 has 62; 55 is affordable, the dense network has 95.\n"
        "This took 3 stages and 4 evaluations."
    )
    html = found._repr_html_()
    assert html.count("<tr>") == 5
    assert html.endswith("<p>This took 3 stages and 4 evaluations.</p>")


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (lambda params: math.nan, "evaluate gave NaN for the dense network"),
        (lambda params: 1.0 if kept(params) == WEIGHTS else jnp.nan, r"evaluate gave NaN for sparsity 0\.\d{4}, which"),
        (lambda params: jnp.inf, "evaluate gave inf for the dense network"),
        (lambda params: params, "evaluate gave a dict for the dense network; it must give one number"),
        (lambda params: jnp.ones(3), r"evaluate gave an array of shape \(3,\) for the dense network"),
        (lambda params: None, "evaluate gave a NoneType for the dense network"),
        (0.95, "evaluate is 0.95; it must be a function"),
    ],
)
def test_values_that_are_refused(evaluate, message):
    with pytest.raises(ValueError, match=message):
        unchecked(evaluate, most_lost=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"most_lost": -0.1}, "most_lost is -0.1; it must be a number of at least 0"),
        ({"most_lost": math.nan}, "most_lost is nan"),
        ({"most_lost": "1 %"}, "most_lost is '1 %'"),
        ({"sparsest": 95}, "sparsity is 95; it must be in"),
        ({"sparsest": {"head": 0.5}}, "the pattern 'head' of the sparsity gets no kernel"),
        ({"stages": 0}, "stages is 0"),
        ({"halvings": 0}, "halvings is 0"),
        ({"scope": (2, 4)}, r"scope \(2, 4\) is of one sparsity"),
        ({"scope": "all"}, "scope is 'all'"),
        ({"progress": 3}, "progress is 3; it must be True, for a bar, or a function"),
        ({"exclude": "head/*"}, "the pattern 'head/\\*' matches no leaf"),
        ({"criterion": "size"}, "criterion is 'size'"),
        ({"criterion": "magnitude", "repair": None, "metric": "fisher"}, "read by neither this criterion nor this"),
        ({"criterion": "magnitude", "key": jax.random.key(0)}, "key is for criteria that draw"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        unchecked(lambda _: 0.0, **({"most_lost": 0.01} | options))


def test_values_that_cannot_be_seen():
    with pytest.raises(ValueError, match="can't be seen under jit or vmap; call it outside"):
        jax.jit(lambda number: unchecked(lambda _: number, most_lost=0.01).params)(1.0)


def test_minus_infinity_is_not_affordable():
    found = afford(lambda params: 0.0 if kept(params) > 50 else -math.inf, most_lost=1e6)
    assert kept(found.params) > 50
    assert found.curve[-1].value == -math.inf


def test_a_criterion_of_ones_own_sees_what_is_left():
    left = []

    def criterion(network, params, inputs):
        left.append(kept(params))
        return score.magnitude(network, params, inputs)

    afford(lambda _: 0.0, most_lost=0, sparsest=0.6, stages=2, criterion=criterion)
    assert left == [WEIGHTS, WEIGHTS - round(WEIGHTS * 0.6 * 0.875)]


def test_points_where_evaluate_gives_a_fraction():
    with pytest.raises(
        ValueError, match=r"evaluate gave 0.5 .* with most_lost=1 nothing from 0 to 1 is too low; give a "
    ):
        afford(lambda _: 0.5, most_lost=1)


def test_a_loss_is_asked_about():
    def said(value):
        dense, found = prune.Tried(0.0, 0.56, float("inf"), True), prune.Tried(0.99, value, 0.01, True)
        return str(prune.Afforded({}, None, found, 0.55, (dense, found)))

    assert "does evaluate give a loss? Higher is better" in said(0.96)
    assert "a loss" not in said(0.565)
    with pytest.warns(UserWarning, match="does evaluate give a loss"):
        afford(lambda params: 100 - float(kept(params)), most_lost=1, sparsest=0.95, stages=2, halvings=1)
