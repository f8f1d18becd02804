"""Optimal brain surgeon, WoodFisher and the combinatorial brain surgeon: weights that interact, survivors that move.

The loss around trained weights w is taken as the quadratic ``½ (v − w)ᵀ F (v − w)`` with the empirical Fisher

    F = (1/n) GᵀG + λI

of n per-sample gradients, the rows of G. F is of size weights × weights and never formed: by Woodbury's identity all
that is needed are products with G and one matrix of size samples × samples. That matrix is ill-conditioned by nature (λ
is small), so it is formed and factorised in double precision whatever the caller's setting.

Only kernels are pruned and moved; biases may be there or not. Sources: Hassibi, Stork 1992 (optimal brain surgeon);
Singh, Alistarh, arXiv:2004.14340 (WoodFisher); Yu, Serra, Ramalingam, Zhe, arXiv:2203.04466 (combinatorial surgeon).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Shaped

from ecjax import _batches, _checks, _door, _precision, _trees
from ecjax._types import Inputs, Kernels, Loss, Network, Params, Patterns, Targets
from ecjax.graph.layers import kernels
from ecjax.score import Scores


def loss_gradients(
    network: Network,
    params: Params,
    inputs: Inputs,
    targets: Targets,
    loss: Loss,
    *,
    exclude: Patterns = (),
) -> Kernels:
    """Per-sample gradients of the loss with respect to the kernels, the rows of G; losses of positions are summed.

    Args:
        inputs: samples along the first axis; with W weights the result holds samples × W numbers.
        targets: one for each sample.
        loss: ``(outputs, targets) -> losses``, as optax's.
        exclude: patterns of paths of kernels that are left alone: what the surgeons are not given, they don't touch.

    Returns:
        Kernels with a leading sample axis.

    Raises:
        ValueError: bad inputs, not one target for each sample, a network without kernels or that mixes samples.

    Example:
        >>> gradients = surgeon.loss_gradients(network, params, inputs, labels, loss)
        >>> gradients["Dense_0"]["kernel"].shape
        (200, 4, 8)
    """
    at = _door.enter(network, params, inputs, exclude=exclude, targets=targets, need="weights")
    weights = kernels(at.layers, at.params)
    found = _loss_gradients(at.network, loss, at.params, weights, at.inputs, _batches.placed(targets))
    return _trees.as_kernels(at.params, found)


@_precision.compiled("network", "loss")
def _loss_gradients(network, loss, params, kernels, inputs, targets):
    def of_sample(x, target):
        def summed_loss(kernels):
            return loss(network(_trees.replace(params, kernels), x[None]), target[None]).sum()

        return jax.grad(summed_loss)(kernels)

    return jax.vmap(of_sample)(inputs, targets)


def brain_surgeon_saliency(
    network: Network,
    params: Params,
    inputs: Inputs,
    *,
    targets: Targets,
    loss: Loss,
    damping: float | int = 0.01,
    exclude: Patterns = (),
) -> Scores:
    """Optimal brain surgeon's saliency as a criterion: ``brain_surgeon_saliency_from_gradients`` of ``loss_gradients``.

    Args:
        inputs: a few hundred training samples; GGᵀ is of shape (samples, samples).
        targets: one for each sample.
        loss: ``(outputs, targets) -> losses``.
        damping: λ, above 0.

    Raises:
        ValueError: as the two.

    Example:
        >>> saliency = functools.partial(surgeon.brain_surgeon_saliency, targets=labels, loss=loss, damping=0.01)
        >>> pruned = prune.staged(network, params, inputs, 0.5, stages=2, criterion=saliency, repair="biases")
        >>> prune.sparsity(pruned.masks)
        0.5
    """
    gradients = loss_gradients(network, params, inputs, targets, loss, exclude=exclude)
    return brain_surgeon_saliency_from_gradients(params, gradients, damping=damping)


def brain_surgeon_saliency_from_gradients(params: Params, gradients: Kernels, *, damping: float | int = 0.01) -> Scores:
    """Optimal brain surgeon's saliency: what removing one weight costs when all the others make up for it.

    ``I_q = w_q² / (2 [F⁻¹]_qq)``, with the full Fisher by Woodbury:
    ``[F⁻¹]_qq = (1 − g_qᵀ (GGᵀ + nλI)⁻¹ g_q) / λ`` and g_q the column of G that belongs to the weight. Sources:
    Hassibi, Stork 1992; Singh, Alistarh, arXiv:2004.14340.

    Args:
        params: trained parameters.
        gradients: of ``loss_gradients``.
        damping: λ, above 0.

    Returns:
        Scores without bias shifts, in units of the loss.

    Raises:
        ValueError: gradients shaped unlike the params or not finite, or damping not above 0 or too small for them.

    Example:
        >>> scores = surgeon.brain_surgeon_saliency_from_gradients(params, gradients, damping=0.01)
        >>> scores.importance["Dense_0"]["kernel"].shape, scores.bias_shift
        ((4, 8), None)
    """
    require_gradients(params, gradients, damping)
    with jax.enable_x64(True):
        weights, rows = flatten_weights(params, gradients), flatten_gradients(gradients)
        saliency = _saliency(weights, rows, damping)
    saliencies = unflatten_weights(params, gradients, saliency)
    _require_solved(saliencies, "saliencies", damping)
    return Scores(saliencies)


def combinatorial_update(params: Params, masks: Kernels, gradients: Kernels, *, damping: float | int = 0.01) -> Params:
    """Moves the survivors to where the quadratic is least with the removed weights at exactly zero (CBS-U).

    With S the survivors, P the removed weights and ``u = G_P w_P``, ``½ δᵀFδ`` under ``δ_P = −w_P`` is least at

        δ_S = G_Sᵀ (G_S G_Sᵀ + nλI)⁻¹ u

    which for a single removed weight is optimal brain surgeon's step. Source: Yu et al., arXiv:2203.04466, CBS-U.

    Args:
        params: trained parameters, not yet pruned.
        masks: Kernels of booleans, True where the weight stays. A kernel without a mask stays as it is.
        gradients: of ``loss_gradients``.
        damping: λ, above 0; see ``combinatorial_selection``.

    Raises:
        ValueError: masks or gradients shaped unlike the params, gradients that are not finite, or damping that is not
            above 0 or too small for them.

    Example:
        >>> moved = surgeon.combinatorial_update(params, pruned.masks, gradients, damping=0.01)
        >>> bool(((moved["Dense_0"]["kernel"] != 0) == pruned.masks["Dense_0"]["kernel"]).all())
        True
    """
    return _moved(params, masks, gradients, damping, _update)


def brain_surgeon_update(params: Params, masks: Kernels, gradients: Kernels, *, damping: float | int = 0.01) -> Params:
    """Adds up optimal brain surgeon's steps for each removed weight as if it were the only one (WoodFisher's update).

    ``w − Σ_{q∈P} w_q F⁻¹e_q / [F⁻¹]_qq``, with the removed weights then set to exactly zero; ``combinatorial_update``
    takes the removals together. Source: Singh, Alistarh, arXiv:2004.14340.

    Args:
        params: trained parameters, not yet pruned.
        masks: Kernels of booleans, True where the weight stays.
        gradients: of ``loss_gradients``.
        damping: λ, above 0.

    Raises:
        ValueError: as ``combinatorial_update``.

    Example:
        >>> moved = surgeon.brain_surgeon_update(params, pruned.masks, gradients, damping=0.01)
        >>> bool(((moved["Dense_0"]["kernel"] != 0) == pruned.masks["Dense_0"]["kernel"]).all())
        True
    """
    return _moved(params, masks, gradients, damping, _independent_updates)


def _moved(params, masks, gradients, damping, update) -> Params:
    """Checks, and runs an update of flat weights in double precision."""
    require_gradients(params, gradients, damping)
    gradients = of_masked(params, masks, gradients)
    with jax.enable_x64(True):
        weights, rows = flatten_weights(params, gradients), flatten_gradients(gradients)
        moved = update(weights, flatten_masks(masks), rows, damping)
    kernels = unflatten_weights(params, gradients, moved)
    _require_solved(kernels, "updated kernels", damping)
    return _trees.replace(params, _trees.by_path(kernels))


def of_masked(params: Params, masks: Kernels, gradients: Kernels) -> Kernels:
    """The gradients of the kernels that have masks; a ValueError if one of these has none."""
    _checks.require_masks(params, masks)
    given, every = _trees.by_path(masks), _trees.by_path(gradients)
    missing = [path for path in given if path not in every]
    if missing or not given:
        which = f"'{missing[0]}' has no gradients" if missing else "no kernel has a mask"
        raise ValueError(f"masks and gradients are of different kernels: {which}; give both the same exclude=")
    return _trees.as_kernels(params, {path: leaf for path, leaf in every.items() if path in given})


def _require_solved(kernels: Kernels, name: str, damping: float | int) -> None:
    """Raises a ValueError unless all are finite; next to large gradients a small λ is lost to rounding."""
    try:
        _checks.require_finite(kernels, name)
    except ValueError as error:
        raise ValueError(f"{error}; or raise the damping, {damping} may be too small for these gradients") from None


def removal_cost(
    params: Params, masks: Kernels, gradients: Kernels, *, damping: float | int = 0.01
) -> Float[Array, ""]:
    """``½ w_Pᵀ F w_P``: the quadratic's price of removing all weights of P at once, while nothing else moves.

    Args:
        params: trained parameters, not yet pruned.
        masks: Kernels of booleans, False on P.
        gradients: of ``loss_gradients``.
        damping: λ, above 0.

    Raises:
        ValueError: as ``combinatorial_update``.

    Example:
        >>> all_stay = jax.tree.map(jnp.ones_like, pruned.masks)
        >>> float(surgeon.removal_cost(params, all_stay, gradients))
        0.0
    """
    require_gradients(params, gradients, damping)
    gradients = of_masked(params, masks, gradients)
    removed = jnp.where(flatten_masks(masks), 0, flatten_weights(params, gradients))
    rows = flatten_gradients(gradients)
    cost = quadratic(removed, rows @ removed, damping)
    _checks.require_finite(cost, "the cost of the removal")
    return cost


def quadratic(removed: Float[Array, " weights"], product: Float[Array, " samples"], damping) -> Float[Array, ""]:
    """``½ vᵀFv`` from v and ``Gv``."""
    return (jnp.mean(product**2) + damping * jnp.sum(removed**2)) / 2


@jax.jit
def _saliency(weights, rows, damping):
    return weights**2 / (2 * _inverse_diagonal(rows, _factorise(rows, damping), damping))


def _factorise(rows: Float[Array, "samples weights"], damping):
    """Lower Cholesky factor of ``GGᵀ + nλI``."""
    samples = rows.shape[0]
    return jnp.linalg.cholesky(rows @ rows.T + samples * damping * jnp.eye(samples, dtype=rows.dtype))


def _inverse_diagonal(rows, factor, damping) -> Float[Array, " weights"]:
    """``[F⁻¹]_qq`` of every weight, which is never below ``1 / F_qq``, whatever the difference below has lost."""
    whitened = jax.scipy.linalg.solve_triangular(factor, rows, lower=True)
    return jnp.maximum((1 - jnp.sum(whitened**2, 0)) / damping, 1 / (jnp.mean(rows**2, 0) + damping))


@jax.jit
def _update(weights, kept, rows, damping):
    surviving = jnp.where(kept, rows, 0)
    product = rows @ jnp.where(kept, 0, weights)
    solved = jax.scipy.linalg.cho_solve((_factorise(surviving, damping), True), product)
    return jnp.where(kept, weights + solved @ surviving, 0)


@jax.jit
def _independent_updates(weights, kept, rows, damping):
    factor = _factorise(rows, damping)
    steps = jnp.where(kept, 0, weights / _inverse_diagonal(rows, factor, damping))
    solved = jax.scipy.linalg.cho_solve((factor, True), rows @ steps)
    return jnp.where(kept, weights - (steps - solved @ rows) / damping, 0)


def require_gradients(params: Params, gradients: Kernels, damping: float | int) -> None:
    """Raises a ValueError unless the gradients are finite, one for each sample and weight, and the damping above 0."""
    shapes = {path: np.shape(leaf) for path, leaf in _trees.by_path(params).items() if _trees.is_array(leaf)}
    leaves = _trees.by_path(gradients)
    counts = {leaf.shape[0] for leaf in leaves.values() if leaf.ndim}
    fitting = all(leaf.ndim and leaf.shape[1:] == shapes.get(path) for path, leaf in leaves.items())
    if not leaves or not fitting or len(counts) != 1 or counts == {0}:
        given = {path: leaf.shape for path, leaf in leaves.items()}
        raise ValueError(f"gradients must be Kernels with a leading sample axis for {shapes}, got {given}")
    _checks.require_finite(gradients, "gradients")
    if not damping > 0:
        raise ValueError(f"damping is {damping}; it must be above 0, or the Fisher can't be inverted")


def flatten_weights(params: Params, gradients: Kernels) -> Float[Array, " weights"]:
    """All kernels that have gradients as one vector, in the order of the flattened tree."""
    leaves = _trees.by_path(params)
    return jnp.concatenate([_at_least_float32(leaves[path]).ravel() for path in _trees.by_path(gradients)])


def flatten_gradients(gradients: Kernels) -> Float[Array, "samples weights"]:
    """G: the gradients of each sample as one row."""
    return jnp.concatenate([_at_least_float32(g).reshape(g.shape[0], -1) for g in jax.tree.leaves(gradients)], axis=1)


def flatten_masks(masks: Kernels) -> Shaped[Array, " weights"]:
    """Masks as one vector, in the order of ``flatten_weights``."""
    return jnp.concatenate([mask.ravel() for mask in _trees.by_path(masks).values()])


def unflatten_weights(params: Params, gradients: Kernels, flat: Shaped[Array, " weights"]) -> Kernels:
    """Kernels of ``params`` from one vector; numbers take the dtype of the kernels, booleans stay."""
    leaves = _trees.by_path(params)
    kernels = {path: leaves[path] for path in _trees.by_path(gradients)}
    ends = np.cumsum([kernel.size for kernel in kernels.values()])[:-1]
    found = {
        path: part.reshape(kernel.shape).astype(part.dtype if part.dtype == bool else kernel.dtype)
        for (path, kernel), part in zip(kernels.items(), jnp.split(flat, ends), strict=True)
    }
    return _trees.as_kernels(params, found)


def _at_least_float32(array: Array) -> Array:
    """In double precision where the caller of this has switched to it."""
    return jnp.asarray(array, jnp.promote_types(array.dtype, jnp.zeros(()).dtype))
