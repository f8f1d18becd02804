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

from ecjax import _checks, _checksum, _door, _trees, graph, metrics
from ecjax._types import Inputs, Metric, Network, Params, Patterns
from ecjax.graph import Layer, Layers
from ecjax.graph.layers import as_patterns
from ecjax.graph.taps import tap_dtype


class LayerMoments(NamedTuple):
    """Sensitivity-weighted moments of one layer's inputs ``a``, for each input j and neuron i.

    Where a sample has several rows, or a kernel several uses, with A and B the gradients of one sample and one row of
    the metric's factor with respect to the kernel and its bias: ``Σ B²``, ``Σ A B / Σ B²`` and ``Σ (A − mean B)²``. A
    stack of kernels has one axis more, before all others.

    Attributes:
        sensitivity: ``Σ_n S_ni``, summed over samples.
        mean: ``Σ_n S_ni a_nj / Σ_n S_ni``; 0 where the sensitivity is 0.
        scatter: ``Σ_n S_ni (a_nj − mean_ij)²``.

    Example:
        >>> layer = moments.of_inputs(network, params, inputs, metric="fisher").layers["Dense_0/kernel"]
        >>> layer.sensitivity.shape, layer.mean.shape, layer.scatter.shape
        ((8,), (4, 8), (4, 8))
    """

    sensitivity: Float[Array, "*stack out"]
    mean: Float[Array, "*stack in out"]
    scatter: Float[Array, "*stack in out"]


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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["samples", "layers", "metric", "params"],
    meta_fields=["read", "exclude", "probes", "of_weights"],
)
@dataclasses.dataclass(frozen=True)
class Moments:
    """The moments of every dense layer, by its kernel's path, of how many samples, and how they are taken.

    Attributes:
        samples: how many, a number.
        layers: ``LayerMoments``, or ``InputMoments``, by the kernel's path; inputs and neurons are those of the kernel
            as a matrix ``(in, out)``.
        metric: of the outputs; its numbers are leaves. What follows is static, but for the last.
        read: the layers of the network.
        exclude: patterns of what was left alone.
        probes: how many random combinations of the metric's rows; None for all rows.
        of_weights: whether these are moments for each weight, not for each input of a layer.
        params: a sum of the bits of the params that they are of, which tells others; 0 before the first samples.

    Example:
        >>> seen = moments.of_inputs(network, params, inputs, metric="fisher")
        >>> float(seen.samples), sorted(seen.layers)
        (200.0, ['Dense_0/kernel', 'Dense_1/kernel'])
    """

    samples: PyTree  # not checked here: a pytree is also mapped to what is no array
    layers: dict
    metric: metrics.Metric
    read: Layers
    exclude: tuple[str, ...] = ()
    probes: int | None = None
    of_weights: bool = True
    params: PyTree = 0


_SAVED = "samples", "layers", "params"


def _to_state(seen: Moments) -> dict:
    state = flax.serialization.to_state_dict({name: getattr(seen, name) for name in _SAVED})
    return state | {"taken": _taken(seen)}


def _from_state(seen: Moments, state: dict) -> Moments:
    _require_alike(_taken(seen), state.get("taken", "moments of which nothing is said"))
    state = {name: state[name] for name in _SAVED}
    found = flax.serialization.from_state_dict({name: getattr(seen, name) for name in _SAVED}, state)
    return dataclasses.replace(seen, **found)


flax.serialization.register_serialization_state(Moments, _to_state, _from_state)


