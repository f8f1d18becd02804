"""Someone has a residual multilayer perceptron with layer normalisation in Flax Linen, wants it pruned in stages, made
smaller, and kept in one file that answers the same where only the module's code and the file are at hand."""

import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ecjax import compact, networks, prune, train


class ResidualMLP(nn.Module):
    hidden_widths: tuple[int, ...]  # of each block
    stream: int = 16

    @nn.compact
    def __call__(self, inputs):
        stream = nn.Dense(self.stream, name="embed")(inputs)
        for number, width in enumerate(self.hidden_widths):
            hidden = nn.Dense(width, name=f"up_{number}")(nn.LayerNorm(name=f"norm_{number}")(stream))
            stream = stream + nn.Dense(self.stream, name=f"down_{number}")(nn.gelu(hidden))
        return nn.Dense(1, name="readout")(nn.LayerNorm(name="last_norm")(stream))


def function(inputs):
    return (np.sin(3 * inputs[:, 0]) * inputs[:, 1] + inputs[:, 2] ** 2 - inputs[:, 3] * inputs[:, 4])[:, None]


generator = np.random.default_rng(0)
inputs = generator.uniform(-1, 1, (2000, 8)).astype(np.float32)
targets = function(inputs).astype(np.float32)
new_inputs = generator.uniform(-1, 1, (500, 8)).astype(np.float32)
new_targets = function(new_inputs).astype(np.float32)

module = ResidualMLP(hidden_widths=(48, 48))
network, params = networks.from_linen(module), module.init(jax.random.key(0), inputs[:1])["params"]
params = train.fit(
    network, params, inputs, targets, optax.squared_error, optimizer=optax.adam(3e-3), key=jax.random.key(1), epochs=60
).params


def error(network, params):
    return float(jnp.mean((network(params, new_inputs) - new_targets) ** 2))


print(networks.layers(network, params, inputs))
print(networks.groups(network, params, inputs))

pruned = prune.staged(network, params, inputs, sparsity=0.9)
print(prune.summary(pruned.params, pruned.masks))
smaller, small = compact.compact(network, pruned.params, inputs)
print(jax.tree.map(jnp.shape, small))

folder = Path(tempfile.mkdtemp())
size = compact.save(folder / "residual.safetensors", small, network=smaller, inputs=inputs)
dense_size = compact.save(folder / "dense.safetensors", params, network=network, inputs=inputs)
print(f"{dense_size} bytes dense, {size} bytes pruned")


def load(path):  # a fresh place: nothing but the file and the module's code
    saved = compact.load(path)
    widths = tuple(saved.params[f"up_{number}"]["kernel"].shape[1] for number in range(2))
    loaded_network = saved.require(networks.from_linen(ResidualMLP(widths)))
    return loaded_network, saved.params, widths


loaded_network, loaded_params, widths = load(folder / "residual.safetensors")
print(f"hidden widths {widths}")
print(f"error dense {error(network, params):.2g}, pruned {error(network, pruned.params):.2g}")
print(f"error loaded {error(loaded_network, loaded_params):.2g}, variance {new_targets.var():.2g}")

weights = sum(mask.size for mask in jax.tree.leaves(pruned.masks))
assert sum(int(mask.sum()) for mask in jax.tree.leaves(pruned.masks)) == weights - round(0.9 * weights)
assert sum(widths) < 96
difference = jnp.abs(smaller(small, new_inputs) - network(pruned.params, new_inputs)).max()
assert difference < 1e-4, difference
difference = jnp.abs(loaded_network(loaded_params, new_inputs) - network(pruned.params, new_inputs)).max()
assert difference < 1e-4, difference
assert size < dense_size
assert error(network, params) < 0.05 * new_targets.var()
assert error(loaded_network, loaded_params) < 0.1 * new_targets.var()
