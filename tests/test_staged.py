import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecjax import metrics, networks, prune, repair, score, staged, surgeon
from tests import examples
from tests.trained import DATA, INPUTS, LABELS, NETWORK, params


@pytest.fixture(scope="module")
def trained():
    return params()


def accuracy(params):
    return float((NETWORK(params, DATA.test_inputs).argmax(-1) == DATA.test_targets).mean())


def removed(masks):
    return sum(int((~mask).sum()) for mask in jax.tree.leaves(masks))


def test_each_freedom_to_repair_keeps_more(trained):
    scores = score.elimination_compensation(NETWORK, trained, INPUTS, metric="fisher")
    one_shot = prune.one_shot(trained, scores, 0.93)
    in_stages = {
        name: prune.staged(NETWORK, trained, INPUTS, 0.93, repair=name, metric="fisher")
        for name in (None, *repair.REPAIRS)
    }
    kept = {name: accuracy(pruned.params) for name, pruned in in_stages.items()}
    assert accuracy(one_shot.params) < kept["biases"] - 0.05
    assert kept[None] < kept["biases"] < kept["survivors"]
    assert kept["survivors"] > accuracy(trained) - 0.03


def test_masks_are_exact_and_what_is_removed_stays_removed(trained):
    stages = []
    pruned = prune.staged(NETWORK, trained, INPUTS, 0.9, stages=4, metric="fisher", progress=stages.append)
    assert removed(pruned.masks) == round(0.9 * (64 * 30 + 300))
    assert [stage.number for stage in stages] == [1, 2, 3, 4]
    np.testing.assert_allclose(
        [stage.sparsity for stage in stages], [0.9 * (1 - (1 - t / 4) ** 3) for t in (1, 2, 3, 4)]
    )
    assert stages[-1].objective > stages[0].objective > 0
    for path, mask in networks.by_path(pruned.masks).items():
        np.testing.assert_array_equal(np.asarray(networks.by_path(pruned.params)[path])[~np.asarray(mask)], 0)
    earlier = prune.staged(NETWORK, trained, INPUTS, 0.9 * (1 - 0.75**3), stages=1, metric="fisher")
    both = zip(jax.tree.leaves(earlier.masks), jax.tree.leaves(pruned.masks), strict=True)
    assert not any((~np.asarray(first) & np.asarray(last)).any() for first, last in both)


def test_weights_of_no_importance_do_not_bring_removed_ones_back():
    """A constant input makes importances of exactly 0, the same as those of removed weights."""
    example = examples.mlp()
    inputs = example.inputs.at[:, 2:].set(1.0)
    removed_at = []
    prune_again = functools.partial(prune.staged, example.network, example.params, inputs, repair=None, scope="layer")
    for sparsity, stages in ((0.6 * 0.875, 1), (0.6, 2)):  # the first of two stages, and both
        masks = prune_again(sparsity, stages=stages).masks
        removed_at.append(masks)
        for mask in jax.tree.leaves(masks):
            assert int((~mask).sum()) == round(sparsity * mask.size)
    for first, both in zip(*map(jax.tree.leaves, removed_at), strict=True):
        assert not (~np.asarray(first) & np.asarray(both)).any()


@pytest.mark.parametrize("how", [None, *repair.REPAIRS])
def test_compiled_once_for_all_stages_and_sparsities(trained, compilations, how):
    def run(sparsity, stages):
        return prune.staged(NETWORK, trained, INPUTS, sparsity, stages=stages, repair=how, metric="fisher")

    run(0.5, 2)
    before = compilations()
    run(0.9, 5)
    assert compilations() == before


@pytest.mark.parametrize(
    "criterion",
    [
        score.magnitude,
        functools.partial(score.optimal_brain_damage, metric="fisher"),
    ],
)
def test_any_criterion(trained, criterion):
    pruned = prune.staged(NETWORK, trained, INPUTS, 0.8, stages=4, metric="fisher", criterion=criterion)
    assert removed(pruned.masks) == round(0.8 * 2220)
    assert accuracy(pruned.params) > accuracy(trained) - 0.05


