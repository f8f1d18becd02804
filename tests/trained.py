"""A multilayer perceptron trained on a thousand of the bundled digits, for tests of pruning in stages."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ecjax import networks, train
from experiments.datasets import choose

_MLP = networks.MLP((30, 10), nn.relu)
NETWORK = networks.from_linen(_MLP)
DATA = choose.digits()
INPUTS, LABELS = (jnp.asarray(part[:1000]) for part in (DATA.train_inputs, DATA.train_targets))


@functools.cache
def params():
    start = _MLP.init(jax.random.key(0), INPUTS[:1])["params"]
    loss = optax.softmax_cross_entropy_with_integer_labels
    options = {"optimizer": optax.adam(2e-3), "key": jax.random.key(1), "epochs": 40}
    return train.fit(NETWORK, start, INPUTS, LABELS, loss, **options).params
