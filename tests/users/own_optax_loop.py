"""My own optax loop (gradient accumulation, weight decay, a schedule, an average of the params) trains a dense network;
half way through I want to prune it and go on with the same optimiser state, and pruned weights must stay exactly zero.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ecjax import networks, prune, train

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
train_images, test_images, train_labels, test_labels = train_test_split(images, labels, test_size=0.3, random_state=0)

widths = (64, 48, 32, 10)
keys = jax.random.split(jax.random.key(0), len(widths) - 1)
params = [
    {"weight": jax.random.normal(key, (outputs, inputs)) / np.sqrt(inputs), "bias": jnp.zeros(outputs)}
    for key, inputs, outputs in zip(keys, widths, widths[1:])
]


def network(params, inputs):
    for layer in params[:-1]:
        inputs = jax.nn.silu(inputs @ layer["weight"].T + layer["bias"])
    return inputs @ params[-1]["weight"].T + params[-1]["bias"]


def accuracy(params):
    return float((network(params, test_images).argmax(-1) == test_labels).mean())


def mean_loss(params, inputs, labels):
    return optax.softmax_cross_entropy_with_integer_labels(network(params, inputs), labels).mean()


epochs, prune_at, batch_size, accumulate = 40, 20, 32, 2
batches = len(train_images) // batch_size // accumulate * accumulate
updates_in_all = epochs * batches // accumulate
schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, warmup_steps=40, decay_steps=updates_in_all, end_value=1e-4)
inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-2))
dense_optimizer = optax.MultiSteps(inner, every_k_schedule=accumulate).gradient_transformation()


def make_step(optimizer):
    @jax.jit
    def step(params, average, state, inputs, labels):
        gradients = jax.grad(mean_loss)(params, inputs, labels)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, step_size=0.02)
        return params, average, state

    return step


def removed_are_zero(params, masks):
    nothing = lambda leaf: leaf is None
    removed = jax.tree.map(lambda mask, leaf: None if mask is None else leaf[~mask], masks, params, is_leaf=nothing)
    return all(not leaf.any() for leaf in jax.tree.leaves(removed))


average, state, step = params, dense_optimizer.init(params), make_step(dense_optimizer)
masks = None
shuffle = np.random.default_rng(0)
for epoch in range(epochs):
    if epoch == prune_at:
        dense_accuracy = accuracy(params)
        print(networks.layers(network, params, train_images))
        pruned = prune.staged(network, params, train_images, sparsity=0.8, stages=4, metric="fisher")
        params, masks = pruned.params, pruned.masks
        just_pruned_accuracy = accuracy(params)
        average = prune.apply_masks(average, masks)  # it has seen the dense network
        keep = train.keep_pruned(masks)
        sparse_optimizer = optax.chain(dense_optimizer, keep)
        state, step = (state, keep.init(params)), make_step(sparse_optimizer)  # moments and schedule go on
    order = shuffle.permutation(len(train_images))[: batches * batch_size].reshape(batches, batch_size)
    for chosen in order:
        params, average, state = step(params, average, state, train_images[chosen], train_labels[chosen])
        if masks is not None and chosen is order[0]:
            assert removed_are_zero(params, masks)

print(f"accuracy: dense {dense_accuracy:.3f}, just pruned {just_pruned_accuracy:.3f}, tuned {accuracy(params):.3f}")
print(f"average of the params: {accuracy(average):.3f}")

weights = sum(inputs * outputs for inputs, outputs in zip(widths, widths[1:]))
zeros = sum(int((layer["weight"] == 0).sum()) for layer in params)
assert zeros == round(0.8 * weights)
assert abs(prune.sparsity(masks) - zeros / weights) < 1e-6
assert removed_are_zero(params, masks)
assert removed_are_zero(average, masks)
assert int(state[0].gradient_step) == updates_in_all  # the schedule was not started anew
assert dense_accuracy > 0.9
assert accuracy(params) > dense_accuracy - 0.03
assert accuracy(average) > dense_accuracy - 0.03
