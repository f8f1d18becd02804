"""Prune fully-connected networks in JAX and keep what they know.

``networks`` says what can be pruned, ``score`` how much each weight matters, ``prune`` removes weights,
``compensate`` repairs what is left, ``surgeon`` chooses weights together and moves the others, ``compact`` makes what
remains smaller, ``train`` trains; ``moments`` takes data in batches, ``devices`` spreads it. See the README for the
formulas.

Every docstring has an example that the tests run. All share these names, a small classifier and what is made of it:

    >>> import pathlib
    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import optax
    >>> from flax import nnx
    >>> from ecjax import batches, checks, compact, compensate, devices, gauss_newton, graph, metrics, moments
    >>> from ecjax import networks, precision, prune, score, surgeon, train

    >>> inputs = jax.random.normal(jax.random.key(0), (200, 4))
    >>> labels = (inputs[:, 0] > inputs[:, 1]).astype(int)
    >>> loss, optimizer = optax.softmax_cross_entropy_with_integer_labels, optax.adam(0.01)
    >>> mlp = networks.MLP(features=(8, 2))
    >>> network, params = networks.pure(mlp), mlp.init(jax.random.key(1), inputs)["params"]
    >>> fit = {"loss": loss, "optimizer": optimizer, "key": jax.random.key(2)}
    >>> trained = train.fit(network, params, inputs, labels, epochs=200, **fit)
    >>> params = trained.params
    >>> bool((network(params, inputs).argmax(-1) == labels).mean() > 0.9)
    True

    >>> scores = score.elimination_compensation(network, params, inputs, metric="fisher")
    >>> pruned = prune.one_shot(params, scores, sparsity=0.5)
    >>> gradients = surgeon.loss_gradients(network, params, inputs, labels, loss)
"""

from ecjax import compact, compensate, devices, moments, networks, prune, score, surgeon, train

__all__ = ["compact", "compensate", "devices", "moments", "networks", "prune", "score", "surgeon", "train"]
