import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecjax import networks, prune, score, train
from tests import examples

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
OPTIMIZERS = {
    "sgd with momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.3),
    "lion": optax.lion(1e-3),
}


def blobs(seed=0):
    """Three classes around three centres."""
    generator = np.random.default_rng(seed)
    labels = jnp.asarray(generator.integers(3, size=300))
    centres = 2 * generator.normal(size=(3, 5))
    inputs = jnp.asarray(centres[labels] + 0.3 * generator.normal(size=(300, 5)), jnp.float32)
    module = networks.MLP((8, 3))
    params = module.init(jax.random.key(seed), inputs)["params"]
    return networks.from_linen(module), params, inputs, labels


def test_learns_to_classify():
    network, params, inputs, labels = blobs()
    options = {"optimizer": OPTIMIZERS["adam"], "key": jax.random.key(0), "epochs": 20, "batch_size": 32}
    trained = train.fit(network, params, inputs, labels, cross_entropy, **options)
    assert trained.losses.shape == (20,)
    assert trained.losses[-1] < 0.05 < trained.losses[0]
    assert (network(trained.params, inputs).argmax(-1) == labels).mean() > 0.98
    again = train.fit(network, params, inputs, labels, cross_entropy, **options)
    jax.tree.map(np.testing.assert_array_equal, trained, again)


def test_the_second_call_compiles_nothing(compilations):
    network, params, inputs, labels = blobs()
    options = {"optimizer": OPTIMIZERS["adam"], "epochs": 2, "batch_size": 32}
    train.fit(network, params, inputs, labels, cross_entropy, key=jax.random.key(0), **options)
    before = compilations()
    train.fit(network, params, inputs, labels, cross_entropy, key=jax.random.key(1), **options)
    assert compilations() == before


def test_learns_to_regress():
    network, params, inputs, _ = blobs()
    targets = jnp.stack([inputs[:, 0], inputs[:, 1], inputs[:, 0] - inputs[:, 2]], -1)
    options = {"optimizer": OPTIMIZERS["adam"], "key": jax.random.key(0), "epochs": 60, "batch_size": 32}
    trained = train.fit(network, params, inputs, targets, optax.squared_error, **options)
    assert trained.losses[-1] < 0.02 * trained.losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_exactly_zero(name):
    network, params, inputs, labels = blobs()
    pruned = prune.one_shot(params, score.elimination_compensation(network, params, inputs), 0.6)
    options = {"optimizer": OPTIMIZERS[name], "key": jax.random.key(0), "epochs": 3, "masks": pruned.masks}
    tuned = train.fit(network, pruned.params, inputs, labels, cross_entropy, **options).params
    for path, mask in networks.by_path(pruned.masks).items():
        kernel = networks.by_path(tuned)[path]
        np.testing.assert_array_equal(np.asarray(kernel)[~np.asarray(mask)], 0.0)
        moved = kernel != networks.by_path(pruned.params)[path]
        assert (np.asarray(moved) == np.asarray(mask)).mean() > 0.9  # and the others are trained


@pytest.mark.slow
def test_keep_pruned_ends_a_chain_of_the_callers():
    network, params, inputs, labels = blobs()
    pruned = prune.one_shot(params, score.magnitude(network, params, inputs), 0.5)
    # Momentum from before the pruning, and weights that were not even set to zero: all of it is overruled.
    optimizer = optax.chain(optax.adamw(1e-2, weight_decay=0.1), train.keep_pruned(pruned.masks))
    state = optimizer.init(params)
    for _ in range(3):
        gradients = jax.grad(lambda p: cross_entropy(network(p, inputs), labels).mean())(params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, params, prune.apply_masks(params, pruned.masks))
    with pytest.raises(ValueError, match=r"keep_pruned needs the params"):
        train.keep_pruned(pruned.masks).update(updates, optax.EmptyState())


def test_several_seeds_are_one_vmapped_call():
    network, _, inputs, labels = blobs()
    module = networks.MLP((8, 3))
    keys = jax.random.split(jax.random.key(5), 3)

    def one_seed(key):
        first = module.init(key, inputs)["params"]
        options = {"optimizer": OPTIMIZERS["adam"], "key": key, "epochs": 4}
        return train.fit(network, first, inputs, labels, cross_entropy, **options)

    together = jax.jit(jax.vmap(one_seed))(keys)
    assert together.losses.shape == (3, 4)
    for seed, key in enumerate(keys):
        alone = one_seed(key)
        np.testing.assert_allclose(together.losses[seed], alone.losses, rtol=1e-4)
    assert len(set(map(float, together.losses[:, -1]))) == 3


def test_an_epoch_visits_every_sample_of_whole_batches_once():
    seen = []
    network = lambda params, x: x @ params["kernel"]  # noqa: E731

    def note(outputs, targets):
        jax.debug.callback(lambda t: seen.extend(t.tolist()), targets)
        return outputs.sum(-1)

    params = {"kernel": jnp.zeros((1, 1))}
    samples = jnp.arange(10.0)[:, None]
    state = train.start(params, OPTIMIZERS["adam"], jax.random.key(0))
    options = {"optimizer": OPTIMIZERS["adam"], "batch_size": 4}
    for _ in range(2):
        state, _ = train.epoch(network, state, samples, jnp.arange(10), note, **options)
    jax.effects_barrier()
    assert train.steps_per_epoch(10, 4) == 2
    assert len(seen) == 16
    assert len(set(seen[:8])) == 8
    assert seen[:8] != seen[8:]


def test_a_batch_larger_than_the_data_takes_all_of_it():
    network, params, inputs, labels = blobs()
    options = {"optimizer": OPTIMIZERS["adam"], "key": jax.random.key(0), "epochs": 1, "batch_size": 10_000}
    trained = train.fit(network, params, inputs, labels, cross_entropy, **options)
    np.testing.assert_allclose(trained.losses[0], cross_entropy(network(params, inputs), labels).mean(), rtol=1e-5)


def test_flax_nnx_trains_as_well():
    example = examples.flax_nnx()
    targets = jnp.zeros((23, 3))
    options = {"optimizer": OPTIMIZERS["adam"], "key": jax.random.key(0), "epochs": 30}
    trained = train.fit(*example, targets, optax.squared_error, **options)
    assert trained.losses[-1] < trained.losses[0]
