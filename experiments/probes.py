"""What random probes are worth in place of all rows of the output metric, where there are many outputs."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from jax import Array

from ecjax import networks, prune, score, train
from ecjax.networks import Network, Params
from experiments.datasets import diffusion_sorption


def agreements(network: Network, params: Params, inputs: Array, numbers: Sequence[int]) -> Iterator[dict[str, float]]:
    """How the ranking by so many probes agrees with the exact one, a row for each number: the mean of three keys."""
    exact = score.elimination_compensation(network, params, inputs)
    for probes in numbers:
        options = [{"probes": probes, "key": jax.random.key(seed)} for seed in range(3)]
        drawn = [score.elimination_compensation(network, params, inputs, **option) for option in options]
        spearman, overlap = np.mean([agreement(params, exact, scores) for scores in drawn], axis=0).tolist()
        yield {"probes": probes, "spearman": spearman, "overlap": overlap}


def agreement(params: Params, exact: score.Scores, found: score.Scores) -> tuple[float, float]:
    """Spearman's rank correlation of two importances, and the share of the weights kept at 0.9 that both keep."""

    def flat(tree):
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])

    ranks = pd.Series(flat(exact.importance)).corr(pd.Series(flat(found.importance)), method="spearman")
    kept, also = (flat(prune.one_shot(params, scores, 0.9).masks) for scores in (exact, found))
    return float(ranks), float((kept & also).sum() / kept.sum())


def surrogate(*, concentrations: int, epochs: int) -> tuple[Network, Params, Array]:
    """A network that has learnt, from a place and the concentration at first, that at 1,000 times."""
    places, times, first = 64, 1000, np.linspace(0, 0.2, concentrations)
    instants = np.linspace(0, diffusion_sorption.LAST_TIME, times + 1)[1:]
    solutions = [diffusion_sorption.solve(cells=places, times=instants, initial_concentration=u) for u in first]
    x = (np.arange(places) + 0.5) / places
    inputs = np.stack([np.tile(x, concentrations), np.repeat(first / 0.2, places)], -1).astype(np.float32)
    targets = np.concatenate([solution.T for solution in solutions]).astype(np.float32)
    mlp = networks.MLP((64, 64, times), jnp.tanh)
    network, params = networks.pure(mlp), mlp.init(jax.random.key(0), inputs[:1])["params"]
    fit = {"loss": optax.squared_error, "optimizer": optax.adam(1e-3), "key": jax.random.key(1), "batch_size": 64}
    trained = train.fit(network, params, inputs, targets, epochs=epochs, **fit)
    return network, trained.params, jnp.asarray(inputs)
