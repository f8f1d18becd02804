"""The baselines: magnitude, gradient magnitude and chance."""

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from ecjax import _batches, _checks, _door, _precision, _trees
from ecjax._types import Inputs, Loss, Network, Params, Patterns, Targets
from ecjax.graph.layers import kernels
from ecjax.score.scores import Scores, checked, scores_of


def magnitude(network: Network, params: Params, inputs: Inputs, *, exclude: Patterns = ()) -> Scores:
    """``I = |W|``: small weights go first.

    Source: Han et al., "Learning both weights and connections for efficient neural networks", arXiv:1506.02626.

    Args:
        network: it tells the kernels.
        inputs: calibration inputs; only their shape counts.

    Raises:
        ValueError: no kernels, or kernels that hold NaN or infinity.

    Example:
        >>> scores = score.magnitude(lambda kernel, x: x @ kernel, jnp.array([[-2.0], [1.0]]), jnp.ones((3, 2)))
        >>> scores.importance.tolist()
        [[2.0], [1.0]]
    """
    network, params, _ = _trees.split(network, params)
    layers = _door.layers(network, params, inputs, exclude=exclude, need="weights", each_alone=False)
    return checked(scores_of(params, layers, {p: jnp.abs(kernel) for p, kernel in kernels(layers, params).items()}))


def gradient_magnitude(
    network: Network, params: Params, inputs: Inputs, *, targets: Targets, loss: Loss, exclude: Patterns = ()
) -> Scores:
    """``I = |W · ∂L/∂W|``: the first-order change of the mean loss L when the weight goes.

    Source: Molchanov et al., arXiv:1906.10771, with the gradient of the mean loss.

    Args:
        targets: what the loss compares each sample's outputs with.
        loss: ``(outputs, targets) -> losses``, as optax's; its mean is differentiated.

    Raises:
        ValueError: bad inputs, not one target for each sample, or importances that overflow.

    Example:
        >>> scores = score.gradient_magnitude(network, params, inputs, targets=labels, loss=loss)
        >>> scores.importance["Dense_0"]["kernel"].shape, scores.bias_shift
        ((4, 8), None)
    """
    at = _door.enter(network, params, inputs, exclude=exclude, targets=targets, need="weights")
    weights = kernels(at.layers, at.params)
    slopes = _loss_gradient(at.network, loss, at.params, weights, at.inputs, _batches.placed(targets))
    return checked(scores_of(at.params, at.layers, {path: jnp.abs(w * slopes[path]) for path, w in weights.items()}))


@_precision.compiled("network", "loss")
def _loss_gradient(network, loss, params, weights, inputs, targets):
    def mean_loss(weights):
        return loss(network(_trees.replace(params, weights), inputs), targets).mean()

    return jax.grad(mean_loss)(weights)


def random(network: Network, params: Params, inputs: Inputs, *, key: PRNGKeyArray, exclude: Patterns = ()) -> Scores:
    """``I ~ U(0, 1)``, independent for every weight: what any criterion has to beat.

    Args:
        network: it tells the kernels.
        inputs: calibration inputs; only their shape counts.
        key: what is drawn depends on it alone.

    Raises:
        ValueError: params without kernels.

    Example:
        >>> draw = lambda: score.random(network, params, inputs, key=jax.random.key(0)).importance
        >>> bool((draw()["Dense_0"]["kernel"] == draw()["Dense_0"]["kernel"]).all())
        True
    """
    network, params, _ = _trees.split(network, params)
    layers = _door.layers(network, params, inputs, exclude=exclude, need="weights", each_alone=False)
    weights = kernels(layers, params)
    _checks.require_key(key)
    keys = jax.random.split(key, len(weights))
    draws = {path: jax.random.uniform(k, weights[path].shape) for k, path in zip(keys, weights, strict=True)}
    return scores_of(params, layers, draws)
