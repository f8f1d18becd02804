"""Someone's network has no bias anywhere, so nothing next to a removed weight can make up for it; they look at what EC
does then, give the network zero biases to have the compensation, and prune and repair both."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ecjax import networks, prune, repair, score, train

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
train_images, test_images, train_labels, test_labels = train_test_split(images, labels, test_size=0.25, random_state=0)


class Classifier(nn.Module):
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        for width in (48, 32):
            x = nn.relu(nn.Dense(width, use_bias=self.use_bias)(x))
        return nn.Dense(10, use_bias=self.use_bias)(x)


module = Classifier(use_bias=False)
network, params = networks.from_linen(module), module.init(jax.random.key(0), train_images[:1])["params"]
fit = {"loss": optax.softmax_cross_entropy_with_integer_labels, "optimizer": optax.adam(2e-3), "key": jax.random.key(1)}
params = train.fit(network, params, train_images, train_labels, epochs=30, **fit).params


def accuracy(network, params):
    return float((network(params, test_images).argmax(-1) == test_labels).mean())


layers = networks.layers(network, params, train_images)
print(layers)
assert all(layer.bias is None for layer in layers)

# Without biases, elimination-compensation is optimal brain damage.
scores = score.elimination_compensation(network, params, train_images, metric="fisher")
damage = score.optimal_brain_damage(network, params, train_images, metric="fisher")
for one, other in zip(jax.tree.leaves(scores.importance), jax.tree.leaves(damage.importance)):
    assert jnp.allclose(one, other, rtol=1e-4)
assert all((shift == 0).all() for shift in jax.tree.leaves(scores.bias_shift))

# The same network with biases of zero.
with_biases = Classifier(use_bias=True)
biased_network = networks.from_linen(with_biases)
biased = {name: {**layer, "bias": jnp.zeros(layer["kernel"].shape[1])} for name, layer in params.items()}
assert jnp.allclose(biased_network(biased, test_images), network(params, test_images), atol=1e-5)
biased_scores = score.elimination_compensation(biased_network, biased, train_images, metric="fisher")
assert any((shift != 0).any() for shift in jax.tree.leaves(biased_scores.bias_shift))
for name in params:
    compensated, damaged = biased_scores.importance[name]["kernel"], damage.importance[name]["kernel"]
    assert (compensated <= 1.001 * damaged + 1e-12).all()

sparsity = 0.8
plain = prune.one_shot(params, scores, sparsity)
compensated = prune.one_shot(biased, biased_scores, sparsity)
dense_accuracy, dense_outputs = accuracy(network, params), network(params, train_images)
print(f"dense {dense_accuracy:.3f}")
print(f"at once: without biases {accuracy(network, plain.params):.3f}", end=", ")
print(f"with them {accuracy(biased_network, compensated.params):.3f}")

# A repair of the masks found above, and pruning in stages.
repaired = repair.Survivors(metric="fisher")(network, plain.params, plain.masks, train_images, dense_outputs)
in_stages = prune.staged(network, params, train_images, sparsity, metric="fisher")
biased_in_stages = prune.staged(biased_network, biased, train_images, sparsity, metric="fisher")
print(f"repaired {accuracy(network, repaired):.3f}")
print(f"in stages: without biases {accuracy(network, in_stages.params):.3f}", end=", ")
print(f"with them {accuracy(biased_network, biased_in_stages.params):.3f}")

weights = sum(layer.weights for layer in layers)
for pruned in (plain, compensated, in_stages, biased_in_stages):
    assert sum(int(mask.sum()) for mask in jax.tree.leaves(pruned.masks)) == weights - round(sparsity * weights)
    for name, layer in pruned.params.items():
        assert (layer["kernel"][~pruned.masks[name]["kernel"]] == 0).all()
for name in params:
    assert "bias" not in in_stages.params[name]
    assert (repaired[name]["kernel"][~plain.masks[name]["kernel"]] == 0).all()
assert dense_accuracy > 0.93
assert accuracy(biased_network, compensated.params) > accuracy(network, plain.params)
assert accuracy(network, repaired) > accuracy(network, plain.params)
assert accuracy(network, in_stages.params) > dense_accuracy - 0.03