def start(
    network: Network,
    params: Params,
    inputs: Inputs | jax.ShapeDtypeStruct,
    *,
    metric: Metric = "euclidean",
    probes: int | None = None,
    exclude: Patterns = (),
    of_weights: bool = True,
) -> Moments:
    """The moments of no samples: what ``update`` and ``merge`` start from. At least float32, whatever the params are.

    How the moments are taken is said here, once, and travels with them.

    Args:
        inputs: some samples, or their shape, to read the network with.
        probes: None for all K rows of the metric, or how many random ±1 combinations of them to draw for each sample
            (Hutchinson's estimator: the sensitivities stay unbiased).
        of_weights: for each weight (``LayerMoments``), or for each input of a layer (``InputMoments``); the latter of
            a multilayer perceptron, without the first layer, whose inputs are no neurons.

    Raises:
        ValueError: an unknown metric, a network that mixes samples or with a kernel that can't be scored, by name.

    Example:
        >>> nothing = moments.start(network, params, inputs, metric="fisher")
        >>> float(nothing.samples), nothing.layers["Dense_0/kernel"].mean.shape
        (0.0, (4, 8))
    """
    if probes is not None:
        _checks.require_positive(probes, "probes")
    metric = metrics.named(metric)
    network, params, _ = _trees.split(network, params)
    read = _door.layers(network, params, inputs, exclude=exclude)
    return nothing(params, read, metric, as_patterns(exclude), probes, of_weights=of_weights)


def nothing(
    params: Params,
    read: Layers,
    metric: metrics.Metric,
    exclude: tuple[str, ...],
    probes: int | None,
    *,
    of_weights: bool,
) -> Moments:
    """The moments of no samples, of layers that were read already."""
    leaves = _trees.by_path(params)

    def of_neurons(layer: Layer) -> InputMoments:
        kernel = leaves[layer.kernel]
        return InputMoments(*(jnp.zeros(layer.layout.sizes[1], tap_dtype(kernel)) for _ in InputMoments._fields))

    if of_weights:
        found = {layer.kernel: nothing_of(layer, leaves[layer.kernel]) for layer in read}
    else:
        found = {layer.kernel: of_neurons(layer) for layer in graph.chain(read)[1:]}
    return Moments(jnp.zeros(()), found, metric, read, exclude, probes, of_weights, jnp.uint32(0))


def nothing_of(layer: Layer, kernel: Array | np.ndarray) -> LayerMoments:
    """The moments of no samples, of one layer."""
    like = as_matrix(jnp.zeros_like(kernel, tap_dtype(kernel)), layer)
    return LayerMoments(jnp.zeros((*like.shape[:-2], like.shape[-1]), like.dtype), mean=like, scatter=like)


def as_matrix(kernel: Array, layer: Layer) -> Float[Array, "*stack in out"]:
    """A kernel as a matrix, or as a stack of them."""
    matrices = graph.as_matrices(kernel, layer.layout)
    return matrices if layer.layout.stacked else matrices[0]


def together(found: LayerMoments) -> LayerMoments:
    """The moments of all blocks of samples, which lie along a leading axis: ``merge`` for many at once."""
    total = found.sensitivity.sum(0)
    share = divide(found.sensitivity, total)[..., None, :]
    mean = (found.mean * share).sum(0)
    scatter = (found.scatter + (found.mean - mean) ** 2 * found.sensitivity[..., None, :]).sum(0)
    return LayerMoments(total, mean, scatter)


def merge(first: Moments, second: Moments) -> Moments:
    """The moments of two disjoint sets of samples together, by the parallel formula of Chan, Golub and LeVeque (1983).

    With weights ``w`` and means ``m``: ``m = m₁ + (m₂ − m₁) w₂/w`` and the scatters add up with
    ``(m₂ − m₁)² w₁ w₂/w``. No difference of large numbers is taken.

    Args:
        first: moments of some samples.
        second: moments of others, of the same network and params, taken in the same way.

    Raises:
        ValueError: moments of other layers or other params, or taken with another metric, other probes or another
            ``exclude``. Under ``jit`` the params and the numbers of a metric, as its temperature, can't be compared.

    Example:
        >>> seen = moments.of_inputs(network, params, inputs, metric="fisher")
        >>> twice = jax.jit(moments.merge)(seen, seen)
        >>> once, both = seen.layers["Dense_0/kernel"], twice.layers["Dense_0/kernel"]
        >>> float(twice.samples), bool(jnp.allclose(both.scatter, 2 * once.scatter))
        (400.0, True)
    """
    known = _checks.are_known((first.metric, second.metric))
    _require_alike(_taken(first, known), _taken(second, known))
    if first.read != second.read:
        raise ValueError(f"these moments are of networks whose layers differ: {first.read}\n\nand\n\n{second.read}")
    _require_same(first.params, second.params)
    layers = {path: merge_layer(layer, second.layers[path]) for path, layer in first.layers.items()}
    params = jnp.maximum(first.params, second.params)
    return dataclasses.replace(first, samples=first.samples + second.samples, layers=layers, params=params)


