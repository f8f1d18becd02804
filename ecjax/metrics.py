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
    """Raises a ValueError unless ``metric`` names an output metric.

    Example:
        >>> metrics.require("manhattan")
        Traceback (most recent call last):
        ValueError: metric is 'manhattan'; it must be one of 'euclidean', 'fisher'
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; it must be one of {', '.join(map(repr, METRICS))}")


def transposed_factor(
    metric: str, outputs: Float[Array, "samples outputs"]
) -> Callable[[Float[Array, "samples outputs"]], Float[Array, "samples outputs"]]:
    """The linear map ``c -> Rᵀ c`` of each sample: the rows of the metric's factor R, combined with coefficients c.

    A unit vector c picks one row; random signs c make a probe, as ``E[Rᵀc cᵀR] = M``
    (Hutchinson, Communications in Statistics 18, 1989).

    Args:
        metric: "euclidean" or "fisher".
        outputs: where the metric is taken; logits for "fisher".

    Example:
        >>> rows = metrics.transposed_factor("fisher", jnp.zeros((2, 2)))(jnp.eye(2))  # each of one sample
        >>> (rows.T @ rows).round(6).tolist()  # diag(p) − ppᵀ
        [[0.25, -0.25], [-0.25, 0.25]]
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

    Example:
        >>> metrics.matrix("fisher", jnp.zeros((1, 2)))(jnp.array([[1.0, -1.0]])).tolist()
        [[0.5, -0.5]]
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

    Example:
        >>> logits, change = jnp.zeros((1, 2)), jnp.array([[1.0, -1.0]])
        >>> [metrics.squared_norm(metric, logits, change).tolist() for metric in metrics.METRICS]
        [[2.0], [1.0]]
    """
    if metric == "euclidean":
        return jnp.sum(change**2, -1)
    probabilities = jax.nn.softmax(outputs)
    mean = jnp.sum(probabilities * change, -1, keepdims=True)
    return jnp.sum(probabilities * (change - mean) ** 2, -1)
