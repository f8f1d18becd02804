"""The moments themselves: what they hold, those of no samples, and those of two sets of samples together."""

import dataclasses
import functools
from typing import NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, PyTree

from ecjax import _door, _trees, graph
from ecjax.graph import Layer, Layers
from ecjax.graph.layers import as_patterns
from ecjax.graph.taps import tap_dtype
from ecjax.networks import Inputs, Network, Params, Patterns


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


@functools.partial(jax.tree_util.register_dataclass, data_fields=["samples", "layers"], meta_fields=["read", "exclude"])
@dataclasses.dataclass(frozen=True)
class Moments:
    """The moments of every dense layer, by its kernel's path, and how many samples they are of.

    Attributes:
        samples: how many, a number.
        layers: ``LayerMoments``, or ``InputMoments``, by the kernel's path; inputs and neurons are those of the kernel
            as a matrix ``(in, out)``.
        read: the layers of the network, which are static.
        exclude: patterns of what was left alone, which are static too.

    Example:
        >>> seen = moments.of_inputs(network, params, inputs, metric="fisher")
        >>> float(seen.samples), sorted(seen.layers)
        (200.0, ['Dense_0/kernel', 'Dense_1/kernel'])
    """

    samples: PyTree  # not checked here: a pytree is also mapped to what is no array
    layers: dict
    read: Layers
    exclude: tuple[str, ...] = ()

    @property
    def of_weights(self) -> bool:
        """Whether these are moments for each weight, not for each input of a layer."""
        return any(isinstance(layer, LayerMoments) for layer in self.layers.values())


def _to_state(seen: Moments) -> dict:
    return flax.serialization.to_state_dict({"samples": seen.samples, "layers": seen.layers})


def _from_state(seen: Moments, state: dict) -> Moments:
    found = flax.serialization.from_state_dict({"samples": seen.samples, "layers": seen.layers}, state)
    return dataclasses.replace(seen, **found)


flax.serialization.register_serialization_state(Moments, _to_state, _from_state)


def start(
    network: Network,
    params: Params,
    inputs: Inputs | jax.ShapeDtypeStruct,
    *,
    exclude: Patterns = (),
    of_weights: bool = True,
) -> Moments:
    """The moments of no samples: what ``update`` and ``merge`` start from. At least float32, whatever the params are.

    Args:
        network: pure function ``(params, inputs) -> outputs``.
        params: of the network; the moments lie on devices as the kernels do.
        inputs: some samples, or their shape, to read the network with.
        exclude: patterns of paths that are left alone.
        of_weights: for each weight (``LayerMoments``), or for each input of a layer (``InputMoments``); the latter of
            a multilayer perceptron, without the first layer, whose inputs are no neurons.

    Raises:
        ValueError: a network that mixes samples or with a kernel that can't be scored, by name.

    Example:
        >>> nothing = moments.start(network, params, inputs)
        >>> float(nothing.samples), nothing.layers["Dense_0/kernel"].mean.shape
        (0.0, (4, 8))
    """
    network, params, _ = _trees.split(network, params)
    read = _door.layers(network, params, inputs, exclude=exclude)
    return nothing(params, read, as_patterns(exclude), of_weights=of_weights)


def nothing(params: Params, read: Layers, exclude: tuple[str, ...], *, of_weights: bool) -> Moments:
    """The moments of no samples of layers that were read already."""
    leaves = _trees.by_path(params)

    def zeros(layer: Layer):
        kernel, (_, inputs, neurons) = leaves[layer.kernel], layer.layout.sizes
        dtype = tap_dtype(kernel)
        if not of_weights:
            return InputMoments(*(jnp.zeros(inputs, dtype) for _ in InputMoments._fields))
        like = graph.as_matrices(jnp.zeros_like(kernel, dtype), layer.layout)[0]
        return LayerMoments(sensitivity=jnp.zeros(neurons, dtype), mean=like, scatter=like)

    layers = read if of_weights else graph.chain(read)[1:]
    return Moments(jnp.zeros(()), {layer.kernel: zeros(layer) for layer in layers}, read, exclude)


def merge(first: Moments, second: Moments) -> Moments:
    """The moments of two disjoint sets of samples together, by the parallel formula of Chan, Golub and LeVeque (1983).

    With weights ``w`` and means ``m``: ``m = m₁ + (m₂ − m₁) w₂/w`` and the scatters add up with
    ``(m₂ − m₁)² w₁ w₂/w``. No difference of large numbers is taken.

    Args:
        first: moments of some samples.
        second: moments of others, of the same network and metric.

    Raises:
        ValueError: moments of other layers.

    Example:
        >>> seen = moments.of_inputs(network, params, inputs, metric="fisher")
        >>> twice = jax.jit(moments.merge)(seen, seen)
        >>> once, both = seen.layers["Dense_0/kernel"], twice.layers["Dense_0/kernel"]
        >>> float(twice.samples), bool(jnp.allclose(both.scatter, 2 * once.scatter))
        (400.0, True)
    """
    if first.read != second.read or first.of_weights != second.of_weights:
        raise ValueError(
            f"these moments are of different layers and can't be merged: {_described(first)} and {_described(second)}"
        )
    layers = {path: _merge_layer(layer, second.layers[path]) for path, layer in first.layers.items()}
    return dataclasses.replace(first, samples=first.samples + second.samples, layers=layers)


def _described(seen: Moments) -> str:
    kinds = "weights" if seen.of_weights else "layers' inputs"
    return f"of {kinds} of {', '.join(f'{layer.kernel} {layer.shape}' for layer in seen.read)}"


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


def require(params: Params, seen: Moments, *, of_weights: bool) -> None:
    """Raises a ValueError unless the moments are of some samples, of these params, for each weight or each input."""
    leaves = {path: np.shape(leaf) for path, leaf in _trees.by_path(params).items()}
    fitting = all(leaves.get(layer.kernel) == layer.shape for layer in seen.read)
    if not fitting or (seen.layers and seen.of_weights != of_weights):
        wanted = LayerMoments._fields if of_weights else InputMoments._fields
        raise ValueError(
            f"moments of other layers: {_described(seen)} given; {', '.join(wanted)} "
            f"{'for each weight' if of_weights else 'for each input'} of these params are needed: {leaves}"
        )
    if not isinstance(seen.samples, jax.core.Tracer) and seen.samples == 0:
        raise ValueError("these moments are of no samples; update them with a batch of inputs first")
