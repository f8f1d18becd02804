"""Structured elimination-compensation: of whole neurons, channels, heads and their features, in any network."""

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from ecjax import _batches, _door, _precision, _trees, graph, metrics, moments
from ecjax._types import Inputs, Metric, Network, Params, Patterns, Weights
from ecjax.graph import Group, Layer, Layers
from ecjax.graph.layers import as_patterns
from ecjax.graph.taps import tap_dtype
from ecjax.moments import Moments
from ecjax.moments.additive import require
from ecjax.moments.stream import require_key, require_probes
from ecjax.score import units
from ecjax.score.scores import NeuronScores, checked, least, of_each


def neuron_elimination_compensation(
    network: Network,
    params: Params,
    inputs: Inputs,
    *,
    metric: Metric = "euclidean",
    weights: Weights | None = None,
    probes: int | None = None,
    key: PRNGKeyArray | None = None,
    batch_size: int = 1024,
    exclude: Patterns = (),
) -> NeuronScores:
    """What is left of removing a whole unit after the biases of those that read it have moved to make up for it.

    Units are neurons, channels, features of a residual stream, attention heads: whatever ``networks.groups`` says can
    go. On each edge that reads unit u its values ``a`` are replaced by constants c, which is what moving the readers'
    biases by ``c · W_u`` does. With ``h = ∂(R y)/∂a`` at these edges, for every sample and every row of the metric's
    factor R, and sums over edges and positions,

        A = Σ h·a        B = Σ h, one for each value        c* = (Σ B Bᵀ)⁻¹ Σ B A        I = Σ (A − c*·B)² / N

    A unit of a multilayer perceptron has one value: with ``T = Σ_k (∂y_k/∂a)²`` this is ``c* = mean_T(a)`` and
    ``I = E[T] · var_T(a)``. A head has one for each feature, a channel of a residual stream one for each layer that
    reads it, a unit of a scanned layer one for each turn; these go together, and are scored together.

    What can't be made up for has no B, and c = 0: readers without a bias, that are used more than once or put together
    with others before their bias is added; means and other plain sums; products of two values, as of queries and keys,
    where the unit counts on one side only: leaving it out on both would count the loss twice. Biases that the outputs
    ignore don't move. Where a convolution pads with zeros, its bias moves by what a constant channel adds inside.

    Elimination-compensation (Ballini et al., arXiv:2602.20467) one level up; this library's own.

    Args:
        probes: None for all K rows of the metric, a backward pass each; or the number of random combinations of them.
        key: random key, needed with ``probes``.
        exclude: patterns of paths that are left alone: groups with such a leaf are not scored, such biases don't move.

    Returns:
        NeuronScores: importance in squared units of the outputs, constants in units of the values. Empty for a network
        without units that can go.

    Raises:
        ValueError: bad inputs, an unknown metric, a network that mixes samples, units that are read where it can't be
            seen, fewer rows of the metric than would tell constants from chance, or importances that overflow.

    Example:
        >>> scores = score.neuron_elimination_compensation(network, params, inputs, metric="fisher")
        >>> scores.importance["Dense_0/kernel"].shape, scores.constant["Dense_0/kernel"].shape
        ((8,), (8,))
    """
    require_key(probes, key)
    given = {"exclude": exclude, "metric": metric, "weights": weights, "batch_size": batch_size, "probes": probes}
    at = _door.enter(network, params, inputs, **given, need="any")
    require_probes(at.outputs, probes)
    groups = _door.units(at.network, at.params, at.inputs, exclude=exclude)
    if _is_chain(at.layers, groups):
        taken = {"metric": at.metric, "weights": at.weights, "probes": probes, "key": key, "batch_size": batch_size}
        seen = moments.of_inputs(at.network, at.params, at.inputs, exclude=exclude, of_weights=False, **taken)
        return neuron_elimination_compensation_from_moments(at.params, seen)
    asked = units.Asked(
        at.network,
        tuple(groups.items()),
        as_patterns(exclude),
        probes,
        batch_size=int(batch_size),
        blocks=_batches.blocks(at.inputs),
    )
    units.require_seen(asked, at.params, at.inputs, at.outputs)
    found = units.importance_and_constants(asked, at.metric, at.params, at.inputs, at.weights, key)
    return checked(NeuronScores(found[0], {name: units.as_constants(values) for name, values in found[1].items()}))


def _is_chain(layers: Layers, groups: dict[str, Group]) -> bool:
    """Whether the units are the hidden neurons of an MLP: one layer makes them, the next reads them."""
    return all(layer.outer for layer in layers) and [*groups] == [before.kernel for before, _ in _followed(layers)]


def _followed(layers: Layers) -> list[tuple[Layer, Layer]]:
    """Pairs of layers next to each other, if each reads the neurons of the one before; none otherwise."""
    pairs = list(itertools.pairwise(layers))
    return pairs if all(following.follows == before.kernel for before, following in pairs) else []


