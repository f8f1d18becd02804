"""A convnet with a sparsity of its own for each layer and a head that nothing may touch, then the same network with 2:4
in all other layers; I want a table of what is left and a picture of the masks.
"""

from pathlib import Path

import flax.linen as nn
import jax
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits

from ecjax import networks, plots, prune, repair, train

matplotlib.use("Agg")
from matplotlib import pyplot as plt

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
train_images, train_labels, test_images, test_labels = images[:1200], labels[:1200], images[1200:], labels[1200:]


class Digits(nn.Module):
    @nn.compact
    def __call__(self, images):
        hidden = nn.relu(nn.Conv(8, (3, 3), strides=2, name="convolution")(images))
        hidden = nn.relu(nn.Dense(40, name="wide")(hidden.reshape(len(hidden), -1)))
        hidden = nn.relu(nn.Dense(16, name="narrow")(hidden))
        return nn.Dense(10, name="head")(hidden)


module = Digits()
network, params = networks.from_linen(module), module.init(jax.random.key(0), images[:1])["params"]
loss = optax.softmax_cross_entropy_with_integer_labels
params = train.fit(
    network, params, train_images, train_labels, loss, optimizer=optax.adam(3e-3), key=jax.random.key(1), epochs=12
).params


def accuracy(params):
    return float((network(params, test_images).argmax(-1) == test_labels).mean())


print(networks.layers(network, params, train_images, exclude="head/*"))
calibration = train_images[:400]
options = {
    "stages": 4,
    "metric": "fisher",
    "exclude": "head/*",
    "repair": repair.Survivors(frozen="head/*"),
}
sparsity = {"convolution/*": 0.25, "wide/*": 0.9, "*": 0.6}
by_layer = prune.staged(network, params, calibration, sparsity, **options)
two_of_four = prune.staged(network, params, calibration, scope=(2, 4), **options)

for name, pruned in (("by layer", by_layer), ("2:4", two_of_four)):
    print(f"{name}: accuracy {accuracy(pruned.params):.3f}, dense {accuracy(params):.3f}")
    print(prune.summary(pruned.params, pruned.masks))

figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
for row, (name, pruned) in zip(axes, (("by layer", by_layer), ("2:4", two_of_four))):
    plots.sparsity_by_layer(pruned.masks, ax=row[0]).set_title(f"{name}: sparsity")
    plots.mask(pruned.masks["narrow"]["kernel"], ax=row[1]).set_title("narrow")
    plots.mask(pruned.masks["wide"]["kernel"], shape=(4, 4, 8), ax=row[2]).set_title("readers of each place")
picture = Path(__file__).with_suffix(".png")
figure.savefig(picture)

for layer, fraction in (("convolution", 0.25), ("wide", 0.9), ("narrow", 0.6)):
    kernel, mask = by_layer.params[layer]["kernel"], by_layer.masks[layer]["kernel"]
    assert int((kernel == 0).sum()) == round(fraction * kernel.size)
    assert ((kernel != 0) == mask).all()
    kept = np.asarray(two_of_four.params[layer]["kernel"] != 0).reshape(-1, kernel.shape[-1])
    groups = [kept[start : start + 4].sum(0) for start in range(0, len(kept), 4)]
    assert all((group == 2).all() for group in groups[: len(kept) // 4])
    assert all((group <= 2).all() for group in groups)
for pruned in (by_layer, two_of_four):
    assert pruned.masks["head"]["kernel"] is None
    assert (pruned.params["head"]["kernel"] == params["head"]["kernel"]).all()
    assert (pruned.params["head"]["bias"] == params["head"]["bias"]).all()
    assert accuracy(pruned.params) > accuracy(params) - 0.03
table = prune.summary(by_layer.params, by_layer.masks)
assert {row.kernel: row.sparsity for row in table.rows}["wide/kernel"] == 0.9
assert picture.stat().st_size > 10_000
