"""One of two processes that share the calibration inputs: ``python -m tests.two_processes ADDRESS FOLDER RANK``."""

import sys
from pathlib import Path

import jax
import numpy as np

from ecjax import devices, networks, prune, repair, score

SAMPLES, FEATURES = 256, 10


def inputs():
    return np.random.default_rng(0).normal(size=(SAMPLES, FEATURES))


def answer(inputs):
    """Scores, masks of one shot, and masks and params of staged pruning with a repair, by name."""
    mlp = networks.MLP((12, 4))
    network = networks.from_linen(mlp)
    params = mlp.init(jax.random.key(0), np.zeros((1, FEATURES)))["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(inputs.dtype), params)
    scores = score.elimination_compensation(network, params, inputs, metric="fisher", batch_size=32)
    pruned = prune.one_shot(params, scores, 0.7)
    how = repair.Survivors(iterations=1, products=3, curvature_samples=128)
    staged = prune.staged(network, params, inputs, 0.6, stages=1, repair=how)
    named = {"scores": scores, "pruned": pruned, "staged": staged}
    return {name: np.asarray(leaf) for name, leaf in networks.by_path(named).items()}


def main(address, folder, rank):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(address, num_processes=2, process_id=int(rank))
    half = np.split(inputs(), 2)[jax.process_index()]
    np.savez(Path(folder) / f"{rank}.npz", **answer(devices.shard_samples(half, devices.mesh())))


if __name__ == "__main__":
    main(*sys.argv[1:])
