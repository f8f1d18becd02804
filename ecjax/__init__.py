"""Prune neural networks in JAX, and keep what they know.

A network is any pure function ``network(params, inputs) -> outputs``; ``params`` is any pytree. Start here:

    networks   what a network is, doors from Flax, and ``networks.layers``: what can be pruned, as a table
    score      criteria: how much each weight matters
    prune      removes weights or neurons, in one shot or in stages
    repair     lets what is left make up for what was removed
    compact    makes what remains smaller, and saves it

and further: ``metrics`` measures changes of the outputs, ``moments`` takes data in batches, ``surgeon`` chooses weights
together and moves the others, ``train`` trains, ``devices`` spreads data and params over several, ``plots`` draws (with
matplotlib: ``pip install 'ecjax[plots]'``). In five lines:

    from ecjax import networks, prune

    network = networks.from_linen(module)
    print(networks.layers(network, params, inputs))
    pruned = prune.staged(network, params, inputs, sparsity=0.9, metric="fisher")
    # pruned.params, pruned.masks

``help(prune.staged)`` says more; ecjax/README.md has the formulas, and where each is in the code and in the tests.

Every docstring has an example that the tests run. All share these names, a small classifier and what is made of it:

    >>> import functools
    >>> import pathlib
    >>> from typing import NamedTuple
    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import optax
    >>> from flax import nnx
    >>> from ecjax import compact, devices, graph, metrics, moments, networks, prune, repair, score, staged, surgeon
    >>> from ecjax import train

    >>> inputs = jax.random.normal(jax.random.key(0), (200, 4))
    >>> labels = (inputs[:, 0] > inputs[:, 1]).astype(int)
    >>> loss, optimizer = optax.softmax_cross_entropy_with_integer_labels, optax.adam(0.01)
    >>> mlp = networks.MLP(features=(8, 2))
    >>> network, params = networks.from_linen(mlp), mlp.init(jax.random.key(1), inputs)["params"]
    >>> fit = {"loss": loss, "optimizer": optimizer, "key": jax.random.key(2)}
    >>> trained = train.fit(network, params, inputs, labels, epochs=200, **fit)
    >>> params = trained.params
    >>> bool((network(params, inputs).argmax(-1) == labels).mean() > 0.9)
    True

    >>> scores = score.elimination_compensation(network, params, inputs, metric="fisher")
    >>> pruned = prune.one_shot(params, scores, sparsity=0.5)
    >>> gradients = surgeon.loss_gradients(network, params, inputs, labels, loss)
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from ecjax import devices, metrics, moments, networks, prune, repair, score, staged, surgeon, train

if TYPE_CHECKING:
    from ecjax import compact

__all__ = [
    "compact",
    "devices",
    "metrics",
    "moments",
    "networks",
    "prune",
    "repair",
    "score",
    "staged",
    "surgeon",
    "train",
]


def __getattr__(name: str) -> ModuleType:
    """Imports ``compact`` when it is first asked for: it needs SciPy, which takes as long as all the rest."""
    if name == "compact":
        return importlib.import_module("ecjax.compact")
    raise AttributeError(f"module 'ecjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