def test_survivors_of_any_other_masks(trained):
    """Random 2:4 masks, and those of the combinatorial brain surgeon."""
    generator = np.random.default_rng(0)

    def two_of_four(kernel):
        ranks = generator.random((kernel.shape[0] // 4 + 1, 4, kernel.shape[1])).argsort(1)
        return jnp.asarray((ranks < 2).reshape(-1, kernel.shape[1])[: kernel.shape[0]])

    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    gradients = surgeon.loss_gradients(NETWORK, trained, INPUTS[:100], LABELS[:100], cross_entropy)
    options = {"damping": 1e-2, "start": "magnitude", "key": jax.random.key(0)}
    targets = NETWORK(trained, INPUTS)
    for masks in (
        jax.tree.map(two_of_four, examples.kernels(trained)),
        surgeon.combinatorial_selection(trained, gradients, 0.9, **options),
    ):
        before = accuracy(prune.apply_masks(trained, masks))
        after = accuracy(repair.Survivors(metric=metrics.Fisher(4.0))(NETWORK, trained, masks, INPUTS, targets))
        assert before < accuracy(trained) - 0.1 < after


def test_a_key_that_another_network_would_need_changes_nothing(trained):
    options = {"stages": 1, "metric": "fisher", "repair": None}
    with_key, without = (
        prune.staged(NETWORK, trained, INPUTS, 0.5, key=k, **options) for k in (jax.random.key(3), None)
    )
    jax.tree.map(np.testing.assert_array_equal, with_key, without)
    units = [prune.staged_neurons(NETWORK, trained, INPUTS, 0.5, key=k, **options) for k in (jax.random.key(3), None)]
    jax.tree.map(np.testing.assert_array_equal, *units)


def test_labels_instead_of_outputs(trained):
    spoilt = jax.tree.map(lambda leaf: 0.3 * leaf, trained)
    spoilt = spoilt | {"Dense_1": jax.tree.map(lambda leaf: leaf[..., ::-1], spoilt["Dense_1"])}
    options = {"metric": "fisher", "stages": 4, "repair": repair.Survivors(metric="fisher")}
    assert accuracy(prune.staged(NETWORK, spoilt, INPUTS, 0.5, **options).params) < 0.3
    assert accuracy(prune.staged(NETWORK, spoilt, INPUTS, 0.5, targets=LABELS, **options).params) > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.5}, "sparsity is 1.5"),
        ({"sparsity": "0.5"}, "sparsity is '0.5', of type str; it must be a number"),
        ({"repair": "weights"}, "repair is 'weights'; it must be one of None, 'biases', 'survivors', or a repair"),
        ({"repair": metrics.Fisher()}, r"repair is Fisher\(temperature=1.0\); it must be one of None"),
        ({"repair": repair.Survivors}, "repair is Survivors, a class; call it"),
        (
            {"metric": repair.Survivors()},
            r"metric is Survivors\(.*; it must be one of 'euclidean', 'fisher', or a metric",
        ),
        (
            {"criterion": "magnitudo"},
            "criterion is 'magnitudo'; it must be one of 'elimination_compensation', .*'magnitude'",
        ),
        ({"criterion": 3}, "criterion is 3; it must be one of"),
        (
            {"criterion": lambda *given: score.Scores(jax.tree.map(jnp.abs, given[1]))},
            "the criterion scores 'Dense_0/bias', which is no kernel",
        ),
        ({"criterion": lambda _, params, __: params}, "the criterion gave dict; score.Scores is needed here"),
        ({"criterion": score.neuron_norm}, "the criterion gave NeuronScores; score.Scores is needed"),
        ({"criterion": "random"}, "this criterion draws at random: give key="),
        ({"criterion": "magnitude", "key": jax.random.key(0)}, "key is for criteria that draw"),
        ({"progress": 3}, "progress is 3; it must be True, for a bar, or a function"),
        ({"repair": None, "targets": LABELS[:50]}, "targets are what a repair aims at, and there is none"),
        (
            {"repair": None, "criterion": "magnitude", "metric": "fisher"},
            "read by neither this criterion nor this repair",
        ),
        ({"stages": 0}, "stages is 0; it must be a whole number of at least 1"),
        ({"samples": 0}, "samples is 0; it must be a whole number of at least 1"),
        ({"samples": 1.5}, "samples is 1.5; it must be a whole number of at least 1, or a fraction"),
        ({"repair": repair.Biases(last_iterations=0)}, "last_iterations is 0; it must be a whole number"),
        ({"metric": "hinge"}, "metric is 'hinge'"),
        ({"scope": "filter"}, "scope is 'filter'"),
        ({"scope": (2, 4)}, r"scope \(2, 4\) says itself how many weights stay; leave the sparsity out"),
        ({"sparsity": None}, "scope 'network' needs a sparsity"),
        ({"inputs": np.zeros((0, 64), np.float32)}, "hold no samples"),
        ({"repair": repair.Survivors(iterations=-1)}, "iterations is -1"),
        ({"repair": lambda *_: {}}, "the repair must give params like those it got"),
        (
            {"repair": lambda *g: jax.tree.map(lambda w: w.astype(jnp.float16), g[1])},
            "must give params like those it got",
        ),
        ({"repair": lambda *g: jax.tree.map(lambda w: w * jnp.nan, g[1])}, "params of the repair 'Dense_0/bias': NaN"),
    ],
)
def test_what_is_refused(trained, change, message):
    arguments = {"inputs": INPUTS[:50], "sparsity": 0.5} | change
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(prune.staged)(NETWORK, trained, **arguments)  # as it is without the tests' own type checks


