"""My Equinox module (convolution, dense layers, its activation stored in it, dropout) pruned as it is: it must stay a
module that I can call and train, get smaller when whole channels and neurons go, and come back from a file.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from ecjax import compact, networks, prune, train

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
train_images, train_labels, test_images, test_labels = images[:1200], labels[:1200], images[1200:], labels[1200:]


class Digits(eqx.Module):
    convolution: eqx.nn.Conv2d
    hidden: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    logits: eqx.nn.Linear
    activation: Callable

    def __init__(self, activation, key):
        keys = jax.random.split(key, 3)
        self.convolution = eqx.nn.Conv2d(1, 12, 3, stride=2, padding=1, key=keys[0])
        self.hidden = eqx.nn.Linear(12 * 4 * 4, 32, key=keys[1])
        self.dropout = eqx.nn.Dropout(0.2)
        self.logits = eqx.nn.Linear(32, 10, key=keys[2])
        self.activation = activation

    def __call__(self, image, key=None):
        features = self.activation(self.convolution(image)).reshape(-1)
        features = self.dropout(self.activation(self.hidden(features)), key=key)
        return self.logits(features)


def train_epochs(module, epochs, *last):
    optimizer = optax.chain(optax.adam(3e-3), *last)

    @eqx.filter_jit
    def step(module, state, key, images, labels):
        def loss(module):
            logits = jax.vmap(module)(images, jax.random.split(key, len(images)))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        gradients = eqx.filter_grad(loss)(module)
        updates, state = optimizer.update(gradients, state, eqx.filter(module, eqx.is_inexact_array))
        return eqx.apply_updates(module, updates), state

    state, key = optimizer.init(eqx.filter(module, eqx.is_inexact_array)), jax.random.key(1)
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(len(train_images))
        for number, chosen in enumerate(np.split(order, 20)):
            noise = jax.random.fold_in(key, 20 * epoch + number)
            module, state = step(module, state, noise, train_images[chosen], train_labels[chosen])
    return module


def network(module, images):
    return jax.vmap(module)(images)


def accuracy(module):
    return float((network(eqx.nn.inference_mode(module), test_images).argmax(-1) == test_labels).mean())


module = train_epochs(Digits(jax.nn.relu, jax.random.key(0)), 15)
module = eqx.nn.inference_mode(module)
calibration = train_images[:400]
print(networks.layers(network, module, calibration))
print(networks.groups(network, module, calibration))

# Single weights, and then some training with dropout again.
pruned = prune.staged(network, module, calibration, sparsity=0.8, stages=4, metric="fisher")
assert isinstance(pruned.params, Digits)
assert pruned.params.activation is module.activation
tuned = train_epochs(eqx.nn.inference_mode(pruned.params, value=False), 3, train.keep_pruned(pruned.masks))
print(f"dense {accuracy(module):.3f}, 80 % gone {accuracy(pruned.params):.3f}, trained again {accuracy(tuned):.3f}")

# Whole channels and neurons.
halved = prune.staged_neurons(network, module, calibration, fraction=0.5, stages=3, metric="fisher")
smaller_network, smaller = compact.compact(network, halved.params, calibration)
print(f"half of the units gone {accuracy(halved.params):.3f}")
print(smaller)

path = Path(tempfile.mkdtemp()) / "digits.safetensors"
size = compact.save(path, smaller, network=smaller_network, inputs=calibration)
loaded = compact.load(path, network, like=eqx.nn.inference_mode(Digits(jax.nn.relu, jax.random.key(5)))).params

for masks, params in ((pruned.masks, pruned.params), (pruned.masks, tuned)):
    for name in ("convolution", "hidden", "logits"):
        mask, weight = getattr(masks, name).weight, getattr(params, name).weight
        assert ((weight != 0) == mask).all()
weights = sum(mask.size for mask in jax.tree.leaves(pruned.masks))
assert sum(int((~mask).sum()) for mask in jax.tree.leaves(pruned.masks)) == round(0.8 * weights)

assert isinstance(smaller, Digits)
channels, neurons = len(smaller.convolution.weight), len(smaller.hidden.weight)
assert channels + neurons == 22
assert smaller.hidden.weight.shape == (neurons, 16 * channels)
outputs = network(halved.params, test_images)
assert jnp.allclose(smaller_network(smaller, test_images), outputs, atol=1e-4)
assert jnp.allclose(jax.vmap(smaller)(test_images), outputs, atol=1e-4)  # as the module that it is
assert jnp.allclose(smaller(test_images[0]), outputs[0], atol=1e-4)
assert isinstance(loaded, Digits)
assert loaded.activation is jax.nn.relu
assert jnp.allclose(jax.vmap(eqx.nn.inference_mode(loaded))(test_images), outputs, atol=1e-4)
assert accuracy(module) > 0.88
assert min(accuracy(pruned.params), accuracy(tuned), accuracy(halved.params)) > accuracy(module) - 0.04