def neuron_elimination_compensation_from_moments(params: Params, seen: Moments) -> NeuronScores:
    """Structured elimination-compensation of all samples that went into the moments, of a multilayer perceptron.

    ``c*_j = mean_j`` and ``I_j = scatter_j / samples``: see ``neuron_elimination_compensation``. Where the layer that
    reads a neuron has no bias, ``c = 0`` and ``I_j = (scatter_j + ΣT_j mean_j²) / samples``.

    Args:
        params: of an MLP, that the moments were taken with.
        seen: moments of the layers' inputs, of ``moments.of_batches(..., of_weights=False)`` or of parts merged.

    Raises:
        ValueError: moments of no samples, of other layers or of weights, or params that are not an MLP's.

    Example:
        >>> seen = moments.of_batches(network, params, np.split(inputs, 5), of_weights=False)
        >>> score.neuron_elimination_compensation_from_moments(params, seen).importance["Dense_0/kernel"].shape
        (8,)
    """
    require(params, seen, of_weights=False)
    importance, constant = {}, {}
    for before, layer in _pairs(seen.read):
        found = seen.layers[layer.kernel]
        if layer.bias is None or not layer.weights:  # nothing that could move
            scatter = found.scatter + found.sensitivity * found.mean**2
            importance[before.kernel], constant[before.kernel] = scatter / seen.samples, jnp.zeros((len(scatter), 0))
        else:
            importance[before.kernel], constant[before.kernel] = found.scatter / seen.samples, found.mean
    return checked(NeuronScores(importance, constant))


def _pairs(layers: Layers) -> list[tuple[Layer, Layer]]:
    """Each layer with hidden neurons, and the one that reads them."""
    chain = graph.chain(layers)
    return list(itertools.pairwise(chain))


def neuron_elimination_compensation_by_definition(
    network: Network, params: Params, inputs: Inputs, *, metric: Metric = "euclidean", exclude: Patterns = ()
) -> NeuronScores:
    """The same from the discrepancy itself, one neuron of an MLP at a time under ``vmap``: the reference.

    Removing the row ``W_j`` of the next kernel while its biases gain ``c · W_j`` changes the outputs by one
    ``jax.jvp``; its mean square is a parabola in c, whose minimum is one Newton step with ``jax.grad`` away. Source:
    Ballini et al., arXiv:2602.20467, one level up.

    Raises:
        ValueError: as ``neuron_elimination_compensation``, or another network than a multilayer perceptron with biases.

    Example:
        >>> found = score.neuron_elimination_compensation_by_definition(network, params, inputs, metric="fisher")
        >>> expected = score.neuron_elimination_compensation(network, params, inputs, metric="fisher")
        >>> close = lambda a, b: bool(jnp.allclose(a, b, rtol=1e-3, atol=1e-5))
        >>> jax.tree.map(close, found.importance, expected.importance)
        {'Dense_0/kernel': True}
    """
    at = _door.enter(network, params, inputs, exclude=exclude, metric=metric)
    pairs = _with_biases(at.layers)
    return checked(NeuronScores(*_all_neurons(at.network, pairs, at.params, at.inputs, at.metric)))


def _with_biases(layers: Layers) -> tuple[tuple[Layer, Layer, str], ...]:
    """Each layer with hidden neurons, the one that reads them, and the bias of this one; a ValueError without it."""
    found = []
    for own, following in _pairs(layers):
        if following.bias is None:
            raise ValueError(
                f"kernel '{following.kernel}' has no bias, so nothing can take the place of a neuron that it reads; "
                "give the layer a bias of zeros, or use score.neuron_elimination_compensation"
            )
        found.append((own, following, following.bias))
    return tuple(found)


@_precision.compiled("network", "pairs")
def _all_neurons(network, pairs: tuple[tuple[Layer, Layer, str], ...], params, inputs, metric):
    leaves = _trees.by_path(params)
    outputs = network(params, inputs)
    importance, constant = {}, {}
    for own, following, path in pairs:
        kernel, bias = leaves[following.kernel], leaves[path]
        weights = graph.as_matrices(kernel, following.layout)[0]

        def layer(kernel, bias, following=following, path=path):
            return network(_trees.replace(params, {following.kernel: kernel, path: bias}), inputs)

        def of_neuron(neuron, layer=layer, kernel=kernel, bias=bias, weights=weights, following=following):
            removed = graph.as_leaf(jnp.zeros_like(weights).at[neuron].set(-weights[neuron])[None], following.layout)

            def remainder(constant):
                moved = (constant * weights[neuron]).astype(bias.dtype)[None, None]
                moved = graph.as_leaf(moved, following.bias_layout)
                _, discrepancy = jax.jvp(layer, (kernel, bias), (removed, moved))
                return metrics.squared_norm(metric, outputs, discrepancy).mean()

            return least(remainder, jnp.zeros((), tap_dtype(kernel)))

        found = of_each(of_neuron, kernel, weights.shape[0], at_once=64)
        importance[own.kernel], constant[own.kernel] = found
    return importance, constant