def test_scores_of_weights_where_neurons_are_asked_for(trained):
    with pytest.raises(ValueError, match=r"the criterion gave Scores; score.NeuronScores is needed"):
        prune.staged_neurons(NETWORK, trained, INPUTS[:50], 0.5, criterion=score.magnitude)
    with pytest.raises(
        ValueError, match="criterion is 'magnitude'; it must be one of 'neuron_elimination_compensation'"
    ):
        prune.staged_neurons(NETWORK, trained, INPUTS[:50], 0.5, criterion="magnitude")


def test_a_misspelt_option(trained):
    with pytest.raises(TypeError, match="unexpected keyword argument 'itterations'"):
        prune.staged(NETWORK, trained, INPUTS[:50], 0.5, itterations=3)


def test_the_loop_by_hand_is_the_same(trained):
    pruned = prune.staged(NETWORK, trained, INPUTS, 0.8, stages=3, metric="fisher")
    state = staged.start(NETWORK, trained, INPUTS, metric="fisher")
    for number, how in enumerate((repair.Survivors(iterations=3), repair.Survivors(iterations=3), "survivors"), 1):
        reached = 0.8 * (1 - (1 - number / 3) ** 3)
        state = staged.step(NETWORK, state, INPUTS, reached, repair=how)
    assert int(state.steps) == 3 + 3 + 10
    jax.tree.map(np.testing.assert_array_equal, staged.finish(state), pruned)
    assert isinstance(jax.tree.map(jnp.zeros_like, state), staged.State)


def test_a_state_knows_its_metric_and_what_is_excluded(trained):
    how = {
        "repair": repair.Survivors(iterations=1),
        "metric": metrics.Fisher(2.0),
        "exclude": ("Dense_0/*", "Dense_1/bias"),
    }
    pruned = prune.staged(NETWORK, trained, INPUTS, 0.5, stages=1, **how)
    state = staged.step(NETWORK, staged.start(NETWORK, trained, INPUTS, **how), INPUTS, 0.5, repair=how["repair"])
    jax.tree.map(np.testing.assert_array_equal, staged.finish(state), pruned)
    assert state.masks["Dense_0"]["kernel"] is None


def test_what_is_excluded_moves_in_a_repair_unless_it_is_frozen(trained):
    options = {"stages": 1, "metric": "fisher", "exclude": "Dense_1/*"}
    how = {"iterations": 1, "products": 3}
    moved, still = (
        prune.staged(NETWORK, trained, INPUTS, 0.5, repair=repair.Survivors(**how, frozen=frozen), **options)
        for frozen in ((), "Dense_1/*")
    )
    for leaf in ("kernel", "bias"):
        assert (moved.params["Dense_1"][leaf] != trained["Dense_1"][leaf]).any()
        np.testing.assert_array_equal(still.params["Dense_1"][leaf], trained["Dense_1"][leaf])
    assert moved.masks["Dense_1"]["kernel"] is None
    assert (still.params["Dense_0"]["kernel"] != moved.params["Dense_0"]["kernel"]).any()


