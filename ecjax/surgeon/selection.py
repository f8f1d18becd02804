"""The combinatorial brain surgeon's selection (CBS-S): which weights can go together."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from ecjax import _checks, _trees
from ecjax._types import Kernels, Params, Sparsities
from ecjax.prune import patterns, smallest
from ecjax.surgeon.fisher import (
    flatten_gradients,
    flatten_masks,
    flatten_weights,
    of_masked,
    quadratic,
    require_gradients,
    unflatten_weights,
)

STARTS = ("rmp", "magnitude")
_DRAWS_AT_ONCE = 10


def combinatorial_selection(
    params: Params,
    gradients: Kernels,
    sparsity: Sparsities,
    *,
    start: str | Kernels = "rmp",
    key: PRNGKeyArray | None = None,
    damping: float | int = 0.01,
    draws: int = 100,
    window: int = 10,
    threshold: float | int = 1e-4,
    patience: int = 20,
    passes: int = 100,
) -> Kernels:
    """Chooses the weights P to remove together, ``argmin ½ w_Pᵀ F w_P``, by local search.

    Removing weight i from P changes the objective by ``−α_i``, adding j by ``β_j``, both by ``−α_i + β_j − γ_ij``:

        α_i = w_i (F w_P)_i − ½ F_ii w_i²        β_j = w_j (F w_P)_j + ½ F_jj w_j²        γ_ij = w_i w_j F_ij

    A pass goes through P by falling α. For each i the first j by rising β are looked at, in a window that moves on with
    every swap, and the best of them is swapped in if the objective falls by more than the threshold. The changes are
    exact at every step, as ``G w_P`` is kept up to date. The search ends with a pass without a swap. Source: Yu, Serra,
    Ramalingam, Zhe, arXiv:2203.04466, CBS-S.

    Args:
        params: trained parameters.
        gradients: of ``loss_gradients``.
        sparsity: the fraction of weights to remove; exactly ``round(sparsity * weights)`` go. Or one for each pattern
            of paths, as in ``prune.one_shot``: weights are swapped with others of their pattern, and kernels that none
            matches stay dense and get no mask.
        start: of each pattern, "magnitude" for the smallest weights; "rmp" for the best of many draws of randomised
            magnitude pruning (all weights shuffled into about √W chunks, the smallest of each chunk removed); or masks.
        key: for "rmp".
        damping: λ of the Fisher. The smaller it is, the further the quadratic is trusted. With 0.01 this and
            ``combinatorial_update`` left two networks 784-40-20-10 48 and 56 % of held-out images of MNIST at 0.98
            (2,000 gradients), 21 and 29 with 1e-5; two of 784-300-100-10 (500 gradients) liked 1e-5 better: 93.0 and
            93.8 % at 0.9 against 91.1 and 91.1, 38 and 34 at 0.98 against 29 and 28.
        draws: how many draws "rmp" makes.
        window: ρ, how many j are looked at for each i.
        threshold: ε, by how much a swap must lower the objective.
        patience: τ, after how many i without a swap a pass ends.
        passes: the most passes to make; 0 returns the start.

    Returns:
        Masks. ``removal_cost`` gives their objective.

    Raises:
        ValueError: a sparsity outside [0, 1], an unknown start, "rmp" without a key, masks of another sparsity, or
            gradients shaped unlike the params.

    Example:
        >>> masks = surgeon.combinatorial_selection(params, gradients, 0.5, start="magnitude", damping=0.01)
        >>> prune.sparsity(masks)
        0.5
    """
    patterns.require_sparsities(sparsity)
    require_gradients(params, gradients, damping)
    for value, name in ((draws, "draws"), (window, "window")):
        _checks.require_positive(value, name)
    gradients, together, counts = _competing(params, gradients, sparsity)
    weights, rows = flatten_weights(params, gradients), flatten_gradients(gradients)
    _checks.require_finite(_most(weights, rows, damping), "the cost of removing all weights")
    if weights.size == 0:
        return unflatten_weights(params, gradients, jnp.ones(0, bool))
    removed = _start(params, gradients, start, together, counts)
    if removed is None:
        removed = jnp.zeros(weights.size, bool)
        for number, count in enumerate(counts):
            own = slice(None) if len(counts) == 1 else np.flatnonzero(together == number)
            found = _started(weights[own], rows[:, own], start, key, count=count, draws=draws, damping=damping)
            removed = removed.at[own].set(found)
    limits = sum(counts), damping, threshold, patience, passes
    sizes = {"window": min(int(window), weights.size), "patterns": len(counts)}
    removed = _search(weights, rows, removed, jnp.asarray(together), *limits, **sizes)
    return unflatten_weights(params, gradients, ~removed)


def _competing(params: Params, gradients: Kernels, sparsity: Sparsities) -> tuple[Kernels, np.ndarray, list[int]]:
    """The gradients of kernels that have a sparsity, which weights compete, as numbers, and how many of each go."""
    leaves = _trees.by_path(gradients)
    groups = patterns.groups(sparsity, leaves)
    number_of = {path: number for number, (_, paths) in enumerate(groups) for path in paths}
    sizes = {path: leaf[0].size for path, leaf in leaves.items() if path in number_of}
    together = np.repeat([number_of[path] for path in sizes], list(sizes.values()))
    counts = [round(sum(sizes[path] for path in paths) * float(own)) for own, paths in groups]
    return _trees.as_kernels(params, {path: leaves[path] for path in sizes}), together, counts


@jax.jit
def _most(weights, rows, damping):
    """More than any number of the search, signs and cancellation left aside; it overflows before they do."""
    curvature = jnp.mean(rows**2, 0) + damping
    largest = 2 * jnp.abs(weights)
    return quadratic(largest, jnp.abs(rows) @ largest, damping) + jnp.sum(curvature)


def _start(params, gradients, start: Any, together: np.ndarray, counts: list[int]) -> Bool[Array, " weights"] | None:
    """What masks to start from remove; None if ``start`` is a name."""
    if isinstance(start, str):
        if start not in STARTS:
            raise ValueError(f"start is {start!r}; it must be masks or one of {', '.join(map(repr, STARTS))}")
        return None
    given = of_masked(params, start, gradients)
    missing = _trees.by_path(gradients).keys() - _trees.by_path(given).keys()
    if missing:
        raise ValueError(f"the masks to start from have none for '{min(missing)}', which is pruned")
    removed = ~flatten_masks(start)
    of_each = [int(removed[together == number].sum()) for number in range(len(counts))]
    if of_each != counts:
        asked, there = (", ".join(map(str, some)) for some in (counts, of_each))
        raise ValueError(f"the masks to start from remove {there} weights, the sparsity asks for {asked}")
    return removed


def _started(weights, rows, start: str, key, *, count, draws, damping) -> Bool[Array, " weights"]:
    if start == "magnitude":
        return smallest(jnp.abs(weights), count)
    if key is None:
        raise ValueError("start='rmp' draws chunks at random: give it a key, such as jax.random.key(0)")
    _checks.require_key(key)
    return _randomised_magnitude(weights, rows, key, count, damping, draws=int(draws))


@functools.partial(jax.jit, static_argnames=("draws",))
def _randomised_magnitude(weights, rows, key, count, damping, *, draws):
    """The cheapest of many draws of randomised magnitude pruning."""
    chunks = max(1, math.isqrt(weights.size))
    length = -(-weights.size // chunks)

    def draw(key):
        order = jax.random.permutation(key, weights.size)
        padded = jnp.full(chunks * length, jnp.inf).at[: weights.size].set(jnp.abs(weights)[order])
        # The ranks of all chunks side by side: each chunk's smallest come first, however large they are elsewhere.
        ranks = jnp.argsort(jnp.argsort(padded.reshape(length, chunks), axis=0), axis=0).ravel()[: weights.size]
        return jnp.zeros(weights.size, bool).at[order].set(smallest(ranks, count))

    def cost(key):
        going = jnp.where(draw(key), weights, 0)
        return quadratic(going, rows @ going, damping)

    keys = jax.random.split(key, draws)
    return draw(keys[jnp.argmin(lax.map(cost, keys, batch_size=_DRAWS_AT_ONCE))])


class _Pass(NamedTuple):
    """Where one pass of the search stands."""

    removed: Bool[Array, " weights"]
    product: Float[Array, " samples"]  # G w_P
    position: Int[Array, ""]
    swaps: Int[Array, " patterns"]
    misses: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("window", "patterns"))
def _search(weights, rows, removed, together, count, damping, threshold, patience, passes, *, window, patterns):
    """Local search: passes until one makes no swap; of weights that compete, which ``together`` numbers alike."""
    columns = rows.T  # a weight's gradients side by side in memory
    samples = rows.shape[0]
    curvature = jnp.mean(rows**2, 0) + damping  # F_ii
    sizes = jnp.bincount(together, length=patterns)
    first = jnp.cumsum(sizes) - sizes  # where those of each pattern begin, sorted by it

    def one_pass(removed):
        product = rows @ jnp.where(removed, weights, 0)
        slope = columns @ product / samples + damping * jnp.where(removed, weights, 0)  # (F w_P)_i
        alpha = weights * slope - curvature * weights**2 / 2
        beta = weights * slope + curvature * weights**2 / 2
        leaving = jnp.argsort(jnp.where(removed, -alpha, jnp.inf), stable=True)
        entering = jnp.lexsort((jnp.where(removed, jnp.inf, beta), together))

        def more(state):
            return (state.position < count) & (state.misses <= patience) & (state.swaps.sum() < weights.size - count)

        def step(state):
            i = leaving[state.position]
            own = together[i]
            j = lax.dynamic_slice_in_dim(entering, first[own] + state.swaps[own], window)
            gradient, gradients = columns[i], columns[j]
            w_i, w_j = weights[i], weights[j]
            alpha = w_i * (gradient @ state.product / samples + damping * w_i) - curvature[i] * w_i**2 / 2
            beta = w_j * (gradients @ state.product / samples) + curvature[j] * w_j**2 / 2
            gamma = w_i * w_j * (gradients @ gradient / samples)
            change = jnp.where(state.removed[j] | (together[j] != own), jnp.inf, -alpha + beta - gamma)
            best = jnp.argmin(change)
            swapped = state._replace(
                removed=state.removed.at[i].set(False).at[j[best]].set(True),
                product=state.product - w_i * gradient + w_j[best] * gradients[best],
                swaps=state.swaps.at[own].add(1),
                misses=jnp.zeros_like(state.misses),
            )
            missed = state._replace(misses=state.misses + 1)
            state = jax.tree.map(functools.partial(jnp.where, change[best] < -threshold), swapped, missed)
            return state._replace(position=state.position + 1)

        zero = jnp.zeros((), int)
        return lax.while_loop(more, step, _Pass(removed, product, zero, jnp.zeros(patterns, int), zero))

    def not_finished(carry):
        _, swaps, done = carry
        return (swaps > 0) & (done < passes)

    def next_pass(carry):
        removed, _, done = carry
        state = one_pass(removed)
        return state.removed, state.swaps.sum(), done + 1

    removed, _, _ = lax.while_loop(not_finished, next_pass, (removed, jnp.ones((), int), jnp.zeros((), int)))
    return removed
