"""Criteria for whole hidden neurons of an MLP: structured elimination-compensation, and what it is measured against."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from ecjax import capture, checks, devices, metrics, moments, networks, precision
from ecjax.moments import Moments
from ecjax.networks import Inputs, Network, Params
from ecjax.score.scores import checked, least, of_each


class NeuronScores(NamedTuple):
    """What removing each hidden neuron costs, and what to put in its place.

    Attributes:
        importance: by the path of its own kernel, one number for each neuron of a hidden layer; the smallest go first.
        constant: for each neuron, the constant that takes the place of its output: the biases of the next layer gain
            ``constant_j · W_j`` when it is removed. None for a criterion that compensates nothing.

    Example:
        >>> scores = score.NeuronScores({"Dense_0/kernel": jnp.arange(8.0)})  # a criterion of one's own
        >>> prune.neurons(params, scores, fraction=0.25).masks["Dense_0"]["kernel"].any(0).tolist()
        [False, False, True, True, True, True, True, True]
    """

    importance: dict[str, Float[Array, " neurons"]]
    constant: dict[str, Float[Array, " neurons"]] | None = None


def neuron_elimination_compensation(
    network: Network,
    params: Params,
    inputs: Inputs,
    *,
    metric: str = "euclidean",
    probes: int | None = None,
    key: PRNGKeyArray | None = None,
    batch_size: int = 1024,
) -> NeuronScores:
    """What is left of removing a whole hidden neuron after every bias of the next layer has moved to make up for it.

    ``I_j = min_c E[Σ_k (∂y_k/∂a_j · (a_j − c))²]``: moving the next biases by ``c · W_j`` is the same as putting
    a constant c in the neuron's place. With the sensitivity ``T_j = Σ_k (∂y_k/∂a_j)²`` to its output ``a_j``,

        c*_j = mean_T(a_j)        I_j = E[T_j] · var_T(a_j)

    Elimination-compensation (Ballini et al., arXiv:2602.20467) one level up; this library's own.

    Args:
        network: an MLP as a pure function ``(params, inputs) -> outputs``.
        params: its parameters, layer after layer (``networks.layers``), each with a bias.
        inputs: calibration inputs, samples along the first axis.
        metric: "euclidean" or, for logits, "fisher".
        probes: None, or the number of random combinations of the K rows of the metric.
        key: random key, needed with ``probes``.
        batch_size: samples at a time.

    Returns:
        NeuronScores: importance in squared units of the outputs, constants in units of the neurons' outputs.

    Raises:
        ValueError: bad inputs, an unknown metric, params that are not an MLP's, or importances that overflow.

    Example:
        >>> scores = score.neuron_elimination_compensation(network, params, inputs, metric="fisher")
        >>> scores.importance["Dense_0/kernel"].shape, scores.constant["Dense_0/kernel"].shape
        ((8,), (8,))
    """
    networks.layers(params)
    options = {"metric": metric, "probes": probes, "key": key, "batch_size": batch_size}
    seen = moments.of_inputs(network, params, inputs, of_weights=False, **options)
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
    paths = networks.layers(params)
    moments.require_layers(params, seen, of_weights=False)
    moments.require_samples(seen)
    read_by = {own: seen.layers[following] for own, following in itertools.pairwise(paths)}
    importance = {path: layer.scatter / seen.samples for path, layer in read_by.items()}
    return checked(NeuronScores(importance, {path: layer.mean for path, layer in read_by.items()}))


def neuron_elimination_compensation_by_definition(
    network: Network, params: Params, inputs: Inputs, *, metric: str = "euclidean"
) -> NeuronScores:
    """The same from the discrepancy itself, one neuron at a time under ``vmap``: the reference.

    Removing the row ``W_j`` of the next kernel while its biases gain ``c · W_j`` changes the outputs by one
    ``jax.jvp``; its mean square is a parabola in c, whose minimum is one Newton step with ``jax.grad`` away. Source:
    Ballini et al., arXiv:2602.20467, one level up.

    Args:
        network: an MLP as a pure function ``(params, inputs) -> outputs``.
        params: its parameters.
        inputs: calibration inputs.
        metric: "euclidean" or "fisher".

    Raises:
        ValueError: as ``neuron_elimination_compensation``.

    Example:
        >>> found = score.neuron_elimination_compensation_by_definition(network, params, inputs, metric="fisher")
        >>> expected = score.neuron_elimination_compensation(network, params, inputs, metric="fisher")
        >>> close = lambda a, b: bool(jnp.allclose(a, b, rtol=1e-3, atol=1e-5))
        >>> jax.tree.map(close, found.importance, expected.importance)
        {'Dense_0/kernel': True}
    """
    checks.require_inputs(inputs)
    metrics.require(metric)
    checks.require_biases(params)
    networks.layers(params)
    inputs = devices.automatic(inputs)
    return checked(NeuronScores(*_all_neurons(network, params, inputs, metric=metric)))


@functools.partial(jax.jit, static_argnames=("network", "metric"))
@precision.in_full
def _all_neurons(network, params, inputs, *, metric):
    paths, leaves = networks.layers(params), networks.by_path(params)
    outputs = network(params, inputs)
    importance, constant = {}, {}
    for own, following in itertools.pairwise(paths):
        kernel, bias = leaves[following], leaves[networks.bias_path(following)]

        def layer(kernel, bias, following=following):
            return network(networks.replace(params, {following: kernel, networks.bias_path(following): bias}), inputs)

        def of_neuron(neuron, layer=layer, kernel=kernel, bias=bias):
            removed = jnp.zeros_like(kernel).at[neuron].set(-kernel[neuron])

            def remainder(constant):
                _, discrepancy = jax.jvp(
                    layer, (kernel, bias), (removed, (constant * kernel[neuron]).astype(bias.dtype))
                )
                return metrics.squared_norm(metric, outputs, discrepancy).mean()

            return least(remainder, jnp.zeros((), capture.tap_dtype(kernel)))

        importance[own], constant[own] = of_each(of_neuron, kernel, kernel.shape[0], at_once=64)
    return importance, constant


def neuron_norm(params: Params) -> NeuronScores:
    """``I_j = ‖W_·j‖₂``, the Euclidean norm of each hidden neuron's incoming weights: magnitude for neurons.

    Args:
        params: an MLP's.

    Raises:
        ValueError: params that are not an MLP's, or that hold NaN or infinity.

    Example:
        >>> chain = {"first": {"kernel": jnp.array([[3.0], [4.0]])}, "second": {"kernel": jnp.ones((1, 2))}}
        >>> score.neuron_norm(chain).importance["first/kernel"].tolist()
        [5.0]
    """
    leaves, paths = networks.by_path(params), networks.layers(params)
    return checked(NeuronScores({path: _column_norms(leaves[path]) for path in paths[:-1]}))


def _column_norms(kernel: Float[Array, "in out"]) -> Float[Array, " out"]:
    """The norm of each column, scaled by a power of two for the time of squaring: nothing over- or underflows."""
    _, exponent = jnp.frexp(jnp.abs(kernel).max(0, initial=0))
    return jnp.ldexp(jnp.linalg.norm(jnp.ldexp(kernel, -exponent), axis=0), exponent)


def neuron_variance(network: Network, params: Params, inputs: Inputs) -> NeuronScores:
    """``I_j = var(a_j)``, the variance of each hidden neuron's output over the inputs, with its mean as the constant.

    Args:
        network: an MLP as a pure function ``(params, inputs) -> outputs``.
        params: its parameters, each layer with a bias.
        inputs: calibration inputs, samples along the first axis.

    Raises:
        ValueError: bad inputs, params that are not an MLP's, or variances that overflow.

    Example:
        >>> scores = score.neuron_variance(network, params, inputs)
        >>> read = capture.tapped(network, params, inputs, {}, biased=True)[1]["Dense_1/kernel"]
        >>> bool(jnp.allclose(scores.importance["Dense_0/kernel"], read.var(0), rtol=1e-4))
        True
    """
    checks.require_inputs(inputs)
    return checked(NeuronScores(*_variances(network, params, devices.automatic(inputs))))


@functools.partial(jax.jit, static_argnames="network")
@precision.in_full
def _variances(network, params, inputs):
    paths = networks.layers(params)
    _, layer_inputs = capture.tapped(network, params, inputs, {}, biased=True)
    read = {own: layer_inputs[following] for own, following in itertools.pairwise(paths)}
    return {path: a.var(0) for path, a in read.items()}, {path: a.mean(0) for path, a in read.items()}
