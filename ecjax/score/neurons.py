"""Criteria for whole hidden neurons of an MLP: structured elimination-compensation, and what it is measured against."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray, PyTree

from ecjax import _door, _precision, _trees, graph, metrics, moments
from ecjax._types import Inputs, Metric, Network, Params, Patterns, Weights
from ecjax.graph import Layer, Layers
from ecjax.graph.layers import NO_LAYERS, as_patterns
from ecjax.graph.taps import tap_dtype
from ecjax.moments import Moments
from ecjax.moments.additive import require
from ecjax.score.scores import checked, least, of_each


@functools.partial(jax.tree_util.register_dataclass, data_fields=["importance", "constant"], meta_fields=["layers"])
@dataclasses.dataclass(frozen=True)
class NeuronScores:
    """What removing each hidden neuron costs, and what to put in its place.

    Attributes:
        importance: by the path of their own kernel, one number for each neuron of a hidden layer, of shape (neurons,);
            the smallest go first.
        constant: for each neuron, the constant that takes the place of its output: the biases of the next layer gain
            ``constant_j · W_j`` when it is removed. None for a criterion that compensates nothing.
        layers: of the network, a multilayer perceptron, in order of execution (``networks.layers``). Static.

    Example:
        >>> layers = networks.layers(network, params, inputs)
        >>> scores = score.NeuronScores({"Dense_0/kernel": jnp.arange(8.0)}, layers=layers)  # a criterion of one's own
        >>> prune.neurons(params, scores, fraction=0.25).masks["Dense_0"]["kernel"].any(0).tolist()
        [False, False, True, True, True, True, True, True]
    """

    importance: PyTree  # not checked here: a pytree is also mapped to what is no array
    constant: PyTree | None = None
    layers: Layers = NO_LAYERS


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
    """What is left of removing a whole hidden neuron after every bias of the next layer has moved to make up for it.

    ``I_j = min_c E[Σ_k (∂y_k/∂a_j · (a_j − c))²]``: moving the next biases by ``c · W_j`` is the same as putting
    a constant c in the neuron's place. With the sensitivity ``T_j = Σ_k (∂y_k/∂a_j)²`` to its output ``a_j``,

        c*_j = mean_T(a_j)        I_j = E[T_j] · var_T(a_j)

    Elimination-compensation (Ballini et al., arXiv:2602.20467) one level up; this library's own.

    Args:
        params: of the network; every layer but the first has a bias.
        probes: None, or the number of random combinations of the K rows of the metric.
        key: random key, needed with ``probes``.
        exclude: patterns of paths that are left alone; what is left must still be layer after layer.

    Returns:
        NeuronScores: importance in squared units of the outputs, constants in units of the neurons' outputs.

    Raises:
        ValueError: bad inputs, an unknown metric, params that are not an MLP's, or importances that overflow.

    Example:
        >>> scores = score.neuron_elimination_compensation(network, params, inputs, metric="fisher")
        >>> scores.importance["Dense_0/kernel"].shape, scores.constant["Dense_0/kernel"].shape
        ((8,), (8,))
    """
    options = {"weights": weights, "probes": probes, "key": key, "batch_size": batch_size, "exclude": exclude}
    seen = moments.of_inputs(network, params, inputs, metric=metric, of_weights=False, **options)
    return neuron_elimination_compensation_from_moments(params, seen)


def neuron_elimination_compensation_from_moments(params: Params, seen: Moments) -> NeuronScores:
    """Structured elimination-compensation of all samples that went into the moments.

    ``c*_j = mean_j`` and ``I_j = scatter_j / samples``: see ``neuron_elimination_compensation``.

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
    _require_biases(seen.read)
    read_by = {before.kernel: seen.layers[layer.kernel] for before, layer in _pairs(seen.read)}
    importance = {path: layer.scatter / seen.samples for path, layer in read_by.items()}
    return checked(NeuronScores(importance, {path: layer.mean for path, layer in read_by.items()}, seen.read))


def _pairs(layers: Layers) -> list[tuple[Layer, Layer]]:
    """Each layer with hidden neurons, and the one that reads them."""
    chain = graph.chain(layers)
    return list(itertools.pairwise(chain))


def _require_biases(layers: Layers) -> None:
    for _, layer in _pairs(layers):
        if layer.bias is None:
            raise ValueError(
                f"kernel '{layer.kernel}' has no bias, so nothing can take the place of a neuron that it reads; give "
                "the layer a bias of zeros, or use score.neuron_norm"
            )


