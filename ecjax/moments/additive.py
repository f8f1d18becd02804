"""The moments themselves: what they hold, those of no samples, and those of two sets of samples together."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ecjax import capture, networks
from ecjax.networks import Params


class LayerMoments(NamedTuple):
    """Sensitivity-weighted moments of one dense layer's inputs ``a``, for each input j and neuron i.

    Attributes:
        sensitivity: ``Σ_n S_ni``, summed over samples.
        mean: ``Σ_n S_ni a_nj / Σ_n S_ni``; 0 where the sensitivity is 0.
        scatter: ``Σ_n S_ni (a_nj − mean_ij)²``.

    Example:
        >>> layer = moments.of_inputs(network, params, inputs, metric="fisher").layers["Dense_0/kernel"]
        >>> layer.sensitivity.shape, layer.mean.shape, layer.scatter.shape
        ((8,), (4, 8), (4, 8))
    """

    sensitivity: Float[Array, " out"]
    mean: Float[Array, "in out"]
    scatter: Float[Array, "in out"]


class InputMoments(NamedTuple):
    """Moments of one dense layer's inputs ``a``, weighted by ``T_j = Σ_k (∂y_k/∂a_j)²`` through this layer.

    Attributes:
        sensitivity: ``Σ_n T_nj``, summed over samples.
        mean: ``Σ_n T_nj a_nj / Σ_n T_nj``; 0 where the sensitivity is 0.
        scatter: ``Σ_n T_nj (a_nj − mean_j)²``.

    Example:
        >>> seen = moments.of_inputs(network, params, inputs, metric="fisher", of_weights=False)
        >>> layer = seen.layers["Dense_1/kernel"]
        >>> layer.sensitivity.shape, layer.mean.shape, layer.scatter.shape
        ((8,), (8,), (8,))
    """

    sensitivity: Float[Array, " in"]
    mean: Float[Array, " in"]
    scatter: Float[Array, " in"]


class Moments(NamedTuple):
    """The moments of every dense layer, by its kernel's path, and how many samples they are of.

    Example:
        >>> seen = moments.of_inputs(network, params, inputs, metric="fisher")
        >>> float(seen.samples), sorted(seen.layers)
        (200.0, ['Dense_0/kernel', 'Dense_1/kernel'])
    """

    samples: Float[Array, ""]
    layers: dict[str, LayerMoments] | dict[str, InputMoments]


def start(params: Params, *, of_weights: bool = True) -> Moments:
    """The moments of no samples: what ``update`` and ``merge`` start from. At least float32, whatever the params are.

    Args:
        params: of the network; the moments lie on devices as the kernels do.
        of_weights: for each weight (``LayerMoments``), or for each input of a layer (``InputMoments``); the latter of
            an MLP, without the first layer, whose inputs are no neurons.

    Example:
        >>> nothing = moments.start(params)
        >>> float(nothing.samples), nothing.layers["Dense_0/kernel"].mean.shape
        (0.0, (4, 8))
    """

    def zeros(kernel):
        dtype = capture.tap_dtype(kernel)
        if not of_weights:
            return InputMoments(*(jnp.zeros(kernel.shape[:1], dtype) for _ in InputMoments._fields))
        return LayerMoments(
            sensitivity=jnp.zeros(kernel.shape[-1:], dtype),
            mean=jnp.zeros_like(kernel, dtype),
            scatter=jnp.zeros_like(kernel, dtype),
        )

    kernels = networks.by_path(networks.kernels(params)) if of_weights else reading_neurons(params)
    return Moments(jnp.zeros(()), {path: zeros(kernel) for path, kernel in kernels.items()})


def reading_neurons(params: Params) -> dict[str, Array]:
    """The kernels of an MLP that read hidden neurons: all but the first."""
    leaves = networks.by_path(params)
    return {path: leaves[path] for path in networks.layers(params)[1:]}


def merge(first: Moments, second: Moments) -> Moments:
    """The moments of two disjoint sets of samples together, by the parallel formula of Chan, Golub and LeVeque (1983).

    With weights ``w`` and means ``m``: ``m = m₁ + (m₂ − m₁) w₂/w`` and the scatters add up with
    ``(m₂ − m₁)² w₁ w₂/w``. No difference of large numbers is taken.

    Args:
        first: moments of some samples.
        second: moments of others, of the same network and metric.

    Example:
        >>> seen = moments.of_inputs(network, params, inputs, metric="fisher")
        >>> twice = jax.jit(moments.merge)(seen, seen)
        >>> once, both = seen.layers["Dense_0/kernel"], twice.layers["Dense_0/kernel"]
        >>> float(twice.samples), bool(jnp.allclose(both.scatter, 2 * once.scatter))
        (400.0, True)
    """
    layers = {path: _merge_layer(layer, second.layers[path]) for path, layer in first.layers.items()}
    return Moments(first.samples + second.samples, layers)


def _merge_layer(first: LayerMoments | InputMoments, second) -> LayerMoments | InputMoments:
    total = first.sensitivity + second.sensitivity
    share = divide(second.sensitivity, total)
    gap = second.mean - first.mean
    return type(first)(
        sensitivity=total,
        mean=first.mean + gap * share,
        scatter=first.scatter + second.scatter + gap**2 * (first.sensitivity * share),
    )


def divide(numerator: Array, denominator: Array) -> Array:
    """The quotient, and 0 where the denominator is not above 0."""
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0)


def of_weights(seen: Moments) -> bool:
    """Whether these are moments for each weight, not for each input of a layer."""
    return any(isinstance(layer, LayerMoments) for layer in seen.layers.values())


def require_layers(params: Params, seen: Moments, *, of_weights: bool) -> None:
    """Raises a ValueError unless the moments are of these layers, for each weight or for each input.

    Args:
        params: of the network.
        seen: the moments.
        of_weights: whether they must be of weights, or of layers' inputs.

    Example:
        >>> moments.require_layers(params, moments.start(params), of_weights=True)
    """
    fields = LayerMoments._fields if of_weights else InputMoments._fields
    expected = jax.eval_shape(functools.partial(start, of_weights=of_weights), params).layers
    wanted, found = (
        {path: tuple(leaf.shape for leaf in layer) for path, layer in layers.items()}
        for layers in (expected, seen.layers)
    )
    if found != wanted:
        raise ValueError(
            f"moments of other layers: {', '.join(fields)} of shapes {found or 'none'} given, "
            f"{wanted} in a network of these params"
        )


def require_samples(seen: Moments) -> None:
    """Raises a ValueError if the moments are known to be of no samples.

    Example:
        >>> moments.require_samples(moments.start(params))
        Traceback (most recent call last):
            ...
        ValueError: these moments are of no samples; update them with a batch of inputs first
    """
    if not isinstance(seen.samples, jax.core.Tracer) and seen.samples == 0:
        raise ValueError("these moments are of no samples; update them with a batch of inputs first")