@pytest.mark.parametrize(("stay", "group"), [(2, 4), (1, 3)])
def test_a_pattern_grows_over_the_stages(trained, stay, group):
    how = {"repair": repair.Biases(iterations=1, products=3), "metric": "fisher"}
    state, before = staged.start(NETWORK, trained, INPUTS, **how), None
    for fraction in (0.3, 0.7, 1.0):
        state = staged.step(NETWORK, state, INPUTS, fraction, repair=how["repair"], scope=(stay, group))
        masks = networks.by_path(state.masks)
        done, groups = 0, 0
        for mask in masks.values():
            filled = np.pad(mask, ((0, -len(mask) % group), (0, 0))).reshape(-1, group, mask.shape[1]).sum(1)
            short = len(mask) % group  # of the last group
            whole = filled[:-1] if short else filled
            assert set(np.unique(whole)) <= {stay, group}
            done += (whole == stay).sum() + (short > 0) * (filled[-1] == min(stay, short)).sum()
            groups += filled.size
        assert done == round(fraction * groups)
        if before is not None:
            assert all((mask <= before[path]).all() for path, mask in masks.items())
        before = masks


def test_a_pattern_without_a_repair_is_that_of_one_shot(trained):
    seen, how = [], {"criterion": "magnitude", "repair": None, "stages": 4}
    pruned = prune.staged(NETWORK, trained, INPUTS, scope=(2, 4), progress=seen.append, **how)
    at_once = prune.one_shot(trained, score.magnitude(NETWORK, trained, INPUTS), scope=(2, 4))
    jax.tree.map(np.testing.assert_array_equal, pruned, at_once)
    np.testing.assert_allclose([stage.sparsity for stage in seen], [0.5 * (1 - (1 - t / 4) ** 3) for t in (1, 2, 3, 4)])


@pytest.mark.parametrize("lower", [{"sparsity": 0.3}, {"sparsity": 0.6, "scope": "layer", "criterion": "magnitude"}])
def test_what_was_removed_does_not_come_back(trained, lower):
    state = staged.start(NETWORK, trained, INPUTS, repair=None)
    state = staged.step(NETWORK, state, INPUTS, 0.6, repair=None)
    with pytest.raises(ValueError, match=r"\d+ weights that are removed would come back: the sparsity is lower"):
        staged.step(NETWORK, state, INPUTS, repair=None, **lower)
    without = functools.partial(score.elimination_compensation, exclude="Dense_0/*")
    with pytest.raises(ValueError, match="or the criterion leaves out what is pruned"):
        staged.step(NETWORK, state, INPUTS, 0.8, repair=None, criterion=without)


def test_neurons_do_not_come_back(trained):
    how = {"repair": None, "criterion": "neuron_elimination_compensation"}
    state = staged.step(NETWORK, staged.start(NETWORK, trained, INPUTS, repair=None), INPUTS, 0.5, **how)
    with pytest.raises(ValueError, match="units that are removed would come back"):
        staged.step(NETWORK, state, INPUTS, 0.2, **how)


def test_weights_that_nothing_reads(trained):
    options = {"criterion": "magnitude", "repair": None, "weights": jnp.ones(len(INPUTS))}
    with pytest.raises(ValueError, match="weights are read by neither this criterion nor this repair"):
        prune.staged(NETWORK, trained, INPUTS, 0.5, **options)


def test_equal_weights_change_nothing(trained):
    how = {"stages": 2, "metric": "fisher", "repair": repair.Survivors(iterations=1)}
    one, two = (prune.staged(NETWORK, trained, INPUTS, 0.5, weights=w, **how) for w in (None, jnp.ones(len(INPUTS))))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), one.params, two.params)


def test_a_step_that_draws_needs_a_key(trained):
    state = staged.start(NETWORK, trained, INPUTS, repair=None)
    with pytest.raises(ValueError, match="this criterion draws at random: give key="):
        staged.step(NETWORK, state, INPUTS, 0.5, repair=None, criterion="random")


def test_a_repair_of_ones_own_gets_what_it_takes(trained):
    told = []

    def nothing(_network, params, _masks, _inputs, _targets, *, metric, exclude):
        told.append((metric, exclude))
        return params

    how = {"metric": metrics.Fisher(3.0), "criterion": "magnitude", "exclude": "Dense_0/*"}
    prune.staged(NETWORK, trained, INPUTS, 0.5, stages=1, repair=nothing, **how)
    assert told == [(metrics.Fisher(3.0), ("Dense_0/*",))]


def test_a_criterion_gets_the_metric_as_a_value(trained):
    told = []

    def squares(network, params, inputs, *, metric):
        told.append(metric)
        return score.magnitude(network, params, inputs)

    prune.staged(NETWORK, trained, INPUTS, 0.5, stages=1, repair=None, criterion=squares, metric="fisher")
    assert told == [metrics.Fisher()]


