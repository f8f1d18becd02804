"""The bisection of ``metrics.temperature``: the entropies of softmax(y / T) rise with T."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

_MASKED = 1e4  # how far below the largest a logit is one that a network has ruled out
_HALVINGS = 20  # of the logarithm of a temperature


@jax.jit
def least(
    logits: Float[Array, "samples *positions outputs"],
    weights: Float[Array | np.ndarray, "samples ..."] | None,
    entropy: float | Float[Array, ""],
    floor: float | Float[Array, ""],
) -> Float[Array, ""]:
    """The least temperature from a floor on with a mean entropy that is this share of the largest, by bisection.

    1 where there is no entropy to be had, as of labels.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    logits -= logits.max(-1, keepdims=True)
    masked = logits < -_MASKED
    weights = jnp.ones(logits.shape[0]) if weights is None else jnp.asarray(weights)
    weights = weights.reshape(*weights.shape, *(1,) * (logits.ndim - 1 - weights.ndim))
    enough = entropy * (weights * jnp.log(jnp.sum(~masked, -1))).sum()

    def is_enough(temperature):
        scaled = jax.nn.log_softmax(jnp.where(masked, -jnp.inf, logits / temperature))
        entropies = -jnp.sum(jnp.where(masked, 0, jnp.exp(scaled) * scaled), -1)
        return (weights * entropies).sum() >= enough

    def halve(bounds, _):
        low, high = bounds
        middle = jnp.sqrt(low * high)
        found = is_enough(middle)
        return (jnp.where(found, low, middle), jnp.where(found, middle, high)), None

    # Logits within a range of ε have an entropy of at least log K − ε²/8 (Hoeffding); here ε is 1 − s.
    low = jnp.where(enough > 0, jnp.asarray(floor, logits.dtype), 1)
    high = jnp.maximum(-jnp.min(jnp.where(masked, 0, logits), initial=0) / (1 - entropy), low)
    (_, high), _ = lax.scan(halve, (low, high), length=_HALVINGS)
    return jnp.where(is_enough(low), low, high)
