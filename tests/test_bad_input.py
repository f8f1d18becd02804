"""Bad input gets a ValueError that says what was given and what is allowed, before any work."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ecjax import compact, networks, prune, repair, score, train
from tests import examples

NETWORK, PARAMS, INPUTS = examples.mlp()
LABELS = jnp.zeros(23, int)
MAGNITUDE = score.magnitude(NETWORK, PARAMS, INPUTS)
loss = optax.softmax_cross_entropy_with_integer_labels
BY_INPUTS = {
    "elimination_compensation": score.elimination_compensation,
    "by_definition": score.elimination_compensation_by_definition,
    "nonlinear": score.nonlinear_elimination_compensation,
    "optimal_brain_damage": score.optimal_brain_damage,
    "optimal_brain_surgeon": score.optimal_brain_surgeon,
    "gradient_magnitude": lambda n, p, x, **_: score.gradient_magnitude(
        n, p, x, targets=jnp.zeros(len(x), int), loss=loss
    ),
    "fit": lambda n, p, x, **_: train.fit(
        n, p, x, jnp.zeros(len(x), int), loss, optimizer=optax.adam(1e-3), key=jax.random.key(0), epochs=1
    ),
}
WITH_METRIC = [name for name in BY_INPUTS if name not in ("gradient_magnitude", "fit")]


@pytest.mark.parametrize("criterion", BY_INPUTS)
def test_no_inputs(criterion):
    with pytest.raises(ValueError, match=r"inputs of shape \(0, 5\) hold no samples"):
        BY_INPUTS[criterion](NETWORK, PARAMS, INPUTS[:0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("criterion", BY_INPUTS)
def test_inputs_that_are_not_finite(criterion, bad):
    with pytest.raises(ValueError, match=r"inputs of shape \(23, 5\) hold NaN or infinity"):
        BY_INPUTS[criterion](NETWORK, PARAMS, INPUTS.at[11, 3].set(bad))


@pytest.mark.parametrize("criterion", WITH_METRIC)
def test_a_metric_that_is_none(criterion):
    with pytest.raises(ValueError, match="metric is 'manhattan'; it must be one of 'euclidean', 'fisher'"):
        BY_INPUTS[criterion](NETWORK, PARAMS, INPUTS, metric="manhattan")


EVERY_CRITERION = BY_INPUTS | {
    "magnitude": score.magnitude,
    "random": lambda *example, **options: score.random(*example, key=jax.random.key(0), **options),
}
del EVERY_CRITERION["fit"]


@pytest.mark.parametrize("criterion", EVERY_CRITERION)
def test_no_kernel(criterion):
    with pytest.raises(ValueError, match=r"no kernel to prune: .*'scale' multiplies entry by entry"):
        EVERY_CRITERION[criterion](lambda params, x: x * params["scale"], {"scale": jnp.ones(5)}, INPUTS)


@pytest.mark.parametrize("criterion", ["elimination_compensation", "nonlinear", "optimal_brain_damage"])
def test_what_can_not_be_scored_is_refused_by_name(criterion):
    network, params, inputs = examples.convolution()
    branched = lambda p, x: jax.lax.cond(jnp.asarray(True), lambda x: network(p, x), lambda x: 2 * network(p, x), x)  # noqa: E731
    with pytest.raises(ValueError, match=r"'conv/kernel' can't be scored: it is used .*exclude=\('conv/kernel',\)"):
        BY_INPUTS[criterion](branched, params, inputs)
    scores = BY_INPUTS[criterion](network, params, inputs, exclude="conv/*")
    assert list(networks.by_path(scores.importance)) == ["head/kernel"]


@pytest.mark.parametrize("criterion", [name for name in EVERY_CRITERION if name != "gradient_magnitude"])
def test_a_pattern_that_matches_nothing(criterion):
    with pytest.raises(ValueError, match=r"'head/\*' matches no leaf of the params; they are Dense_0/bias, "):
        EVERY_CRITERION[criterion](NETWORK, PARAMS, INPUTS, exclude=("head/*",))


def test_probes():
    with pytest.raises(ValueError, match="probes=3 draws random signs: give it a key"):
        score.elimination_compensation(NETWORK, PARAMS, INPUTS, probes=3)
    with pytest.raises(ValueError, match="probes is 0; it must be a whole number of at least 1"):
        score.elimination_compensation(NETWORK, PARAMS, INPUTS, probes=0, key=jax.random.key(0))


@pytest.mark.parametrize("name", ["batch_size", "weights_at_once", "steps"])
def test_counts_below_one(name):
    criterion = score.elimination_compensation if name == "batch_size" else score.nonlinear_elimination_compensation
    with pytest.raises(ValueError, match=f"{name} is 0; it must be a whole number of at least 1"):
        criterion(NETWORK, PARAMS, INPUTS, **{name: 0})


def test_targets_unlike_the_inputs():
    with pytest.raises(ValueError, match=r"targets of shape \(7,\) do not match the 23 samples"):
        score.gradient_magnitude(NETWORK, PARAMS, INPUTS, targets=LABELS[:7], loss=loss)


@pytest.mark.parametrize("sparsity", [-0.1, 1.5, float("nan"), float("inf")])
def test_a_sparsity_outside_its_range(sparsity):
    with pytest.raises(ValueError, match=r"sparsity is .*; it must be in \[0, 1\]"):
        prune.one_shot(PARAMS, MAGNITUDE, sparsity)


def test_a_scope_that_is_none():
    with pytest.raises(ValueError, match="scope is 'galaxy'; it must be one of 'network', 'layer', 'neuron'"):
        prune.one_shot(PARAMS, MAGNITUDE, 0.5, scope="galaxy")


def test_scores_unlike_the_params():
    other = score.magnitude(*examples.mlp(widths=(7, 4, 3)))
    with pytest.raises(ValueError, match=r"importances do not fit the params at 'Dense_1/kernel': \(7, 4\) given"):
        prune.one_shot(PARAMS, other, 0.5)
    more = score.magnitude(*examples.mlp(widths=(7, 6, 3, 2)))
    with pytest.raises(ValueError, match=r"'Dense_3/kernel': \(3, 2\) given, no such leaf in the params"):
        prune.one_shot(PARAMS, more, 0.5)
    shifts = score.Scores(MAGNITUDE.importance, other.importance)
    with pytest.raises(ValueError, match="bias shifts do not fit the params at 'Dense_1/kernel'"):
        prune.one_shot(PARAMS, shifts, 0.5)


def test_scores_with_nan():
    importance = networks.replace(MAGNITUDE.importance, {"Dense_1/kernel": jnp.full((7, 6), jnp.nan)})
    with pytest.raises(ValueError, match="importances 'Dense_1/kernel' hold NaN"):
        prune.one_shot(PARAMS, score.Scores(importance), 0.5)


@pytest.mark.parametrize(
    "call",
    [
        lambda pruned: score.elimination_compensation(NETWORK, pruned, INPUTS),
        lambda pruned: networks.layers(NETWORK, pruned, INPUTS),
        lambda pruned: prune.one_shot(pruned, MAGNITUDE, 0.7),
        lambda pruned: prune.staged(NETWORK, pruned, INPUTS, 0.7),
        lambda pruned: prune.apply_masks(pruned, pruned.masks),
        lambda pruned: compact.compact(NETWORK, pruned, INPUTS),
        lambda pruned: compact.save("net", pruned),
        lambda pruned: networks.to_nnx(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), pruned),
    ],
)
def test_what_pruning_returned_where_its_params_are_meant(call):
    with pytest.raises(ValueError, match=r"the params are a prune.Pruned, which holds masks as well; give its .params"):
        call(prune.one_shot(PARAMS, MAGNITUDE, 0.5))


@pytest.mark.parametrize(
    "call",
    [
        prune.sparsity,
        lambda pruned: prune.apply_masks(PARAMS, pruned),
        lambda pruned: prune.summary(PARAMS, pruned),
        lambda pruned: repair.Survivors()(NETWORK, PARAMS, pruned, INPUTS, NETWORK(PARAMS, INPUTS)),
    ],
)
def test_what_pruning_returned_where_its_masks_are_meant(call):
    with pytest.raises(ValueError, match=r"the masks are a prune.Pruned, which holds params as well; give its .masks"):
        call(prune.one_shot(PARAMS, MAGNITUDE, 0.5))


@pytest.mark.parametrize(
    ("module", "door"), [(nn.Dense(2), "from_linen"), (nnx.Linear(4, 2, rngs=nnx.Rngs(0)), "from_nnx")]
)
def test_a_module_in_place_of_its_function(module, door):
    with pytest.raises(
        ValueError, match=rf"the network is a module, (Dense|Linear); .* networks.{door}\(module\) makes"
    ):
        score.magnitude(module, PARAMS, INPUTS)


def test_a_pattern_that_names_what_holds_leaves():
    with pytest.raises(ValueError, match=r"'Dense_0' matches no leaf of the params \(did you mean 'Dense_0/\*'\?\)"):
        score.magnitude(NETWORK, PARAMS, INPUTS, exclude="Dense_0")
    with pytest.raises(ValueError, match=r"match all of them \(did you mean 'Dense_0/\*'\?\)"):
        prune.one_shot(PARAMS, MAGNITUDE, {"Dense_0": 0.5})


@pytest.mark.usefixtures("without_checked_types")
def test_a_criterion_that_needs_more_than_its_name():
    with pytest.raises(ValueError, match=r"functools.partial\(score.gradient_magnitude, targets=labels, loss=loss\)"):
        prune.staged(NETWORK, PARAMS, INPUTS, 0.5, criterion="gradient_magnitude")
    with pytest.raises(ValueError, match="criterion is Scores") as caught:
        prune.staged(NETWORK, PARAMS, INPUTS, 0.5, criterion=MAGNITUDE)
    assert len(str(caught.value)) < 600


def test_masks_unlike_the_params():
    masks = prune.one_shot(PARAMS, MAGNITUDE, 0.5).masks
    with pytest.raises(ValueError, match="mask 'Dense_0/kernel' is float32; masks are boolean"):
        prune.apply_masks(PARAMS, jax.tree.map(lambda mask: mask.astype(jnp.float32), masks))
    with pytest.raises(ValueError, match="masks do not fit the params at 'Dense_0/kernel'"):
        prune.apply_masks(PARAMS, jax.tree.map(lambda mask: mask[:2], masks))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: prune.one_shot(e.params, e.params, 0.5), "scores are dict; score.Scores is needed"),
        (
            lambda e: prune.neurons(*e, 0.5, criterion=score.magnitude),
            "the criterion gave Scores; score.NeuronScores is",
        ),
        (lambda e: prune.one_shot(e.params, score.magnitude(*e), scope=(2, 4.0)), r"scope is \(2, 4.0\); a pattern"),
        (lambda e: prune.one_shot(e.params, score.magnitude(*e), scope=(1, 2, 4)), r"scope is \(1, 2, 4\); a pattern"),
        (lambda e: prune.sparsity(e.params), "'Dense_0/bias' is float32; masks are boolean"),
        (lambda e: prune.staged(*e, 0.5, stages=True), "stages is True; it must be a whole number"),
        (lambda e: prune.staged(*e, 0.5, criterion="random", key=0), "key is 0; it must be a random key"),
        (lambda e: score.random(*e, key=jnp.zeros(3)), "key is Array.*; it must be a random key"),
        (lambda e: score.elimination_compensation(*e, probes=1, key=0), "key is 0; it must be a random key"),
        (lambda e: score.elimination_compensation(*e, key=jax.random.key(0)), "key is for probes="),
    ],
)
@pytest.mark.usefixtures("without_checked_types")
def test_what_is_something_else(call, message):
    with pytest.raises(ValueError, match=message):
        call(examples.mlp())


def test_epochs_below_one():
    options = {"optimizer": optax.adam(1e-3), "key": jax.random.key(0)}
    with pytest.raises(ValueError, match="epochs is 0"):
        train.fit(NETWORK, PARAMS, INPUTS, LABELS, loss, epochs=0, **options)
    with pytest.raises(ValueError, match="batch_size is -1"):
        train.fit(NETWORK, PARAMS, INPUTS, LABELS, loss, epochs=1, batch_size=-1, **options)


@pytest.mark.usefixtures("without_checked_types")
def test_a_repair_takes_no_batches():
    with pytest.raises(ValueError, match="got one of type generator"):
        repair.Survivors()(NETWORK, PARAMS, prune.one_shot(PARAMS, MAGNITUDE, 0.5).masks, (x for x in [INPUTS]), INPUTS)


@pytest.mark.usefixtures("without_checked_types")
def test_batches_in_place_of_inputs():
    message = r"got one of type generator; moments\.of_batches takes batches one after another"
    with pytest.raises(ValueError, match=message):
        prune.staged(NETWORK, PARAMS, (batch for batch in np.split(INPUTS[:20], 2)), 0.5)


@pytest.mark.usefixtures("without_checked_types")
def test_inputs_of_several_arrays_are_refused_with_what_to_do_instead():
    network, params, inputs = examples.mlp()
    both = {"features": inputs, "mask": inputs > 0}
    with pytest.raises(ValueError, match=r"got one of type dict; put several arrays into one, and take them apart in"):
        score.magnitude(network, params, both)
