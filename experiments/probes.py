"""What random probes are worth in place of all rows of the output metric, where there are many outputs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from jax import Array
from rich.table import Table

from ecjax import prune, score, train
from ecjax.networks import MLP, Network, Params, pure
from experiments.datasets import diffusion_sorption
from experiments.rows import Rows

COLUMNS = ["network", "probes", "spearman", "overlap"]


class Given(NamedTuple):
    """What is scored: a network, its params and calibration inputs."""

    network: Network
    params: Params
    inputs: Array


def ranking(
    path: Path, numbers: Sequence[int], networks: Mapping[str, Callable[[], Given]], describe: Callable[[str], None]
) -> pd.DataFrame:
    """How well probes rank the weights of networks with many outputs.

    Args:
        path: of a csv file for the rows, which are not computed again.
        numbers: of probes.
        networks: by name, what makes each with its params and inputs.
        describe: called with the name of a network before it is made.
    """
    plan = [[{"network": name, "probes": probes} for probes in numbers] for name in networks]
    rows = Rows(path, plan, {"spearman": float, "overlap": float})
    for name, make in networks.items():
        if not rows.has(network=name):
            describe(f"probes: {name}")
            given = make()
            exact = score.elimination_compensation(*given)
            rows.add([{"network": name, "probes": probes} | _compared(given, exact, probes) for probes in numbers])
    return rows.frame()


def _compared(given: Given, exact: score.Scores, probes: int) -> dict[str, float]:
    """How the ranking by probes agrees with the exact one: mean of three keys."""
    keys = map(jax.random.key, range(3))
    drawn = [score.elimination_compensation(*given, probes=probes, key=key) for key in keys]
    ranks, kept = zip(*(agreement(given.params, exact, scores) for scores in drawn), strict=True)
    return {"spearman": float(np.mean(ranks)), "overlap": float(np.mean(kept))}


def agreement(params: Params, exact: score.Scores, found: score.Scores) -> tuple[float, float]:
    """Spearman's rank correlation of two importances, and the share of the weights kept at 0.9 that both keep."""
    importances, kept = (
        [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in trees]
        for trees in (
            (exact.importance, found.importance),
            tuple(prune.one_shot(params, scores, 0.9).masks for scores in (exact, found)),
        )
    )
    ranks = pd.Series(importances[0]).corr(pd.Series(importances[1]), method="spearman")
    return float(ranks), float((kept[0] & kept[1]).sum() / kept[0].sum())


def surrogate(concentrations: int, epochs: int) -> Given:
    """A network that has learnt the concentration at 1,000 times.

    Args:
        concentrations: how many solutions it learns, by the concentration at first.
        epochs: of training.
    """
    inputs, histories = _histories(places=64, concentrations=concentrations, times=1000)
    mlp = MLP((64, 64, 1000), jnp.tanh)
    network = pure(mlp)
    params = mlp.init(jax.random.key(0), inputs[:1])["params"]
    fit = {"loss": optax.squared_error, "optimizer": optax.adam(1e-3), "key": jax.random.key(1), "batch_size": 64}
    trained = train.fit(network, params, inputs, histories, epochs=epochs, **fit).params
    return Given(network, trained, jnp.asarray(inputs))


def _histories(*, places: int, concentrations: int, times: int) -> tuple[np.ndarray, np.ndarray]:
    """From (place, first concentration) to the concentration there at every time: diffusion-sorption."""
    instants = np.linspace(0, diffusion_sorption.LAST_TIME, times + 1)[1:]
    first = np.linspace(0, 0.2, concentrations)
    solutions = [diffusion_sorption.solve(cells=places, times=instants, initial_concentration=u) for u in first]
    x = (np.arange(places) + 0.5) / places
    inputs = np.stack([np.tile(x, concentrations), np.repeat(first / 0.2, places)], -1)
    return inputs.astype(np.float32), np.concatenate([np.asarray(u).T for u in solutions]).astype(np.float32)


def table(ranking: pd.DataFrame) -> Table:
    """Every number of probes of every network."""
    shown = Table(title="probes against the exact ranking, networks of 1,000 outputs, mean of three keys")
    for column in COLUMNS:
        shown.add_column(column, justify="right")
    for row in ranking.itertuples(index=False):
        shown.add_row(row.network, str(row.probes), f"{row.spearman:.4f}", f"{row.overlap:.3f}")
    return shown
