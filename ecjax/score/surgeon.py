"""Optimal brain surgeon: one weight after another goes, and all that is left moves to make up for it.

The curvature is a matrix of what may move, weights × weights, so it is for networks of which little is left.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from ecjax import _batches, _checks, _door, _memory, _precision, _trees
from ecjax._types import Inputs, Metric, Network, Params, Patterns, Weights
from ecjax.graph import Layers
from ecjax.metrics import row_of, scale_of
from ecjax.moments.stream import require_key, require_probes
from ecjax.score.scores import Scores, checked, scores_of

MOST = 15_000  # weights and biases: 1.8 GB for a matrix of double precision
_BLOCK = 64  # eliminations between two updates of the whole inverse

Places = dict[str, Int[np.ndarray, " _entries"]]


def optimal_brain_surgeon(
    network: Network,
    params: Params,
    inputs: Inputs,
    *,
    metric: Metric = "euclidean",
    weights: Weights | None = None,
    damping: float | int = 0.01,
    samples: int = 2000,
    probes: int | None = None,
    key: PRNGKeyArray | None = None,
    batch_size: int = 128,
    exclude: Patterns = (),
) -> Scores:
    """Optimal brain surgeon: what is left of a removal after all other weights, and the biases, have moved.

    With ``H = E[JᵀMJ] + λ`` of the weights that are not zero and the biases of their layers, the weight goes whose

        c_q = w_q² / (2 [H⁻¹]_qq)        δ = −(w_q / [H⁻¹]_qq) H⁻¹ e_q

    is least, the others move by δ, H loses its row and column, and the next one goes, until half of them have. The
    importance of a weight is what the quadratic has risen to when it goes, ``Σ c`` of all before it and itself; of
    those that stay, that sum and their own c. Where elimination-compensation asks what the adjacent bias can make up
    for, this asks what all that is left can. It is for networks of which little is left: see ``prune.Regrowth``.

    Source: Hassibi, Stork, "Second order derivatives for network pruning: optimal brain surgeon" (1992), with the
    Gauss-Newton matrix of the outputs for their Hessian, so that labels are not needed.

    Args:
        params: of a network at rest: trained, or repaired. With w weights and biases that are left it takes about
            five matrices of w × w numbers in double precision, and some w³ operations.
        damping: λ, as a multiple of the mean diagonal of E[JᵀMJ].
        samples: how many of the inputs, evenly spaced among those with a weight above 0, the curvature is of, at most.
        probes: None for all rows of the metric, one backward pass each; or how many random combinations.
        key: random key, needed with ``probes``.

    Returns:
        Scores without bias shifts, in half squared units of the outputs, of the mean sample, those of weight 0 among
        them; 0 for weights that are zero already.

    Raises:
        ValueError: bad inputs, more than 15,000 weights left, a call under ``jit`` or ``vmap``, where they can't be
            counted, or importances that overflow.

    Example:
        >>> scores = score.optimal_brain_surgeon(network, params, inputs, metric="fisher")
        >>> scores.importance["Dense_0"]["kernel"].shape, scores.bias_shift
        ((4, 8), None)
    """
    require_key(probes, key)
    _checks.require_above_zero(damping, "damping")
    counts = {"samples": samples, "probes": probes, "batch_size": batch_size}
    at = _door.enter(network, params, inputs, exclude=exclude, metric=metric, weights=weights, need="weights", **counts)
    require_probes(at.outputs, probes)
    rows = math.prod(at.outputs.shape[1:]) if probes is None else probes
    places, removable = _left(at.params, at.layers)
    few, share = _some(at.inputs, at.weights, int(samples))
    given = at.params, [*places.values()], *few, at.metric, jax.random.key(0) if key is None else key
    with _memory.enough(f"lower batch_size={batch_size}, or remove more with another criterion before"):
        curvature = share * _curvature(at.network, int(batch_size), probes, rows, tuple(places), *given)
        leaves = _trees.by_path(at.params)
        flat = jnp.concatenate([jnp.ravel(leaves[path])[places[path]].astype(curvature.dtype) for path in places])
        with jax.enable_x64(True):
            found = _eliminated(*(jnp.asarray(array, jnp.float64) for array in (curvature, flat)), removable, damping)
    parts = jnp.split(found.astype(curvature.dtype), np.cumsum([len(where) for where in places.values()])[:-1])
    values, importance = dict(zip(places, parts, strict=True)), {}
    for path in (layer.kernel for layer in at.layers):
        zeros = jnp.zeros(leaves[path].size, curvature.dtype)
        importance[path] = zeros.at[places[path]].set(values[path]).reshape(leaves[path].shape)
    return checked(scores_of(at.params, at.layers, importance))


def _some(inputs: Inputs, weights: Weights | None, most: int) -> tuple[Any, float]:
    """At most so many samples that count, with their weights, and which part of all samples count."""
    count, data = inputs.shape[0], (inputs, weights)
    if most >= count:
        return data, 1.0
    counting = _batches.counting(weights)
    counting = jnp.arange(count) if counting is None else jnp.asarray(counting)
    chosen = _batches.every(counting, most, jnp.int32(0))
    return jax.tree.map(lambda array: jnp.asarray(array[chosen]), data), len(counting) / count


def _left(params: Params, layers: Layers) -> tuple[Places, Bool[np.ndarray, " entries"]]:
    """By path, the places of the weights that are not zero and of all biases; and which of them are weights.

    Raises:
        ValueError: too many, or params that are traced.
    """
    leaves = _trees.by_path(params)
    if not _checks.are_known([leaves[layer.kernel] for layer in layers]):
        raise ValueError(
            "optimal_brain_surgeon counts the weights that are left, which can't be seen under jit or vmap; call it "
            "outside"
        )
    places: Places = {layer.kernel: np.flatnonzero(np.asarray(leaves[layer.kernel])) for layer in layers}
    weights = sum(map(len, places.values()))
    places |= {layer.bias: np.arange(leaves[layer.bias].size) for layer in layers if layer.bias is not None}
    everything = sum(map(len, places.values()))
    require_few(everything)
    return places, np.arange(everything) < weights


def require_few(left: int) -> None:
    """Raises a ValueError if so many weights are more than a matrix of their square can be had of."""
    if left > MOST:
        raise ValueError(
            f"{left:,} weights and biases are left, and optimal_brain_surgeon takes matrices of their square: at most "
            f"{MOST:,}. Remove more with another criterion before, let a smaller fraction regrow, or exclude kernels"
        )


@_precision.compiled("network", "batch_size", "probes", "rows", "paths")
def _curvature(
    network, batch_size, probes, rows, paths, params, places, inputs, weights, metric, key
) -> Float[Array, "entries entries"]:
    """``E[JᵀMJ]`` of what may move, row of the metric after row for a batch of samples at a time."""
    leaves = _trees.by_path(params)
    moving = {path: leaves[path] for path in paths}

    def row(x, weight, number, index):
        """Of one sample: the gradient of one row of the metric, or of a random combination of all."""
        outputs, pull = jax.vjp(lambda moving: network(_trees.replace(params, moving), x[None]), moving)
        chosen = row_of(outputs, index, probes, jax.random.fold_in(key, number))
        scale = jnp.ones((), outputs.dtype) if weight is None else scale_of(weight[None], outputs)
        (slopes,) = pull(metric.factor(outputs, chosen * scale).astype(outputs.dtype))
        return jnp.concatenate([jnp.ravel(slopes[path])[where] for path, where in zip(paths, places, strict=True)])

    samples = inputs.shape[0]
    number = _batches.count(samples, batch_size)

    def add(total, step):
        (batch, weight, numbers), counted = _batches.take(
            (inputs, weights, jnp.arange(samples)), step // rows, batch_size
        )
        of_batch = jax.vmap(row, in_axes=(0, None if weight is None else 0, 0, None))
        found = jnp.where(counted[:, None], of_batch(batch, weight, numbers, step % rows), 0).astype(total.dtype)
        return total + found.T @ found, None

    entries = sum(where.size for where in places)
    zero = jnp.zeros((entries, entries), jnp.zeros(()).dtype)
    return lax.scan(add, zero, jnp.arange(number * rows))[0] / (samples * (probes or 1))


class _Going(NamedTuple):
    """Where the elimination stands; in a block, the inverse is still to lose ``columns · columnsᵀ``."""

    weights: Float[Array, " entries"]  # moved so far
    diagonal: Float[Array, " entries"]  # of the inverse
    left: Bool[Array, " entries"]
    importance: Float[Array, " entries"]
    risen: Float[Array, ""]
    columns: Float[Array, "entries block"]


@jax.jit
def _eliminated(
    curvature: Float[Array, "entries entries"],
    weights: Float[Array, " entries"],
    removable: Bool[Array, " entries"],
    damping: Float[Array, ""],
) -> Float[Array, " entries"]:
    """What the quadratic has risen to when each weight goes, half of them one after another.

    The inverse without a row and column q is ``C − C_q C_qᵀ / C_qq``: a column at a time, and the whole by a matrix
    product for each block of columns.
    """
    entries = len(weights)
    most = (removable.sum() + 1) // 2
    level = damping * jnp.mean(jnp.diagonal(curvature))
    level = jnp.where(level > 0, level, 1)  # a network without any curvature: all cost their squares
    factor = jax.scipy.linalg.cho_factor(curvature + level * jnp.eye(entries), lower=True)
    inverse = jax.scipy.linalg.cho_solve(factor, jnp.eye(entries))

    tiny = jnp.finfo(weights.dtype).tiny

    def costs(now: _Going) -> Array:
        return jnp.where(now.left, now.weights**2 / (2 * jnp.maximum(now.diagonal, tiny)), jnp.inf)

    def block(done, carry):
        inverse, now = carry

        def one(step, now: _Going) -> _Going:
            cost = costs(now)
            goes = jnp.argmin(cost)
            column = inverse[:, goes] - now.columns @ now.columns[goes]
            column = column / jnp.sqrt(jnp.maximum(column[goes], tiny))
            risen = now.risen + cost[goes]
            return _Going(
                weights=(now.weights - column * (now.weights[goes] / column[goes])).at[goes].set(0),
                diagonal=now.diagonal - column**2,
                left=now.left.at[goes].set(False),
                importance=now.importance.at[goes].set(risen),
                risen=risen,
                columns=now.columns.at[:, step].set(column),
            )

        now = lax.fori_loop(0, jnp.minimum(_BLOCK, most - done * _BLOCK), one, now)
        inverse = inverse - now.columns @ now.columns.T
        return inverse, now._replace(columns=jnp.zeros_like(now.columns))

    zero = jnp.zeros_like(weights)
    now = _Going(
        weights, jnp.diagonal(inverse), removable, zero, zero.sum(), jnp.zeros((entries, _BLOCK), weights.dtype)
    )
    _, now = lax.fori_loop(0, -(-most // _BLOCK), block, (inverse, now))
    return jnp.where(now.left, now.risen + costs(now), now.importance)
