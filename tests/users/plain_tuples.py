"""Someone keeps the params of a plain JAX network as nested tuples, trains them with optax, and wants 80 % of the
weights gone: once in one shot, once in stages, without losing what the network knows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ecjax import networks, prune, score, train

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
train_images, test_images, train_labels, test_labels = train_test_split(images, labels, test_size=0.25, random_state=0)


def initial_params(key, widths):
    layers = []
    for number, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:])):
        kernel = jax.random.normal(jax.random.fold_in(key, number), (inputs, outputs)) * jnp.sqrt(2 / inputs)
        layers.append((kernel, jnp.zeros(outputs)))
    return tuple(layers)


def network(params, x):
    *hidden_layers, (last_kernel, last_bias) = params
    for kernel, bias in hidden_layers:
        x = jax.nn.relu(x @ kernel + bias)
    return x @ last_kernel + last_bias


def mean_loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(network(params, x), y).mean()


def accuracy(params):
    return float((network(params, test_images).argmax(-1) == test_labels).mean())


def trained(params, optimizer, epochs, batch_size=64):
    @jax.jit
    def update(params, state, x, y):
        updates, state = optimizer.update(jax.grad(mean_loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    state, generator = optimizer.init(params), np.random.default_rng(0)
    for _ in range(epochs):
        order = generator.permutation(len(train_images))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            batch = order[start : start + batch_size]
            params, state = update(params, state, train_images[batch], train_labels[batch])
    return params


params = trained(initial_params(jax.random.key(0), (64, 48, 24, 10)), optax.adam(2e-3), epochs=25)
dense_accuracy = accuracy(params)

found = networks.layers(network, params, train_images)
print(found)
print(networks.groups(network, params, train_images))
assert [layer.kernel for layer in found] == ["0/0", "1/0", "2/0"]
assert [layer.bias for layer in found] == ["0/1", "1/1", "2/1"]

# In one shot.
scores = score.elimination_compensation(network, params, train_images, metric="fisher")
at_once = prune.one_shot(params, scores, sparsity=0.8)
by_magnitude = prune.one_shot(params, score.magnitude(network, params, train_images), sparsity=0.8)

# In stages, with a repair after each.
in_stages = prune.staged(network, params, train_images, sparsity=0.8, metric="fisher")
print(prune.summary(in_stages.params, in_stages.masks))

# And trained on in the loop above.
tuning = optax.chain(optax.adam(1e-3), train.keep_pruned(at_once.masks))
tuned = trained(at_once.params, tuning, epochs=5)

print(f"dense {dense_accuracy:.3f}, magnitude at once {accuracy(by_magnitude.params):.3f}")
print(f"at once {accuracy(at_once.params):.3f}, and tuned {accuracy(tuned):.3f}")
print(f"in stages {accuracy(in_stages.params):.3f}")

weights = sum(layer.weights for layer in found)
for pruned in (at_once, in_stages):
    assert isinstance(pruned.params, tuple) and isinstance(pruned.params[0], tuple)
    assert jax.tree.structure(pruned.params) == jax.tree.structure(params)
    kept = sum(int(mask.sum()) for mask in jax.tree.leaves(pruned.masks))
    assert kept == weights - round(0.8 * weights)
    assert prune.sparsity(pruned.masks) == round(0.8 * weights) / weights
    for (kernel, _), (mask, no_mask) in zip(pruned.params, pruned.masks):
        assert no_mask is None
        assert (kernel[~mask] == 0).all()
    assert network(pruned.params, test_images).shape == (len(test_images), 10)
    assert jnp.isfinite(network(pruned.params, test_images)).all()
for (kernel, _), (mask, _) in zip(tuned, at_once.masks):
    assert (kernel[~mask] == 0).all()
assert dense_accuracy > 0.93
assert accuracy(at_once.params) > accuracy(by_magnitude.params)
assert accuracy(tuned) > dense_accuracy - 0.04
assert accuracy(in_stages.params) > dense_accuracy - 0.03
