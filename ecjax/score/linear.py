"""Elimination-compensation and optimal brain damage, read off the sensitivity-weighted moments."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PRNGKeyArray

from ecjax import capture, moments, networks
from ecjax.moments import Moments
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
        params: its parameters; every kernel enters one product with the inputs and has a sibling bias.
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

    Example:
        >>> scores = score.elimination_compensation(network, params, inputs, metric="fisher")
        >>> scores.importance["Dense_0"]["kernel"].shape, scores.bias_shift["Dense_0"]["kernel"].shape
        ((4, 8), (4, 8))
    """
    options = {"metric": metric, "probes": probes, "key": key, "batch_size": batch_size}
    seen = moments.of_inputs(network, params, inputs, biased=True, **options)
    return elimination_compensation_from_moments(params, seen)


def elimination_compensation_from_moments(params: Params, seen: Moments) -> Scores:
    """Elimination-compensation of all samples that went into the moments.

    ``Δb*_ij = W_ij · mean_ij`` and ``I_ij = W_ij² · scatter_ij / samples``: see ``elimination_compensation``.

    Args:
        params: that the moments were taken with.
        seen: ``moments.of_batches`` of an iterator, or ``moments.update`` and ``moments.merge`` of parts.

    Raises:
        ValueError: moments of no samples, or of other layers; importances that overflow.

    Example:
        >>> seen = moments.of_batches(network, params, (batch for batch in np.split(inputs, 5)))
        >>> score.elimination_compensation_from_moments(params, seen).importance["Dense_1"]["kernel"].shape
        (8, 2)
    """
    _require_moments(params, seen)
    return checked(_elimination_compensation(params, seen))


@jax.jit
def _elimination_compensation(params: Params, seen: Moments) -> Scores:
    kernels = _kernels(params)
    importance = {
        path: times_square(layer.scatter / seen.samples, kernels[path]) for path, layer in seen.layers.items()
    }
    shift = {path: kernels[path] * layer.mean for path, layer in seen.layers.items()}
    return Scores(as_kernels(params, importance), as_kernels(params, shift))


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
        params: its parameters; every kernel enters one product with the inputs, biases are not needed.
        inputs: calibration inputs, samples along the first axis.
        metric: "euclidean" or "fisher", as in ``elimination_compensation``.
        probes: None, or the number of random combinations of the K rows.
        key: random key, needed with ``probes``.
        batch_size: samples at a time.

    Returns:
        Scores without bias shifts.

    Raises:
        ValueError: as ``elimination_compensation``.

    Example:
        >>> damage = score.optimal_brain_damage(network, params, inputs, metric="fisher").importance
        >>> compensated = scores.importance["Dense_1"]["kernel"]  # of elimination_compensation
        >>> bool((compensated <= 1.001 * damage["Dense_1"]["kernel"]).all())
        True
    """
    options = {"metric": metric, "probes": probes, "key": key, "batch_size": batch_size}
    seen = moments.of_inputs(network, params, inputs, biased=False, **options)
    return optimal_brain_damage_from_moments(params, seen)


def optimal_brain_damage_from_moments(params: Params, seen: Moments) -> Scores:
    """Optimal brain damage of all samples that went into the moments.

    ``I_ij = W_ij² · (scatter_ij + ΣS_i · mean_ij²) / samples``: see ``optimal_brain_damage``.

    Args:
        params: that the moments were taken with; biases are not needed if the moments were with ``biased=False``.
        seen: as for ``elimination_compensation_from_moments``.

    Raises:
        ValueError: moments of no samples, or of other layers; importances that overflow.

    Example:
        >>> seen = moments.of_batches(network, params, np.split(inputs, 5), biased=False)
        >>> score.optimal_brain_damage_from_moments(params, seen).bias_shift is None
        True
    """
    _require_moments(params, seen)
    return checked(_optimal_brain_damage(params, seen))


@jax.jit
def _optimal_brain_damage(params: Params, seen: Moments) -> Scores:
    kernels = _kernels(params)

    def importance(path, layer):
        second_moment = layer.scatter + times_square(layer.sensitivity, layer.mean)
        return times_square(second_moment / seen.samples, kernels[path])

    return Scores(as_kernels(params, {path: importance(path, layer) for path, layer in seen.layers.items()}))


def _require_moments(params: Params, seen: Moments) -> None:
    moments.require_layers(params, seen, of_weights=True)
    moments.require_samples(seen)


def _kernels(params: Params) -> dict[str, Array]:
    """The kernels by path, in the precision of the moments."""
    kernels = networks.by_path(networks.kernels(params))
    return {path: jnp.asarray(kernel, capture.tap_dtype(kernel)) for path, kernel in kernels.items()}