def test_a_stage_goes_through_jit(trained):
    how = {"repair": repair.Biases(iterations=1), "metric": "fisher"}
    state = staged.start(NETWORK, trained, INPUTS, **how)
    step = functools.partial(staged.step, NETWORK, repair=how["repair"])
    found, expected = (one(state, INPUTS, 0.5) for one in (jax.jit(step), step))
    assert removed(found.masks) == removed(expected.masks) == 1110


def test_a_key_is_split_over_the_stages(trained):
    options = {"stages": 2, "repair": None, "criterion": "random"}
    first, again, other = (
        prune.staged(NETWORK, trained, INPUTS, 0.5, key=jax.random.key(seed), **options).masks for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["Dense_0"]["kernel"], other["Dense_0"]["kernel"])


def test_probes_draw_anew_in_every_stage(trained):
    criterion = functools.partial(score.elimination_compensation, probes=1)
    options = {"criterion": criterion, "metric": "fisher", "stages": 2, "repair": None}
    first, other = (prune.staged(NETWORK, trained, INPUTS, 0.5, key=jax.random.key(s), **options).masks for s in (0, 1))
    assert not np.array_equal(first["Dense_0"]["kernel"], other["Dense_0"]["kernel"])
    with pytest.raises(ValueError, match="probes=1 draws random signs: give it a key"):
        prune.staged(NETWORK, trained, INPUTS, 0.5, **options)


def test_the_run_gives_its_metric_to_a_criterion_that_takes_one(trained):
    by_name, by_function, with_its_own = (
        prune.staged(NETWORK, trained, INPUTS, 0.5, stages=1, repair=None, criterion=criterion, **options).masks
        for criterion, options in (
            ("optimal_brain_damage", {"metric": "fisher"}),
            (score.optimal_brain_damage, {"metric": "fisher"}),
            (functools.partial(score.optimal_brain_damage, metric="fisher"), {}),
        )
    )
    jax.tree.map(np.testing.assert_array_equal, by_name, by_function)
    jax.tree.map(np.testing.assert_array_equal, by_name, with_its_own)


def test_a_repair_of_ones_own_leaves_removed_weights(trained):
    def plus_one(_network, params, _masks, _inputs, targets):
        assert targets.shape == (1000, 10)
        return jax.tree.map(lambda leaf: leaf + 1, params)

    options = {"stages": 2, "metric": "fisher", "exclude": "Dense_1/kernel", "repair": plus_one}
    pruned = prune.staged(NETWORK, trained, INPUTS, 0.5, **options)
    assert ((pruned.params["Dense_0"]["kernel"] != 0) == pruned.masks["Dense_0"]["kernel"]).all()
    moved = trained["Dense_1"]["kernel"] + 1 + 1  # it is only excluded from pruning
    np.testing.assert_array_equal(pruned.params["Dense_1"]["kernel"], moved)


def test_stages_before_the_last_see_a_part(trained):
    """Scores and repair see the same samples with their own targets and weights, others in each stage."""
    seen, repaired, targets, weights = [], [], NETWORK(trained, INPUTS), jnp.arange(1.0, 1 + len(INPUTS))

    def criterion(network, params, inputs, weights):
        seen.append((inputs, weights))
        return score.magnitude(network, params, inputs)

    def unmoved(_, params, __, inputs, targets, weights):
        repaired.append((inputs, targets, weights))
        return params

    options = {"stages": 4, "samples": 0.25, "criterion": criterion, "repair": unmoved, "weights": weights}
    prune.staged(NETWORK, trained, INPUTS, 0.5, **options)
    quarter = round(len(INPUTS) / 4)
    assert [len(inputs) for inputs, _ in seen] == [quarter] * 3 + [len(INPUTS)]
    places = []
    for (inputs, of_scores), (same, aim, of_repair) in zip(seen, repaired, strict=True):
        np.testing.assert_array_equal(inputs, same)
        np.testing.assert_array_equal(of_scores, of_repair)
        places.append(np.asarray(of_repair, int) - 1)
        np.testing.assert_array_equal(inputs, INPUTS[places[-1]])
        np.testing.assert_array_equal(aim, targets[places[-1]])
    assert len(np.unique(np.concatenate(places[:3]))) == 3 * quarter


