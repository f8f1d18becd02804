"""What a repair aims at: outputs, labels, or both."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ecjax import _checks, metrics
from ecjax._types import Targets


def mixture(
    outputs: Float[Array | np.ndarray, "samples *positions outputs"],
    labels: Int[Array | np.ndarray, "samples *positions"],
    share: float | int,
) -> Float[Array, "samples *positions outputs"]:
    """Targets between a dense classifier's outputs and labels, as logits: ``log((1 − share) softmax(y) + share e)``.

    Source: Hinton, Vinyals, Dean, arXiv:1503.02531, which weighs the losses of both: the same up to a constant.

    Args:
        outputs: the dense network's logits y.
        labels: the classes; e is the unit vector of each.
        share: of the labels, in [0, 1]; 0 keeps the dense network's predictions, 1 the labels alone.

    Raises:
        ValueError: a share outside [0, 1], labels that are not classes of the outputs.

    Example:
        >>> targets = repair.mixture(jnp.zeros((1, 2)), jnp.array([1]), share=0.5)
        >>> jax.nn.softmax(targets).round(2).tolist()
        [[0.25, 0.75]]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must be in [0, 1], how much the labels count against the outputs")
    _checks.require_labels(labels, outputs.shape)
    return jnp.log((1 - share) * jax.nn.softmax(outputs) + share * jax.nn.one_hot(labels, outputs.shape[-1]))


def as_outputs(targets: Targets, shape: tuple[int, ...], metric: metrics.Metric) -> Array:
    """Targets as rows of outputs: as they are, or the logits of labels.

    Raises:
        ValueError: targets of another shape, labels that are none, or what is no logits where logits are needed.
    """
    fisher = isinstance(metric, metrics.Fisher)
    _checks.require_known(targets)
    if np.shape(targets) == shape:
        targets = jnp.asarray(targets, jnp.promote_types(targets.dtype, jnp.float32))
        probabilities = fisher and _checks.are_probabilities(targets)
        if _checks.are_known(probabilities) and probabilities:
            raise ValueError(
                f"targets of shape {shape} are at least 0 and sum to one: probabilities, or labels as unit vectors; "
                f"the metric Fisher takes logits. Pass labels.argmax(-1), of shape {shape[:-1]}, or "
                "jnp.log(probabilities)"
            )
        return targets
    if fisher and np.ndim(targets) == len(shape) - 1:
        _checks.require_labels(targets, shape)
        return jnp.log(jax.nn.one_hot(targets, shape[-1]))
    labels = f", or labels of shape {shape[:-1]}" if fisher else "; labels are for the metric Fisher"
    raise ValueError(f"targets of shape {np.shape(targets)} do not fit outputs of shape {shape}{labels}")
