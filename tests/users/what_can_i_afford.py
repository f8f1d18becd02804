"""I can spare one point of accuracy: how sparse can my network of digits get for it? I want the network, the curve of
accuracy against sparsity with a picture of it, and to see how far the search is.
"""

from pathlib import Path

import flax.linen as nn
import jax
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ecjax import plots, prune

matplotlib.use("Agg")
from matplotlib import pyplot as plt

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
train_images, other_images, train_labels, other_labels = train_test_split(images, labels, test_size=0.5, random_state=0)
valid_images, test_images, valid_labels, test_labels = train_test_split(
    other_images, other_labels, test_size=0.5, random_state=0
)


class Digits(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(nn.relu(nn.Dense(24)(nn.relu(nn.Dense(48)(images)))))


module = Digits()
params = module.init(jax.random.key(0), images[:1])


def network(params, inputs):
    return module.apply(params, inputs)


optimizer = optax.adam(3e-3)


@jax.jit
def step(params, state, inputs, labels):
    loss = lambda params: optax.softmax_cross_entropy_with_integer_labels(network(params, inputs), labels).mean()
    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


state, shuffle = optimizer.init(params), np.random.default_rng(0)
for _ in range(30):
    for chosen in np.array_split(shuffle.permutation(len(train_images)), 16):
        params, state = step(params, state, train_images[chosen], train_labels[chosen])


@jax.jit
def valid_accuracy(params):
    return (network(params, valid_images).argmax(-1) == valid_labels).mean()


def test_accuracy(params):
    return float((network(params, test_images).argmax(-1) == test_labels).mean())


afforded = prune.afford(
    network,
    params,
    train_images,
    valid_accuracy,
    most_lost=0.01,
    sparsest=0.98,
    stages=8,
    halvings=3,
    metric="fisher",
    progress=True,
)
print(afforded)
print(
    f"sparsity {afforded.found.sparsity:.3f}; test accuracy {test_accuracy(params):.3f} dense, "
    f"{test_accuracy(afforded.params):.3f} pruned"
)

_, ax = plt.subplots(layout="constrained")
plots.curve({"in stages, survivors repaired": afforded}, ax=ax)
ax.set_ylabel("accuracy on validation data")
picture = Path(__file__).with_suffix(".png")
ax.figure.savefig(picture)

dense = float(valid_accuracy(params))
assert dense > 0.9
assert float(valid_accuracy(afforded.params)) == afforded.found.value >= dense - 0.01
assert afforded.found.sparsity > 0.6
assert abs(prune.sparsity(afforded.masks) - afforded.found.sparsity) < 1e-9
sparsities = [tried.sparsity for tried in afforded.curve]
assert sparsities == sorted(sparsities)
assert sparsities[0] == 0
assert all(not tried.affordable for tried in afforded.curve if tried.sparsity > afforded.found.sparsity)
weights = sum(mask.size for mask in jax.tree.leaves(afforded.masks))
zeros = sum(int((leaf == 0).sum()) for leaf in jax.tree.leaves(afforded.params) if leaf.ndim == 2)
assert abs(zeros / weights - afforded.found.sparsity) < 1e-6
assert test_accuracy(afforded.params) > test_accuracy(params) - 0.05
assert picture.stat().st_size > 10_000
