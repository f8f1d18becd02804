"""Elimination-compensation and optimal brain damage, read off the sensitivity-weighted moments."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.shard_alike import shard_alike
from jaxtyping import Float, PRNGKeyArray

from ecjax import _trees, graph, moments
from ecjax._types import Inputs, Metric, Network, Params, Patterns, Weights
from ecjax.graph import Layer
from ecjax.graph.taps import tap_dtype
from ecjax.moments import Moments
from ecjax.moments.additive import as_matrix, require
from ecjax.score.scores import Scores, checked, scores_of, times_square


def elimination_compensation(
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
) -> Scores:
    """Elimination-compensation: what is left of a removal after its adjacent bias has moved to make up for it.

    ``I = min_Δb E[Σ_k (∂y_k/∂W · W − ∂y_k/∂b · Δb)²]``, which in a dense layer is

        Δb*_ij = W_ij · mean_S(a_j)        I_ij = W_ij² · E[S_i] · var_S(a_j)

    with the mean and the variance of the layer's inputs weighted by the sensitivity ``S_i = Σ_k (∂y_k/∂z_i)²``. Where a
    kernel sees several rows of a sample (convolutions, sequences, scans), or is used more than once, A and B are the
    gradients of one sample and one row of the metric with respect to the kernel and its bias, and

        Δb* = W · Σ A B / Σ B²        I = W² · Σ (A − (Σ A B / Σ B²) B)² / N

    A bias that the outputs or the metric ignore, as attention those of its keys, does not move. Source: Ballini et al.,
    arXiv:2602.20467; equal to ``elimination_compensation_by_definition`` at the price of about two gradient passes over
    the same samples in an MLP, and with a backward pass for each row or probe elsewhere. A neuron that is dead on every
    sample has importance and shift 0, and so has one whose squared sensitivities are below the smallest number of the
    dtype.

    Args:
        params: of the network. A kernel without a bias has nothing to move: its importance is that of
            ``optimal_brain_damage``, its shift 0.
        probes: None for the exact sums over all rows of the metric, one backward pass each; or how many random
            combinations of them stand in for all (a sign for each sample, position and output). Then ``Σ A²``, ``Σ AB``
            and ``Σ B²`` are unbiased, with a relative error that falls as one over the root of probes × samples.
        key: random key, needed with ``probes``.

    Returns:
        Scores: importance in squared units of the outputs, bias shifts in units of the pre-activations.

    Raises:
        ValueError: bad inputs, an unknown metric, a network that mixes samples, a kernel that can't be scored, or
            importances that overflow, with the leaf by name.

    Example:
        >>> scores = score.elimination_compensation(network, params, inputs, metric="fisher")
        >>> scores.importance["Dense_0"]["kernel"].shape, scores.bias_shift["Dense_0"]["kernel"].shape
        ((4, 8), (4, 8))
    """
    seen = moments.of_inputs(
        network,
        params,
        inputs,
        metric=metric,
        weights=weights,
        probes=probes,
        key=key,
        batch_size=batch_size,
        exclude=exclude,
    )
    return checked(_elimination_compensation(_trees.arrays(params), seen))


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
    require(params, seen, of_weights=True)
    return checked(_elimination_compensation(_trees.arrays(params), seen))


@jax.jit
def _elimination_compensation(params: Params, seen: Moments) -> Scores:
    importance, shift, leaves = {}, {}, _trees.by_path(params)
    for layer in seen.read:
        kernel, found = _matrix(leaves, layer), seen.layers[layer.kernel]
        scatter = found.scatter if layer.bias else _second_moment(found)
        importance[layer.kernel] = graph.as_leaf(times_square(scatter / seen.samples, kernel), layer.layout)
        if layer.bias:
            shift[layer.kernel] = graph.as_leaf(kernel * found.mean, layer.layout)
        else:  # zeros, which would lie on every device whole
            leaf = leaves[layer.kernel]
            shift[layer.kernel] = shard_alike(leaf, jnp.zeros(leaf.shape, kernel.dtype))[1]
    return scores_of(params, seen.read, importance, shift)


def optimal_brain_damage(
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
) -> Scores:
    """Optimal brain damage: what a removal costs when nothing makes up for it.

    ``I_ij = W_ij² · E[Σ_k (∂y_k/∂W_ij)²] = W_ij² · E[S_i a_j²]``, the Gauss-Newton diagonal of the outputs' change.
    Source: LeCun, Denker, Solla, "Optimal brain damage" (1989), with the output metric for their loss.

    The arguments and errors are those of ``elimination_compensation``; the scores have no bias shifts.

    Example:
        >>> damage = score.optimal_brain_damage(network, params, inputs, metric="fisher").importance
        >>> compensated = scores.importance["Dense_1"]["kernel"]  # of elimination_compensation
        >>> bool((compensated <= 1.001 * damage["Dense_1"]["kernel"]).all())
        True
    """
    seen = moments.of_inputs(
        network,
        params,
        inputs,
        metric=metric,
        weights=weights,
        probes=probes,
        key=key,
        batch_size=batch_size,
        exclude=exclude,
    )
    return checked(_optimal_brain_damage(_trees.arrays(params), seen))


def optimal_brain_damage_from_moments(params: Params, seen: Moments) -> Scores:
    """Optimal brain damage of all samples that went into the moments.

    ``I_ij = W_ij² · (scatter_ij + ΣS_i · mean_ij²) / samples``: see ``optimal_brain_damage``.

    Args:
        params: that the moments were taken with.
        seen: as for ``elimination_compensation_from_moments``.

    Raises:
        ValueError: moments of no samples, or of other layers; importances that overflow.

    Example:
        >>> seen = moments.of_batches(network, params, np.split(inputs, 5))
        >>> score.optimal_brain_damage_from_moments(params, seen).bias_shift is None
        True
    """
    require(params, seen, of_weights=True)
    return checked(_optimal_brain_damage(_trees.arrays(params), seen))


@jax.jit
def _optimal_brain_damage(params: Params, seen: Moments) -> Scores:
    importance, leaves = {}, _trees.by_path(params)
    for layer in seen.read:
        damage = _second_moment(seen.layers[layer.kernel]) / seen.samples
        importance[layer.kernel] = graph.as_leaf(times_square(damage, _matrix(leaves, layer)), layer.layout)
    return scores_of(params, seen.read, importance)


def _second_moment(found: moments.LayerMoments) -> Float[Array, "*stack in out"]:
    """``Σ_n S_ni a_nj²``."""
    return found.scatter + times_square(found.sensitivity[..., None, :], found.mean)


def _matrix(leaves: dict[str, Array], layer: Layer) -> Float[Array, "*stack in out"]:
    """A kernel as a matrix, or as a stack of them, in the precision of the moments."""
    kernel = leaves[layer.kernel]
    return as_matrix(jnp.asarray(kernel, tap_dtype(kernel)), layer)
