"""How a change in the network's outputs is measured: ``δᵀ M δ`` for each sample, with M the output metric.

``euclidean``: M = I, the squared change in the raw outputs.
``fisher``: M = diag(p) − ppᵀ with p = softmax(outputs), the Fisher information of a classifier's logits; half of
``δᵀ M δ`` is the Kullback-Leibler divergence between the two predictions, to second order.

Both are used through a factor R with ``RᵀR = M``: the unit rows for ``euclidean``, the rows ``√p_k (e_k − p)`` for
``fisher``.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

METRICS = ("euclidean", "fisher")


def require(metric: str) -> None:
    """Raises a ValueError unless ``metric`` names an output metric."""
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; it must be one of {', '.join(map(repr, METRICS))}")


def transposed_factor(
    metric: str, outputs: Float[Array, "samples outputs"]
) -> Callable[[Float[Array, "samples outputs"]], Float[Array, "samples outputs"]]:
    """The linear map ``c -> Rᵀ c`` of each sample: the rows of the metric's factor R, combined with coefficients c.

    A unit vector c picks one row; random signs c make a Hutchinson probe, as ``E[Rᵀc cᵀR] = M``.

    Args:
        metric: "euclidean" or "fisher".
        outputs: where the metric is taken; logits for "fisher".
    """
    if metric == "euclidean":
        return lambda coefficients: coefficients
    probabilities = jax.nn.softmax(outputs)
    roots = jnp.sqrt(probabilities)

    def apply(coefficients):
        weighted = roots * coefficients
        return weighted - probabilities * weighted.sum(-1, keepdims=True)

    return apply


def matrix(
    metric: str, outputs: Float[Array, "samples outputs"]
) -> Callable[[Float[Array, "samples outputs"]], Float[Array, "samples outputs"]]:
    """The linear map ``δ -> M δ`` of each sample.

    Args:
        metric: "euclidean" or "fisher".
        outputs: where the metric is taken; logits for "fisher".
    """
    if metric == "euclidean":
        return lambda change: change
    probabilities = jax.nn.softmax(outputs)

    def apply(change):
        weighted = probabilities * change
        return weighted - probabilities * weighted.sum(-1, keepdims=True)

    return apply


def squared_norm(
    metric: str, outputs: Float[Array, "samples outputs"], change: Float[Array, "samples outputs"]
) -> Float[Array, " samples"]:
    """``δᵀ M δ`` for each sample; for "fisher" this is the variance of δ under the softmax of the outputs.

    Args:
        metric: "euclidean" or "fisher".
        outputs: where the metric is taken; logits for "fisher".
        change: δ, the change in the outputs.
    """
    if metric == "euclidean":
        return jnp.sum(change**2, -1)
    probabilities = jax.nn.softmax(outputs)
    mean = jnp.sum(probabilities * change, -1, keepdims=True)
    return jnp.sum(probabilities * (change - mean) ** 2, -1)
