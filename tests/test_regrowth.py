"""Weights that grow back after the last stage, so that as many others may go."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecjax import networks, prune, repair, score
from ecjax.repair import gauss_newton, repairs
from ecjax.score import surgeon
from tests import examples
from tests.trained import INPUTS, NETWORK, params

FEW = repair.Survivors(iterations=2, products=5)
HOW = {"stages": 2, "metric": "fisher", "repair": FEW}


@pytest.fixture(scope="module")
def trained():
    return params()


def objectives(stages):
    return [float(stage.objective) for stage in stages]


def test_the_objective_falls_with_every_cycle_and_the_count_stays(trained):
    stages, without = [], []
    pruned = prune.staged(NETWORK, trained, INPUTS, 0.9, **HOW, regrow=0.5, progress=stages.append)
    prune.staged(NETWORK, trained, INPUTS, 0.9, **HOW, progress=without.append)
    assert [stage.number for stage in stages] == [*range(1, len(stages) + 1)]
    assert all(stage.stages == 2 + 6 for stage in stages)
    assert objectives(stages[:2]) == objectives(without)
    after = objectives(stages[1:])
    assert len(after) > 2
    assert after == sorted(after, reverse=True)
    assert after[-1] < 0.8 * after[0]
    assert sum(int((~mask).sum()) for mask in jax.tree.leaves(pruned.masks)) == round(0.9 * (64 * 30 + 300))
    for path, mask in networks.by_path(pruned.masks).items():
        np.testing.assert_array_equal(np.asarray(networks.by_path(pruned.params)[path])[~np.asarray(mask)], 0)


def test_the_brain_surgeon_finds_better_weights_than_elimination_compensation(trained):
    left = {}
    for criterion in (None, "optimal_brain_surgeon"):
        stages, regrow = [], prune.Regrowth(1.0, cycles=1, criterion=criterion)
        pruned = prune.staged(NETWORK, trained, INPUTS, 0.9, **HOW, regrow=regrow, progress=stages.append)
        left[criterion] = objectives(stages)[-1]
        assert sum(int((~mask).sum()) for mask in jax.tree.leaves(pruned.masks)) == round(0.9 * (64 * 30 + 300))
    assert left["optimal_brain_surgeon"] < 0.95 * left[None]


@pytest.mark.parametrize("scope", ["layer", "neuron"])
def test_counts_are_exact_in_every_scope(trained, scope):
    pruned = prune.staged(NETWORK, trained, INPUTS, 0.8, **HOW, scope=scope, regrow=prune.Regrowth(1.0, cycles=2))
    for mask in jax.tree.leaves(pruned.masks):
        if scope == "neuron":
            np.testing.assert_array_equal((~mask).sum(0), round(0.8 * len(mask)))
        expected = mask.shape[1] * round(0.8 * len(mask)) if scope == "neuron" else round(0.8 * mask.size)
        assert int((~mask).sum()) == expected


def test_counts_are_exact_for_every_pattern(trained):
    sparsity = {"Dense_1/*": 0.3, "*": 0.9}
    pruned = prune.staged(NETWORK, trained, INPUTS, sparsity, **HOW, regrow=1)
    removed = {path: int((~mask).sum()) for path, mask in networks.by_path(pruned.masks).items()}
    assert removed == {"Dense_0/kernel": 0.9 * 64 * 30, "Dense_1/kernel": 0.3 * 300}


def test_gains_by_their_definition():
    """``g² / 2(h + λ)`` of one sample and one output, where every draw of signs has the exact diagonal."""
    with jax.enable_x64(True):
        network, dense, inputs = examples.mlp(widths=(4, 1), samples=1)
        masks = jax.tree.map(lambda leaf: None if leaf.ndim < 2 else leaf > 0, dense)
        pruned, targets = prune.apply_masks(dense, masks), network(dense, inputs)
        found = repairs.gains(repair.Survivors(), network, gauss_newton.start(pruned, 0.01), masks, inputs, targets)

        gap = float(network(pruned, inputs)[0, 0] - targets[0, 0])
        jacobian = networks.by_path(jax.grad(lambda p: network(p, inputs)[0, 0])(pruned))
        removed = {path: ~np.asarray(mask) for path, mask in networks.by_path(masks).items()}
        squares = {path: np.where(gone, np.asarray(jacobian[path]) ** 2, 0) for path, gone in removed.items()}
        mean = sum(square.sum() for square in squares.values()) / sum(gone.sum() for gone in removed.values())
        assert found.keys() == removed.keys()
        for path, square in squares.items():
            np.testing.assert_allclose(found[path], gap**2 * square / (2 * (square + 0.01 * mean)), rtol=1e-9)


def test_what_was_removed_before_the_run_and_what_is_frozen_stay(trained):
    first = prune.staged(NETWORK, trained, INPUTS, 0.5, **HOW)
    pruned = prune.staged(NETWORK, first.params, INPUTS, 0.8, **HOW, masks=first.masks, regrow=1.0)
    for before, after in zip(*map(jax.tree.leaves, (first.masks, pruned.masks)), strict=True):
        assert not (after & ~before).any()
    assert prune.sparsity(pruned.masks) == pytest.approx(0.8, abs=1e-3)
    some = first.masks | {"Dense_1": {"bias": None, "kernel": None}}  # of one kernel alone
    again = prune.staged(NETWORK, first.params, INPUTS, 0.8, **HOW, masks=some, regrow=1.0)
    assert not (again.masks["Dense_0"]["kernel"] & ~first.masks["Dense_0"]["kernel"]).any()
    still = repair.Survivors(iterations=2, products=5, frozen="Dense_1/*")
    how = HOW | {"repair": still}
    kept = prune.staged(NETWORK, trained, INPUTS, 0.8, **how, regrow=0.5, exclude="Dense_1/*")
    np.testing.assert_array_equal(kept.params["Dense_1"]["kernel"], trained["Dense_1"]["kernel"])


def test_as_many_return_as_are_left_where_some_may_not(trained):
    """What was removed before the run takes no place among those that return, however much it would gain."""
    seen = []

    def counting(network, params, inputs):
        seen.append(prune.sparsity(jax.tree.map(lambda leaf: leaf != 0, examples.kernels(params))))
        return score.magnitude(network, params, inputs)

    first = prune.one_shot(trained, score.random(NETWORK, trained, INPUTS, key=jax.random.key(0)), 0.6)
    regrow = prune.Regrowth(1.0, cycles=1, criterion=counting)
    prune.staged(NETWORK, first.params, INPUTS, 0.9, **HOW, masks=first.masks, regrow=regrow)
    assert seen == [pytest.approx(0.8, abs=1e-3)]


def test_a_run_goes_on_between_two_cycles(trained, tmp_path):
    class StopError(Exception):
        pass

    def stop(stage):
        if stage.number == 4:
            raise StopError

    run = functools.partial(prune.staged, NETWORK, trained, INPUTS, 0.9, **HOW, regrow=0.5)
    with pytest.raises(StopError):
        run(checkpoints=tmp_path / "run", progress=stop)
    after = []
    found = run(checkpoints=tmp_path / "run", progress=after.append)
    assert after[0].number == 5
    jax.tree.map(np.testing.assert_array_equal, found, run())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regrow": 0}, "regrow is 0; it must be above 0 and at most 1"),
        ({"regrow": 1.5}, "regrow is 1.5; it must be above 0 and at most 1"),
        ({"regrow": True}, "regrow is True; it must be a fraction such as 0.5, or prune.Regrowth"),
        ({"regrow": prune.Regrowth(True)}, "regrow is True; it must be a fraction such as 0.5, or prune.Regrowth"),
        ({"regrow": prune.Regrowth("x")}, "regrow is 'x'; it must be a fraction such as 0.5, or prune.Regrowth"),
        ({"regrow": np.float32(2)}, "regrow is 2.0; it must be above 0 and at most 1"),
        ({"regrow": prune.Regrowth(0.5, 0)}, "cycles is 0; it must be a whole number of at least 1"),
        ({"regrow": prune.Regrowth(criterion="magnitud")}, "criterion is 'magnitud'; it must be one of"),
        ({"regrow": prune.Regrowth(criterion="random")}, "this criterion draws at random: give key="),
        ({"regrow": 0.5, "repair": "biases"}, "regrow needs a repair of survivors"),
        ({"regrow": 0.5, "repair": None}, "regrow needs a repair of survivors"),
        ({"regrow": 0.5, "sparsity": None, "scope": (2, 4)}, r"regrow with scope \(2, 4\)"),
    ],
)
def test_what_is_refused(trained, options, message):
    with pytest.raises(ValueError, match=message):
        prune.staged(NETWORK, trained, INPUTS, **({"sparsity": 0.5} | HOW | options))


def test_more_than_the_brain_surgeon_can_weigh_is_refused_before_the_first_stage(trained, monkeypatch):
    monkeypatch.setattr(surgeon, "MOST", 300)
    run = functools.partial(prune.staged, NETWORK, trained, INPUTS, **HOW, progress=lambda _: pytest.fail("a stage"))
    regrow = prune.Regrowth(0.5, criterion="optimal_brain_surgeon")
    with pytest.raises(
        ValueError, match=r"373 weights and biases are left, .*: at most 300\. .* let a smaller fraction"
    ):
        run(0.9, regrow=regrow)
    with pytest.raises(ValueError, match="426 weights and biases are left"):
        run({"Dense_1/*": 0.4, "*": 0.95}, regrow=regrow._replace(fraction=0.4))


def test_many_positions_need_a_key_before_the_first_stage():
    network = lambda params, x: jnp.tanh(x @ params["kernel"])  # noqa: E731
    params, inputs = {"kernel": jnp.ones((3, 9))}, examples.inputs(6, 90).reshape(6, 30, 3)
    regrow = prune.Regrowth(criterion="optimal_brain_surgeon")
    with pytest.raises(ValueError, match="so many positions that the criterion takes random probes of them: give key="):
        prune.staged(network, params, inputs, 0.5, criterion="magnitude", regrow=regrow)


def test_objectives_that_cannot_be_seen(trained):
    with pytest.raises(ValueError, match="regrow compares objectives, which can't be seen under jit"):
        jax.jit(lambda given: prune.staged(NETWORK, given, INPUTS, 0.5, **HOW, regrow=0.5).params)(trained)