def neuron_elimination_compensation_by_definition(
    network: Network, params: Params, inputs: Inputs, *, metric: Metric = "euclidean", exclude: Patterns = ()
) -> NeuronScores:
    """The same from the discrepancy itself, one neuron at a time under ``vmap``: the reference.

    Removing the row ``W_j`` of the next kernel while its biases gain ``c · W_j`` changes the outputs by one
    ``jax.jvp``; its mean square is a parabola in c, whose minimum is one Newton step with ``jax.grad`` away. Source:
    Ballini et al., arXiv:2602.20467, one level up.

    Raises:
        ValueError: as ``neuron_elimination_compensation``.

    Example:
        >>> found = score.neuron_elimination_compensation_by_definition(network, params, inputs, metric="fisher")
        >>> expected = score.neuron_elimination_compensation(network, params, inputs, metric="fisher")
        >>> close = lambda a, b: bool(jnp.allclose(a, b, rtol=1e-3, atol=1e-5))
        >>> jax.tree.map(close, found.importance, expected.importance)
        {'Dense_0/kernel': True}
    """
    at = _door.enter(network, params, inputs, exclude=exclude, metric=metric)
    _require_biases(at.layers)
    found = _all_neurons(at.network, at.layers, at.params, at.inputs, at.metric)
    return checked(NeuronScores(*found, at.layers))


@_precision.compiled("network", "layers")
def _all_neurons(network, layers, params, inputs, metric):
    leaves = _trees.by_path(params)
    outputs = network(params, inputs)
    importance, constant = {}, {}
    for own, following in _pairs(layers):
        kernel, bias = leaves[following.kernel], leaves[following.bias]
        weights = graph.as_matrices(kernel, following.layout)[0]

        def layer(kernel, bias, following=following):
            return network(_trees.replace(params, {following.kernel: kernel, following.bias: bias}), inputs)

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


def neuron_norm(network: Network, params: Params, inputs: Inputs, *, exclude: Patterns = ()) -> NeuronScores:
    """``I_j = ‖W_·j‖₂``, the Euclidean norm of each hidden neuron's incoming weights: magnitude for neurons.

    Args:
        inputs: calibration inputs; only their shape counts.

    Raises:
        ValueError: no multilayer perceptron, or params that hold NaN or infinity.

    Example:
        >>> score.neuron_norm(network, params, inputs).importance["Dense_0/kernel"].shape
        (8,)
    """
    network, params, _ = _trees.split(network, params)
    layers, leaves = _door.layers(network, params, inputs, exclude=exclude, each_alone=False), _trees.by_path(params)
    norms = {
        own.kernel: _column_norms(graph.as_matrices(leaves[own.kernel], own.layout)[0]) for own, _ in _pairs(layers)
    }
    return checked(NeuronScores(norms, layers=layers))


def _column_norms(kernel: Float[Array, "in out"]) -> Float[Array, " out"]:
    """The norm of each column, scaled by a power of two for the time of squaring: nothing over- or underflows."""
    _, exponent = jnp.frexp(jnp.abs(kernel).max(0, initial=0))
    return jnp.ldexp(jnp.linalg.norm(jnp.ldexp(kernel, -exponent), axis=0), exponent)


def neuron_variance(network: Network, params: Params, inputs: Inputs, *, exclude: Patterns = ()) -> NeuronScores:
    """``I_j = var(a_j)``, the variance of each hidden neuron's output over the inputs, with its mean as the constant.

    Args:
        params: of the network; every layer but the first has a bias.

    Raises:
        ValueError: bad inputs, no multilayer perceptron, or variances that overflow.

    Example:
        >>> scores = score.neuron_variance(network, params, inputs)
        >>> hidden = nn.relu(inputs @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
        >>> bool(jnp.allclose(scores.importance["Dense_0/kernel"], hidden.var(0), rtol=1e-4))
        True
    """
    at = _door.enter(network, params, inputs, exclude=exclude)
    _require_biases(at.layers)
    found = _variances(at.network, at.layers, as_patterns(exclude), at.params, at.inputs)
    return checked(NeuronScores(*found, at.layers))


@_precision.compiled("network", "layers", "exclude")
def _variances(network, layers, exclude, params, inputs):
    inputs = graph.at_least_two(inputs)
    reading = graph.read(network, params, inputs, exclude=exclude)
    _, layer_inputs = graph.tapped(reading, params, inputs, {})
    read = {own.kernel: layer_inputs[following.kernel] for own, following in _pairs(layers)}
    return {path: a.var(0) for path, a in read.items()}, {path: a.mean(0) for path, a in read.items()}
