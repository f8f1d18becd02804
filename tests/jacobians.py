"""The criteria once more, from explicit per-sample Jacobians in NumPy: slow, obvious, and independent of ecjax."""

from typing import NamedTuple

import jax
import numpy as np


class Jacobians(NamedTuple):
    """Of the outputs with respect to every leaf, shape (samples, outputs, *leaf), and the metric's factor R."""

    leaves: dict[str, np.ndarray]
    factor: np.ndarray

    def of(self, path):
        """R · ∂y/∂leaf for each sample."""
        return np.einsum("nrk,nk...->nr...", self.factor, self.leaves[path])


def jacobians(example, metric="euclidean") -> Jacobians:
    outputs = np.asarray(example.network(example.params, example.inputs))
    per_sample = jax.vmap(lambda x: jax.jacobian(lambda params: example.network(params, x[None])[0])(example.params))(
        example.inputs
    )
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(per_sample)
    }
    return Jacobians(leaves, np.stack([factor(y, metric) for y in outputs]))


def factor(output, metric):
    """A square root of the metric at one sample's outputs, by eigenvectors."""
    if metric == "euclidean":
        return np.eye(len(output))
    p = np.exp(output - output.max())
    p /= p.sum()
    values, vectors = np.linalg.eigh(np.diag(p) - np.outer(p, p))
    return (vectors * np.sqrt(np.maximum(values, 0))).T


def elimination_compensation(found: Jacobians, path, kernel):
    """Importance and shift of every weight by least squares on the stacked discrepancy."""
    kernel = np.asarray(kernel)
    by_weight, by_bias = found.of(path), found.of(path.removesuffix("kernel") + "bias")
    importance, shift = np.zeros(kernel.shape), np.zeros(kernel.shape)
    for index in np.ndindex(kernel.shape):
        removal = (by_weight[(..., *index)] * kernel[index]).ravel()
        bias = by_bias[..., index[-1]].ravel()
        if bias.any():
            shift[index] = np.linalg.lstsq(bias[:, None], removal, rcond=None)[0][0]
        importance[index] = np.sum((removal - bias * shift[index]) ** 2) / len(by_bias)
    return importance, shift


def optimal_brain_damage(found: Jacobians, path, kernel):
    return np.mean(np.sum((found.of(path) * np.asarray(kernel)) ** 2, axis=1), axis=0)
