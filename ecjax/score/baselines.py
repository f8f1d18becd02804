"""The baselines: magnitude, gradient magnitude and chance."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from ecjax import checks, devices, networks, precision
from ecjax.networks import Inputs, Loss, Network, Params, Targets
from ecjax.score.scores import Scores, checked


def magnitude(params: Params) -> Scores:
    """``I = |W|``: small weights go first.

    Source: Han et al., "Learning both weights and connections for efficient neural networks", arXiv:1506.02626.

    Args:
        params: of any network with a ``kernel`` leaf.

    Raises:
        ValueError: no kernels, or kernels that hold NaN or infinity.

    Example:
        >>> score.magnitude({"kernel": jnp.array([[-2.0], [1.0]])}).importance["kernel"].tolist()
        [[2.0], [1.0]]
    """
    return checked(Scores(jax.tree.map(jnp.abs, _kernels(params))))


def gradient_magnitude(
    network: Network,
    params: Params,
    inputs: Inputs,
    targets: Targets,
    loss: Loss,
) -> Scores:
    """``I = |W · ∂L/∂W|``: the first-order change of the mean loss L when the weight goes.

    Source: Molchanov et al., arXiv:1906.10771, with the gradient of the mean loss.

    Args:
        network: pure function ``(params, inputs) -> outputs``.
        params: its parameters.
        inputs: samples along the first axis.
        targets: what the loss compares each sample's outputs with.
        loss: ``(outputs, targets) -> losses``, as optax's; its mean is differentiated.

    Raises:
        ValueError: bad inputs, not one target for each sample, or importances that overflow.

    Example:
        >>> scores = score.gradient_magnitude(network, params, inputs, labels, loss)
        >>> scores.importance["Dense_0"]["kernel"].shape, scores.bias_shift
        ((4, 8), None)
    """
    checks.require_inputs(inputs)
    checks.require_targets(inputs, targets)
    inputs, targets = devices.automatic((inputs, targets))
    kernels = _kernels(params)
    gradient = networks.kernels(_loss_gradient(network, params, inputs, targets, loss=loss))
    return checked(Scores(jax.tree.map(lambda kernel, slope: jnp.abs(kernel * slope), kernels, gradient)))


@functools.partial(jax.jit, static_argnames=("network", "loss"))
@precision.in_full
def _loss_gradient(network, params, inputs, targets, *, loss):
    return jax.grad(lambda params: loss(network(params, inputs), targets).mean())(params)


def random(params: Params, key: PRNGKeyArray) -> Scores:
    """``I ~ U(0, 1)``, independent for every weight: what any criterion has to beat.

    Args:
        params: of any network with a ``kernel`` leaf.
        key: what is drawn depends on it alone.

    Raises:
        ValueError: params without kernels.

    Example:
        >>> first, again = (score.random(params, jax.random.key(0)).importance["Dense_0"]["kernel"] for _ in range(2))
        >>> bool((first == again).all())
        True
    """
    leaves, structure = jax.tree.flatten(_kernels(params))
    keys = jax.random.split(key, len(leaves))
    draws = [jax.random.uniform(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return Scores(jax.tree.unflatten(structure, draws))


def _kernels(params: Params):
    checks.require_any_kernel(params)
    return networks.kernels(params)
