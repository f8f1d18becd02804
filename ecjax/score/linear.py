"""Elimination-compensation and optimal brain damage, read off the sensitivity-weighted moments."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import PRNGKeyArray

from ecjax import capture, moments, networks
from ecjax.networks import Inputs, Network, Params
from ecjax.score.scores import Scores, as_kernels, checked, times_square


def elimination_compensation(
    network: Network,
    params: Params,
    inputs: Inputs,
    *,
    metric: str = "euclidean",
    probes: int | None = None,
    key: PRNGKeyArray | None = None,
    batch_size: int = 1024,
) -> Scores:
    """Elimination-compensation: what is left of a removal after its adjacent bias has moved to make up for it.

    ``I = min_Δb E[Σ_k (∂y_k/∂W · W − ∂y_k/∂b · Δb)²]``, which in a dense layer is

        Δb*_ij = W_ij · mean_S(a_j)        I_ij = W_ij² · E[S_i] · var_S(a_j)

    with the mean and the variance of the layer's inputs weighted by the sensitivity ``S_i = Σ_k (∂y_k/∂z_i)²``. Source:
    Ballini et al., arXiv:2602.20467; equal to ``elimination_compensation_by_definition`` at the price of about two
    gradient passes over the same samples. A neuron that is dead on every sample has importance and shift 0, and so has
    one whose squared sensitivities are below the smallest number of the dtype.

    Args:
        network: pure function ``(params, inputs) -> outputs`` of shape (samples, K).
        params: its parameters; every kernel is the right factor of one product and has a sibling bias.
        inputs: calibration inputs, samples along the first axis.
        metric: "euclidean" for ``Σ_k δy_k²`` on raw outputs, "fisher" for the softmax Fisher of logits.
        probes: None for the exact sensitivities, or how many random ±1 combinations of the K rows stand in for them.
        key: random key, needed with ``probes``.
        batch_size: samples at a time; it bounds the memory.

    Returns:
        Scores: importance in squared units of the outputs, bias shifts in units of the pre-activations.

    Raises:
        ValueError: bad inputs, an unknown metric, a network without such layers, or importances that overflow, with
            the leaf by name.
    """
    options = {"metric": metric, "probes": probes, "key": key, "batch_size": batch_size}
    seen = moments.of_inputs(network, params, inputs, biased=True, **options)
    kernels = _kernels(params)
    importance = {
        path: times_square(layer.scatter / seen.samples, kernels[path]) for path, layer in seen.layers.items()
    }
    shift = {path: kernels[path] * layer.mean for path, layer in seen.layers.items()}
    return checked(Scores(as_kernels(params, importance), as_kernels(params, shift)))


def optimal_brain_damage(
    network: Network,
    params: Params,
    inputs: Inputs,
    *,
    metric: str = "euclidean",
    probes: int | None = None,
    key: PRNGKeyArray | None = None,
    batch_size: int = 1024,
) -> Scores:
    """Optimal brain damage: what a removal costs when nothing makes up for it.

    ``I_ij = W_ij² · E[Σ_k (∂y_k/∂W_ij)²] = W_ij² · E[S_i a_j²]``, the Gauss-Newton diagonal of the outputs' change.
    Source: LeCun, Denker, Solla, "Optimal brain damage" (1989), with the output metric for their loss.

    Args:
        network: pure function ``(params, inputs) -> outputs`` of shape (samples, K).
        params: its parameters; every kernel is the right factor of one product, biases are not needed.
        inputs: calibration inputs, samples along the first axis.
        metric: "euclidean" or "fisher", as in ``elimination_compensation``.
        probes: None, or the number of random combinations of the K rows.
        key: random key, needed with ``probes``.
        batch_size: samples at a time.

    Returns:
        Scores without bias shifts.

    Raises:
        ValueError: as ``elimination_compensation``.
    """
    options = {"metric": metric, "probes": probes, "key": key, "batch_size": batch_size}
    seen = moments.of_inputs(network, params, inputs, biased=False, **options)
    kernels = _kernels(params)

    def importance(path, layer):
        second_moment = layer.scatter + times_square(layer.sensitivity, layer.mean)
        return times_square(second_moment / seen.samples, kernels[path])

    found = {path: importance(path, layer) for path, layer in seen.layers.items()}
    return checked(Scores(as_kernels(params, found)))


def _kernels(params: Params) -> dict[str, Array]:
    """The kernels by path, in the precision of the moments."""
    kernels = networks.by_path(networks.kernels(params))
    return {path: jnp.asarray(kernel, capture.tap_dtype(kernel)) for path, kernel in kernels.items()}
