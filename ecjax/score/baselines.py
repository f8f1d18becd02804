"""The baselines: magnitude, gradient magnitude and chance."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from ecjax import _door, _trees, checks, devices, precision
from ecjax.graph import Layers
from ecjax.networks import Inputs, Loss, Network, Params, Patterns, Targets
from ecjax.score.scores import Scores, checked, scores_of


def magnitude(network: Network, params: Params, inputs: Inputs, *, exclude: Patterns = ()) -> Scores:
    """``I = |W|``: small weights go first.

    Source: Han et al., "Learning both weights and connections for efficient neural networks", arXiv:1506.02626.

    Args:
        network: pure function ``(params, inputs) -> outputs``, which tells the kernels.
        params: its parameters.
        inputs: calibration inputs; only their shape counts.
        exclude: patterns of paths that are left alone.

    Raises:
        ValueError: no kernels, or kernels that hold NaN or infinity.

    Example:
        >>> scores = score.magnitude(lambda kernel, x: x @ kernel, jnp.array([[-2.0], [1.0]]), jnp.ones((3, 2)))
        >>> scores.importance.tolist()
        [[2.0], [1.0]]
    """
    network, params, _ = _trees.split(network, params)
    layers, leaves = _layers(network, params, inputs, exclude), _trees.by_path(params)
    return checked(scores_of(params, layers, {layer.kernel: jnp.abs(leaves[layer.kernel]) for layer in layers}))


def gradient_magnitude(
    network: Network, params: Params, inputs: Inputs, *, targets: Targets, loss: Loss, exclude: Patterns = ()
) -> Scores:
    """``I = |W · ∂L/∂W|``: the first-order change of the mean loss L when the weight goes.

    Source: Molchanov et al., arXiv:1906.10771, with the gradient of the mean loss.

    Args:
        network: pure function ``(params, inputs) -> outputs``.
        params: its parameters.
        inputs: samples along the first axis.
        targets: what the loss compares each sample's outputs with.
        loss: ``(outputs, targets) -> losses``, as optax's; its mean is differentiated.
        exclude: patterns of paths that are left alone.

    Raises:
        ValueError: bad inputs, not one target for each sample, or importances that overflow.

    Example:
        >>> scores = score.gradient_magnitude(network, params, inputs, targets=labels, loss=loss)
        >>> scores.importance["Dense_0"]["kernel"].shape, scores.bias_shift
        ((4, 8), None)
    """
    checks.require_inputs(inputs)
    checks.require_targets(inputs, targets)
    network, params, _ = _trees.split(network, params)
    layers, leaves = _layers(network, params, inputs, exclude, each_alone=True), _trees.by_path(params)
    inputs, targets = devices.automatic((inputs, targets))
    kernels = {layer.kernel: leaves[layer.kernel] for layer in layers}
    slopes = _loss_gradient(network, params, kernels, inputs, targets, loss=loss)
    return checked(
        scores_of(params, layers, {path: jnp.abs(kernel * slopes[path]) for path, kernel in kernels.items()})
    )


@functools.partial(jax.jit, static_argnames=("network", "loss"))
@precision.in_full
def _loss_gradient(network, params, kernels, inputs, targets, *, loss):
    def mean_loss(kernels):
        return loss(network(_trees.replace(params, kernels), inputs), targets).mean()

    return jax.grad(mean_loss)(kernels)


def random(network: Network, params: Params, inputs: Inputs, *, key: PRNGKeyArray, exclude: Patterns = ()) -> Scores:
    """``I ~ U(0, 1)``, independent for every weight: what any criterion has to beat.

    Args:
        network: pure function ``(params, inputs) -> outputs``, which tells the kernels.
        params: its parameters.
        inputs: calibration inputs; only their shape counts.
        key: what is drawn depends on it alone.
        exclude: patterns of paths that are left alone.

    Raises:
        ValueError: params without kernels.

    Example:
        >>> draw = lambda: score.random(network, params, inputs, key=jax.random.key(0)).importance
        >>> bool((draw()["Dense_0"]["kernel"] == draw()["Dense_0"]["kernel"]).all())
        True
    """
    network, params, _ = _trees.split(network, params)
    layers = _layers(network, params, inputs, exclude)
    shapes = {layer.kernel: layer.shape for layer in layers}
    paths = [path for path in _trees.by_path(params) if path in shapes]
    keys = jax.random.split(key, len(paths))
    draws = {path: jax.random.uniform(k, shapes[path]) for k, path in zip(keys, paths, strict=True)}
    return scores_of(params, layers, draws)


def _layers(network, params, inputs, exclude: Patterns, *, each_alone: bool = False) -> Layers:
    """The layers, of any kind as long as each kernel's role is clear."""
    layers = _door.layers(network, params, inputs, exclude=exclude, scored=False, each_alone=each_alone)
    _door.require_one_product(layers)
    return layers
