"""Someone has a Flax NNX network with batch normalisation, wants it pruned in stages and back as an NNX module, and
wants to know what becomes of the batch statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ecjax import networks, prune, score

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
train_images, test_images, train_labels, test_labels = train_test_split(images, labels, test_size=0.25, random_state=0)


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 48, rngs=rngs)
        self.first_norm = nnx.BatchNorm(48, momentum=0.9, rngs=rngs)
        self.second = nnx.Linear(48, 32, rngs=rngs)
        self.second_norm = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.last = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first_norm(self.first(x)))
        x = nnx.relu(self.second_norm(self.second(x)))
        return self.last(x)


module = Classifier(nnx.Rngs(0))
optimizer = nnx.Optimizer(module, optax.adam(3e-3), wrt=nnx.Param)


@nnx.jit
def update(module, optimizer, images, labels):
    def mean_loss(module):
        return optax.softmax_cross_entropy_with_integer_labels(module(images), labels).mean()

    optimizer.update(module, nnx.grad(mean_loss)(module))


module.train()
generator = np.random.default_rng(0)
for _ in range(12):
    order = generator.permutation(len(train_images))
    for start in range(0, len(order) - 63, 64):
        batch = order[start : start + 64]
        update(module, optimizer, train_images[batch], train_labels[batch])
module.eval()


def accuracy(module):
    return float((module(test_images).argmax(-1) == test_labels).mean())


def statistics(module):
    return [np.asarray(value) for value in jax.tree.leaves(nnx.state(module, nnx.BatchStat))]


def with_new_statistics(module):
    module.train()
    for start in range(0, 60 * 64, 64):
        module(train_images[np.arange(start, start + 64) % len(train_images)])
    module.eval()
    return module


network, params = networks.from_nnx(module)
print(networks.layers(network, params, train_images))
dense_accuracy, dense_statistics = accuracy(module), statistics(module)
dense_kernel = np.asarray(module.first.kernel[...])

in_stages = prune.staged(network, params, train_images, sparsity=0.9, metric="fisher")
pruned = networks.to_nnx(module, in_stages.params)
scores = score.elimination_compensation(network, params, train_images, metric="fisher")
at_once = networks.to_nnx(module, prune.one_shot(params, scores, sparsity=0.9).params)
print(f"dense {dense_accuracy:.3f}, in stages {accuracy(pruned):.3f}, at once {accuracy(at_once):.3f}")

assert isinstance(pruned, Classifier)
assert jnp.abs(pruned(test_images) - network(in_stages.params, test_images)).max() < 1e-4
for old, kept in zip(dense_statistics, statistics(pruned)):
    assert (old == kept).all()  # the repair has worked with these
staged_accuracy, once_accuracy = accuracy(pruned), accuracy(at_once)
with_new_statistics(pruned)
with_new_statistics(at_once)
print(f"with new batch statistics: in stages {accuracy(pruned):.3f}, at once {accuracy(at_once):.3f}")

for old, same in zip(dense_statistics, statistics(module)):
    assert (old == same).all()  # those of the dense module have not moved along
assert (np.asarray(module.first.kernel[...]) == dense_kernel).all()
assert accuracy(module) == dense_accuracy

weights = 64 * 48 + 48 * 32 + 32 * 10
kept = 0
for name in ("first", "second", "last"):
    mask, kernel = in_stages.masks[name]["kernel"], getattr(pruned, name).kernel[...]
    assert (kernel[~mask] == 0).all()
    kept += int(mask.sum())
assert kept == weights - round(0.9 * weights)
assert dense_accuracy > 0.95
assert staged_accuracy > dense_accuracy - 0.03
assert accuracy(at_once) > once_accuracy