def _taken(seen: Moments, numbers: bool = True) -> str:
    """How moments were taken, in words; with the numbers of the metric if they are known."""
    leaves = [np.asarray(leaf, np.float32).tolist() for leaf in jax.tree.leaves(seen.metric)] if numbers else []
    name = f"{type(seen.metric).__name__}({', '.join(map(str, leaves))})"
    rows = "all rows" if seen.probes is None else f"{seen.probes} probes"
    left = f", without {', '.join(seen.exclude)}" if seen.exclude else ""
    return f"{described(seen)}{left}, metric {name}, {rows}"


def described(seen: Moments) -> str:
    """Which layers moments are of, in words."""
    kinds = "weights" if seen.of_weights else "layers' inputs"
    return f"of {kinds} of {', '.join(f'{layer.kernel} {layer.shape}' for layer in seen.read)}"


def _require_alike(first: str, second: str) -> None:
    if first != second:
        raise ValueError(f"these moments were taken in different ways and can't be put together: {first}; and {second}")


def of_same_params(seen: Moments, params: Params) -> Moments:
    """The moments, which from now on are of these params, if the samples so far have gone through no others.

    Under ``jit`` and ``vmap`` nothing tells.

    Raises:
        ValueError: moments of other params.
    """
    if not _checks.are_known((seen.params, params)):
        return seen
    params = _checksum.of_params(params)
    _require_same(seen.params, params)
    return dataclasses.replace(seen, params=params)


def _require_same(first: Array | np.ndarray, second: Array | np.ndarray) -> None:
    if _checks.are_known((first, second)) and first != second and 0 not in (first, second):
        raise ValueError(
            "these moments are of other params: what samples say holds for the params that they went through. Take the "
            "moments anew with these, or give the params that the moments are of"
        )


def merge_layer(first: LayerMoments | InputMoments, second) -> LayerMoments | InputMoments:
    """The moments of one layer of two sets of samples together."""
    total = first.sensitivity + second.sensitivity
    share = divide(second.sensitivity, total)
    gap = second.mean - first.mean
    return type(first)(
        sensitivity=total,
        mean=first.mean + gap * _along(share, gap),
        scatter=first.scatter + second.scatter + gap**2 * _along(first.sensitivity * share, gap),
    )


def _along(of_neurons: Array, matrix: Array) -> Array:
    """What each neuron has, for all inputs of each; of the moments of inputs, as it is."""
    return of_neurons if of_neurons.ndim == matrix.ndim else of_neurons[..., None, :]


def divide(numerator: Array, denominator: Array) -> Array:
    """The quotient, and 0 where the denominator is not above 0."""
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0)


def require(params: Params, seen: Moments, *, of_weights: bool) -> None:
    """Raises a ValueError unless the moments are of some samples, of these params, for each weight or each input."""
    leaves = {path: np.shape(leaf) for path, leaf in _trees.by_path(params).items()}
    fitting = all(leaves.get(layer.kernel) == layer.shape for layer in seen.read)
    if not fitting or seen.of_weights != of_weights:
        wanted = LayerMoments._fields if of_weights else InputMoments._fields
        raise ValueError(
            f"moments of other layers: {described(seen)} given; {', '.join(wanted)} "
            f"{'for each weight' if of_weights else 'for each input'} of these params are needed: {leaves}"
        )
    of_same_params(seen, _trees.arrays(params))
    if _checks.are_known(seen.samples) and seen.samples == 0:
        raise ValueError("these moments are of no samples; update them with a batch of inputs first")
