"""My calibration images do not fit in memory: they lie on the disks of two machines. Each reads its part in batches of
varying sizes, the two add up what they have seen, and I prune with that and repair with the few images that I can hold.
"""

import pickle
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from ecjax import moments, networks, prune, repair, score, train

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
test_images, test_labels = images[1400:], labels[1400:]

folder = Path(tempfile.mkdtemp())
shards = {"first.bin": images[:900], "second.bin": images[900:1400]}
for name, shard in shards.items():
    on_disk = np.memmap(folder / name, dtype=np.float32, mode="w+", shape=shard.shape)
    on_disk[:] = shard
    on_disk.flush()


def batches(name, seed):
    """Reads a file from its beginning to its end, between 50 and 200 images at a time."""
    stored = np.memmap(folder / name, dtype=np.float32, mode="r").reshape(-1, 64)
    sizes, start = np.random.default_rng(seed), 0
    while start < len(stored):
        stop = start + int(sizes.integers(50, 201))
        yield np.array(stored[start:stop])
        start = stop


class Digits(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(nn.gelu(nn.Dense(32)(nn.gelu(nn.Dense(64)(images)))))


module = Digits()
network, params = networks.from_linen(module), module.init(jax.random.key(0), images[:1])["params"]
loss, optimizer = optax.softmax_cross_entropy_with_integer_labels, optax.adam(2e-3)
params = train.fit(
    network, params, images[:1400], labels[:1400], loss, optimizer=optimizer, key=jax.random.key(1), epochs=20
).params

# On each machine:
for name, seed in (("first.bin", 1), ("second.bin", 2)):
    seen = moments.of_batches(network, params, batches(name, seed), metric="fisher", progress=True)
    (folder / name).with_suffix(".moments").write_bytes(pickle.dumps(seen))

# On one of them:
first, second = (pickle.loads((folder / name).with_suffix(".moments").read_bytes()) for name in shards)
seen = moments.merge(first, second)
scores = score.elimination_compensation_from_moments(params, seen)
pruned = prune.one_shot(params, scores, sparsity=0.8)

held = next(batches("first.bin", 3))
survivors = repair.Survivors(metric="fisher", iterations=3)
repaired = survivors(network, pruned.params, pruned.masks, held, network(params, held))


def accuracy(params):
    return float((network(params, test_images).argmax(-1) == test_labels).mean())


print(f"accuracy: dense {accuracy(params):.3f}, pruned {accuracy(pruned.params):.3f}, repaired {accuracy(repaired):.3}")
print(prune.summary(repaired, pruned.masks))

assert float(first.samples) == 900
assert float(second.samples) == 500
assert float(seen.samples) == 1400
at_once = score.elimination_compensation(network, params, images[:1400], metric="fisher")
for streamed, whole in zip(jax.tree.leaves(scores.importance), jax.tree.leaves(at_once.importance)):
    assert jnp.allclose(streamed, whole, rtol=1e-3, atol=1e-6 * float(whole.max()))
masks_at_once = prune.one_shot(params, at_once, sparsity=0.8).masks
agree = jax.tree.map(lambda mask, other: float((mask == other).mean()), pruned.masks, masks_at_once)
assert min(jax.tree.leaves(agree)) > 0.99
weights = sum(mask.size for mask in jax.tree.leaves(pruned.masks))
for name, layer in repaired.items():
    assert ((layer["kernel"] != 0) == pruned.masks[name]["kernel"]).all()
assert sum(int((layer["kernel"] == 0).sum()) for layer in repaired.values()) == round(0.8 * weights)
assert accuracy(repaired) > accuracy(params) - 0.05
assert accuracy(repaired) >= accuracy(pruned.params)
