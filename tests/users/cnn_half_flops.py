"""Someone has a small convnet with strides and batch normalisation in Flax Linen, wants whole channels gone until half
of its floating-point operations are, and then trains the smaller network on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ecjax import compact, graph, networks, prune, train

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
train_images, test_images, train_labels, test_labels = train_test_split(images, labels, test_size=0.25, random_state=0)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        x = images
        for channels, stride in ((12, 1), (24, 2), (24, 2)):
            x = nn.Conv(channels, (3, 3), strides=stride)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10, name="classifier")(x.reshape(len(x), -1))


module = ConvNet()
variables = module.init(jax.random.key(0), train_images[:1])
params, statistics = variables["params"], variables["batch_stats"]
optimizer = optax.adam(3e-3)
state = optimizer.init(params)


@jax.jit
def update(params, statistics, state, images, labels):
    def mean_loss(params):
        variables = {"params": params, "batch_stats": statistics}
        logits, moved = module.apply(variables, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), moved["batch_stats"]

    gradients, statistics = jax.grad(mean_loss, has_aux=True)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), statistics, state


generator = np.random.default_rng(0)
for _ in range(8):
    order = generator.permutation(len(train_images))
    for start in range(0, len(order) - 63, 64):
        batch = order[start : start + 64]
        params, statistics, state = update(params, statistics, state, train_images[batch], train_labels[batch])

network = networks.from_linen(module, variables={"batch_stats": statistics}, train=False)


def accuracy(network, params):
    return float((network(params, test_images).argmax(-1) == test_labels).mean())


few = train_images[:256]
print(networks.groups(network, params, few))
pruned = prune.neurons(network, params, few, 0.5, by="flops", metric="fisher")
smaller, small = compact.compact(network, pruned.params, few)
print(jax.tree.map(jnp.shape, small))

one = few[:1]
dense_flops, small_flops = graph.count_flops(network, params, one), graph.count_flops(smaller, small, one)
print(f"{dense_flops.products} FLOPs of products, {small_flops.products} in the smaller network")
tuned = train.fit(
    smaller,
    small,
    train_images,
    train_labels,
    optax.softmax_cross_entropy_with_integer_labels,
    optimizer=optax.adam(1e-3),
    key=jax.random.key(1),
    epochs=5,
).params
print(f"accuracy dense {accuracy(network, params):.3f}, with fewer channels {accuracy(smaller, small):.3f}")
print(f"accuracy after training on {accuracy(smaller, tuned):.3f}")

assert not dense_flops.unknown and not small_flops.unknown
assert 0.4 * dense_flops.products < small_flops.products <= 0.5 * dense_flops.products
difference = jnp.abs(smaller(small, test_images) - network(pruned.params, test_images)).max()
assert difference < 1e-4, difference
assert jax.tree.map(jnp.shape, tuned) == jax.tree.map(jnp.shape, small)
assert accuracy(network, params) > 0.95
assert accuracy(smaller, tuned) > accuracy(network, params) - 0.03