@pytest.mark.parametrize(
    ("number", "how", "early"),
    [
        (9001, "survivors", 4500),
        (3000, "survivors", 2000),
        (1500, "survivors", 1500),
        (9001, "biases", 9001),
        (9001, None, 9001),
    ],
)
def test_how_many_samples_early_stages_see(number, how, early):
    """Where survivors are repaired half of them, and at least 2,000."""
    seen, inputs = [], np.random.default_rng(0).normal(size=(number, 2)).astype(np.float32)

    def criterion(network, params, inputs):
        seen.append(len(inputs))
        return score.magnitude(network, params, inputs)

    params = {"Dense_0": {"kernel": jnp.arange(1.0, 7).reshape(2, 3), "bias": jnp.zeros(3)}}
    network = networks.from_linen(networks.MLP((3,)))
    prune.staged(network, params, inputs, 0.5, stages=3, criterion=criterion, repair=how)
    assert seen == [early, early, number]


def test_a_part_of_the_samples_is_of_those_that_count():
    """Every second one is padding: of each part that is evenly spaced, all or none."""
    weights, seen = jnp.arange(12) % 2.0, []

    def criterion(network, params, inputs):
        seen.append(np.asarray(inputs[:, 0]).tolist())
        return score.magnitude(network, params, inputs)

    params = {"Dense_0": {"kernel": jnp.arange(1.0, 7).reshape(2, 3), "bias": jnp.zeros(3)}}
    network, inputs = networks.from_linen(networks.MLP((3,))), jnp.stack([jnp.arange(12.0), jnp.ones(12)], 1)
    how = {"criterion": criterion, "repair": repair.Survivors(iterations=1), "weights": weights, "samples": 3}
    prune.staged(network, params, inputs, 0.5, stages=3, **how)
    assert seen == [[1, 5, 9], [3, 7, 11], list(range(12))]


@pytest.mark.parametrize("weighted", [False, True])
def test_survivors_take_the_temperature_of_the_targets(trained, weighted):
    """The rule where nothing else is said, 1 for labels and for biases, and whatever a user says."""
    dense, weights = NETWORK(trained, INPUTS), jnp.arange(1.0, 1 + len(INPUTS)) if weighted else None
    by_rule = metrics.Fisher(metrics.temperature(dense, weights))
    assert float(by_rule.temperature) > 1.2

    def run(kind, metric=None, targets=None):
        options = {"stages": 1, "metric": "fisher", "weights": weights, "targets": targets}
        return prune.staged(NETWORK, trained, INPUTS, 0.8, repair=kind(iterations=2, metric=metric), **options).params

    for kind, targets, metric in (
        (repair.Survivors, None, by_rule),
        (repair.Survivors, LABELS, metrics.Fisher()),
        (repair.Biases, None, metrics.Fisher()),
    ):
        found, expected = run(kind, targets=targets), run(kind, metric, targets)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), found, expected)
    hotter, as_found = (run(repair.Survivors, metric) for metric in (metrics.Fisher(9.0), None))
    assert not np.allclose(hotter["Dense_1"]["kernel"], as_found["Dense_1"]["kernel"], rtol=1e-2)


@pytest.mark.parametrize("samples", [100, 0.3])
def test_a_part_of_the_samples_by_hand(trained, samples):
    how = repair.Survivors(iterations=1, last_iterations=3)
    found = prune.staged(NETWORK, trained, INPUTS, 0.8, stages=2, samples=samples, metric="fisher", repair=how)
    state = staged.start(NETWORK, trained, INPUTS, metric="fisher", repair=how)
    state = staged.step(NETWORK, state, INPUTS, 0.8 * 0.875, samples=samples, repair=repair.Survivors(iterations=1))
    assert (int(state.steps), int(state.stages)) == (1, 1)
    state = staged.step(NETWORK, state, INPUTS, 0.8, repair=repair.Survivors(iterations=3))
    jax.tree.map(np.testing.assert_array_equal, found, staged.finish(state))
    assert (int(state.steps), int(state.stages)) == (4, 2)


def test_more_samples_than_there_are_is_all_of_them(trained):
    found, expected = (
        prune.staged(NETWORK, trained, INPUTS, 0.8, stages=2, samples=samples, metric="fisher", repair="biases")
        for samples in (10 * len(INPUTS), None)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
