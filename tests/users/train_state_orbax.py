"""My jobs are killed after some time: I prune a Flax TrainState in stages and train it on, save everything with orbax
between two stages and in the middle of the training, and a new process must end where an uninterrupted one does.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

from ecjax import prune, staged, train

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
train_images, train_labels, test_images, test_labels = images[:1200], labels[:1200], images[1200:], labels[1200:]


class Digits(nn.Module):
    @nn.compact
    def __call__(self, images):
        hidden = nn.relu(nn.Conv(8, (3, 3), strides=2, name="convolution")(images))
        hidden = nn.relu(nn.Dense(32, name="hidden")(hidden.reshape(len(hidden), -1)))
        return nn.Dense(10, name="logits")(hidden)


module = Digits()


def network(params, inputs):
    return module.apply({"params": params}, inputs)


def accuracy(params):
    return float((network(params, test_images).argmax(-1) == test_labels).mean())


@jax.jit
def training_step(state, images, labels):
    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(state.apply_fn(params, images), labels).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def train_epochs(state, epochs):
    for epoch in epochs:
        order = np.random.default_rng(epoch).permutation(len(train_images))
        for chosen in np.split(order, 20):
            state = training_step(state, train_images[chosen], train_labels[chosen])
    return state


sparsities = (0.5, 0.7, 0.8, 0.85)
calibration = train_images[:400]


def prune_stages(state, numbers):
    for number in numbers:
        state = staged.step(network, state, calibration, sparsities[number])
    return state


def pruned_train_state(params, masks):
    optimizer = optax.chain(optax.adamw(2e-3, weight_decay=1e-3), train.keep_pruned(masks))
    return TrainState.create(apply_fn=network, params=params, tx=optimizer)


def equal(first, second):
    same = jax.tree.map(lambda a, b: bool((jnp.asarray(a) == jnp.asarray(b)).all()), first, second)
    return all(jax.tree.leaves(same))


initial = module.init(jax.random.key(0), images[:1])["params"]
checkpointer = ocp.StandardCheckpointer()

if len(sys.argv) > 1:  # the new process: it has nothing but the folder
    folder = Path(sys.argv[1])
    target = staged.start(network, initial, calibration, metric="fisher")
    pruning = checkpointer.restore(folder / "between two stages", target)
    assert abs(prune.sparsity(pruning.masks) - 0.7) < 1e-3
    pruned = staged.finish(prune_stages(pruning, (2, 3)))
    checkpointer.save(folder / "pruned again", {"params": pruned.params, "masks": pruned.masks})

    found = checkpointer.restore(folder / "network")
    target = pruned_train_state(found["params"], found["masks"])
    training = checkpointer.restore(folder / "train state", target)
    training = train_epochs(training, range(12, 14))
    checkpointer.save(folder / "trained again", training)
    checkpointer.wait_until_finished()
    sys.exit()

folder = Path(tempfile.mkdtemp())
dense = TrainState.create(apply_fn=network, params=initial, tx=optax.adam(3e-3))
dense = train_epochs(dense, range(10))

pruning = staged.start(network, dense.params, calibration, metric="fisher")
pruning = prune_stages(pruning, (0, 1))
checkpointer.save(folder / "between two stages", pruning)
pruned = staged.finish(prune_stages(pruning, (2, 3)))

training = pruned_train_state(pruned.params, pruned.masks)
training = train_epochs(training, range(10, 12))
checkpointer.save(folder / "network", {"params": training.params, "masks": pruned.masks})
checkpointer.save(folder / "train state", training)
training = train_epochs(training, range(12, 14))
checkpointer.wait_until_finished()

subprocess.run([sys.executable, __file__, str(folder)], check=True)
pruned_again = checkpointer.restore(folder / "pruned again")
training_again = checkpointer.restore(folder / "trained again", training)

print(f"dense {accuracy(dense.params):.3f}, pruned {accuracy(pruned.params):.3f}, tuned {accuracy(training.params):.3}")
print(prune.summary(training_again.params, pruned_again["masks"]))

assert equal(pruned_again["masks"], pruned.masks)
assert equal(pruned_again["params"], pruned.params)
assert equal(training_again.params, training.params)
assert equal(training_again.opt_state, training.opt_state)
assert int(training_again.step) == 4 * 20
weights = sum(mask.size for mask in jax.tree.leaves(pruned.masks))
assert sum(int((~mask).sum()) for mask in jax.tree.leaves(pruned.masks)) == round(0.85 * weights)
zeros = jax.tree.map(
    lambda mask, leaf: mask is None or bool((leaf[~mask] == 0).all()),
    pruned.masks,
    training.params,
    is_leaf=lambda leaf: leaf is None,
)
assert all(jax.tree.leaves(zeros))
assert accuracy(training.params) > accuracy(dense.params) - 0.03
