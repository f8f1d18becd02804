"""SparseGPT: each kernel is pruned and moved so that its products change least, one after the other.

The products of a kernel W (in, out) with the rows X that it sees change by ``X (Ŵ − W)``. Every neuron, a column of W,
has the same Hessian ``H = 2 XᵀX``. Weights are removed input by input: with U the upper Cholesky factor of
``H⁻¹ = UᵀU``, row i of U says how the inputs after i make up for the removal of input i, when all inputs before it are
settled (optimal brain surgeon's step among these):

    W_ko −= U_ik · W_io / U_ii   for k ≥ i, and each neuron o that loses input i

Inputs are taken in blocks. Within a block the steps are made one by one; what all of them do to the inputs after the
block is one product of matrices. Source: Frantar, Alistarh, "SparseGPT: massive language models can be accurately
pruned in one-shot", arXiv:2301.00774, algorithm 1, and its authors' code.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from ecjax import _checks, _door, _precision, _progress, _trees, graph
from ecjax._types import Inputs, Network, Params, Patterns, Sparsities, Sparsity
from ecjax.prune import patterns
from ecjax.prune.masks import Pruned, require_scope
from ecjax.prune.selection import smallest
from ecjax.surgeon.dense import hessian, require_dense


class Kernel(NamedTuple):
    """What a progress callback is told after each kernel.

    Attributes:
        number: of the kernel, from 1.
        kernels: how many there are.
        path: of it.

    Example:
        >>> tell = lambda kernel: print(f"{kernel.number} of {kernel.kernels}: {kernel.path}")
        >>> pruned = surgeon.sparse_gpt(network, params, inputs, sparsity=0.5, progress=tell)
        1 of 2: Dense_0/kernel
        2 of 2: Dense_1/kernel
    """

    number: int
    kernels: int
    path: str


def sparse_gpt(
    network: Network,
    params: Params,
    inputs: Inputs,
    sparsity: Sparsities | None = None,
    *,
    scope: str | tuple[int, int] = "layer",
    damping: float | int = 0.01,
    block: int = 128,
    batch_size: int = 1024,
    exclude: Patterns = (),
    progress: bool | Callable[[Kernel], None] | None = None,
) -> Pruned:
    """Prunes every dense kernel and moves its survivors, so that its products change least.

    Kernels are taken in order of execution, each on the inputs that the pruned network before it produces. In each
    block of inputs, the weights go whose removal costs least, ``W_io² / U_ii²``; the survivors of the inputs after each
    are moved. Biases stay. An input that is 0 everywhere says nothing about its weights: they are set to 0. Source:
    Frantar, Alistarh, arXiv:2301.00774.

    Args:
        sparsity: the fraction of weights to remove from each kernel, in [0, 1]: exactly ``round(sparsity * weights)``
            go, of a stack from each member. May be traced. Or one for each pattern of paths, as in
            ``prune.one_shot``: kernels that none matches stay as they are and get no mask. Left out for N:M.
        scope: where weights compete: "layer", the block of the kernel; or a pair (N, M): of every M consecutive inputs
            of a neuron N stay.
        damping: λ, added to the diagonal of H, as a multiple of its mean.
        block: how many inputs make a block; for (N, M) a multiple of M at least as large. Smaller blocks decide later,
            with more of the moves seen, but the fraction removed is the same in each.
        progress: True for a bar, as for ``prune.staged``; or a function called after each kernel.

    Raises:
        ValueError: bad inputs, a sparsity outside [0, 1], an unknown scope, a kernel that is no dense one (convolved,
            scanned, used several times or also looked up in), by name; or a damping too small for float32.

    Example:
        >>> pruned = surgeon.sparse_gpt(network, params, inputs, sparsity=0.5)
        >>> [int(mask.sum()) for mask in jax.tree.leaves(pruned.masks)]
        [16, 8]
        >>> pruned = surgeon.sparse_gpt(network, params, inputs, scope=(2, 4))
        >>> bool((pruned.masks["Dense_0"]["kernel"].sum(0) == 2).all())
        True
    """
    _require_scope(scope, sparsity)
    _checks.require_above_zero(damping, "damping")
    _progress.require(progress)
    at = _door.enter(network, params, inputs, exclude=exclude, batch_size=batch_size, block=block)
    require_dense(at.network, at.layers, at.params, at.inputs)
    pruned, masks = at.params, {}
    fraction = 1 if sparsity is None else sparsity  # every group gets the pattern N:M
    of_each = patterns.groups(fraction, [layer.kernel for layer in at.layers])
    sparsities = {path: number for number, paths in of_each for path in paths}
    layers = [layer for layer in at.layers if layer.kernel in sparsities]
    with _progress.told(progress, "kernel", len(layers), ("path",)) as tell:
        for number, layer in enumerate(layers, start=1):
            kernel = _trees.by_path(pruned)[layer.kernel]
            masks[layer.kernel] = jnp.ones_like(kernel, bool)
            if layer.weights:
                of_inputs = hessian(at.network, layer, int(batch_size), pruned, at.inputs)
                matrices = graph.as_matrices(kernel, layer.layout).astype(of_inputs.dtype)
                steps = _steps(scope, int(block), layer.layout.sizes[1])
                removed = _removed(sparsities[layer.kernel], steps, layer.layout.sizes[1:])
                moved, kept = _of_stack(matrices, of_inputs, damping, removed, steps)
                _require_solved(layer.kernel, moved, damping)
                masks[layer.kernel] = graph.as_leaf(kept, layer.layout)
                moved = graph.as_leaf(moved, layer.layout).astype(kernel.dtype)
                pruned = _trees.replace(pruned, {layer.kernel: moved})
            tell(Kernel(number, len(layers), layer.kernel))
    return Pruned(_trees.whole(pruned, at.static), _trees.as_kernels(params, masks))


def _require_scope(scope: str | tuple[int, int], sparsity: Sparsities | None) -> None:
    if not isinstance(scope, tuple) and scope != "layer":
        raise ValueError(f"scope is {scope!r}; SparseGPT chooses within each kernel: 'layer', or a pair (N, M)")
    require_scope(scope, sparsity)


class _Steps(NamedTuple):
    """How the inputs of a kernel are gone through: static."""

    block: int  # inputs, after which the moves reach the inputs that follow
    group: int  # inputs whose masks are chosen together
    blocks: int
    stay: int | None  # of a group, for each neuron; None where all weights of a group compete


def _steps(scope: str | tuple[int, int], block: int, inputs: int) -> _Steps:
    block = min(block, inputs)
    if not isinstance(scope, tuple):
        return _Steps(block, block, -(-inputs // block), None)
    stay, group = scope
    block = -(-block // group) * group
    return _Steps(block, group, -(-inputs // block), stay)


def _removed(sparsity: Sparsity, steps: _Steps, shape: tuple[int, int]) -> Int[Array, " blocks"]:
    """How many weights go in each block, so that at the end of each the fraction is right to one weight."""
    if steps.stay is not None:  # so many of each group stay, whatever the sparsity
        return jnp.zeros(steps.blocks, int)
    inputs, neurons = shape
    ends = [min(number * steps.block, inputs) * neurons for number in range(steps.blocks + 1)]
    if _checks.are_known(sparsity):
        upto = [round(float(sparsity) * end) for end in ends]
        return jnp.asarray([after - before for before, after in itertools.pairwise(upto)])
    return jnp.diff(jnp.round(sparsity * jnp.asarray(ends)).astype(int))


@_precision.compiled("steps")
def _of_stack(
    kernels: Float[Array, "stack in out"],
    hessians: Float[Array, "stack in in"],
    damping: float | Array,
    removed: Int[Array, " blocks"],
    steps: _Steps,
) -> tuple[Float[Array, "stack in out"], Bool[Array, "stack in out"]]:
    """Each member of a stack pruned and moved, and the masks."""
    return jax.vmap(lambda kernel, hessian: _of_kernel(kernel, hessian, damping, removed, steps))(kernels, hessians)


def _of_kernel(kernel: Float[Array, "in out"], hessian: Float[Array, "in in"], damping, removed, steps: _Steps):
    inputs, filled = kernel.shape[0], steps.blocks * steps.block
    dead = jnp.diagonal(hessian) == 0
    real = jnp.arange(filled) < inputs  # what fills up the last block has no weights, and moves nothing
    kernel = jnp.pad(jnp.where(dead[:, None], 0, kernel), ((0, filled - inputs), (0, 0)))
    factor = jnp.pad(_upper_factor(hessian, dead, damping), (0, filled - inputs))
    factor += jnp.diag(jnp.where(real, 0, 1).astype(factor.dtype))

    def of_block(kernel, block):
        start, count = block
        rows, part, counted = (lax.dynamic_slice_in_dim(a, start, steps.block) for a in (factor, kernel, real))
        own = lax.dynamic_slice_in_dim(rows, start, steps.block, 1)
        part, kept, errors = _within_block(part, own, counted, count, steps)
        later = jnp.where(jnp.arange(filled) >= start + steps.block, rows, 0)
        return lax.dynamic_update_slice_in_dim(kernel - later.T @ errors, part, start, 0), kept

    kernel, kept = lax.scan(of_block, kernel, (jnp.arange(steps.blocks) * steps.block, removed))
    return kernel[:inputs], kept.reshape(kernel.shape)[:inputs]


def _within_block(part: Float[Array, "block out"], factor: Float[Array, "block block"], counted, count, steps: _Steps):
    """The weights of a block pruned and moved, their mask, and the errors that move the inputs after it."""
    diagonal = jnp.diagonal(factor)

    def of_group(part, first):
        weights, pivots, real = (lax.dynamic_slice_in_dim(a, first, steps.group) for a in (part, diagonal, counted))
        cost = (weights / pivots[:, None]) ** 2
        kept = _all_but(cost, real, count) if steps.stay is None else _largest(cost, real, steps.stay)
        part, errors = lax.scan(of_input, part, (first + jnp.arange(steps.group), kept))
        return part, (kept, errors)

    def of_input(part, one):
        index, stays = one
        error = jnp.where(stays, 0, part[index] / factor[index, index])
        return part - factor[index][:, None] * error, error

    part, (kept, errors) = lax.scan(of_group, part, jnp.arange(0, steps.block, steps.group))
    kept, errors = kept.reshape(part.shape), errors.reshape(part.shape)
    return jnp.where(kept, part, 0), kept, errors


def _upper_factor(hessian: Float[Array, "in in"], dead: Bool[Array, " in"], damping) -> Float[Array, "in in"]:
    """The upper U with ``UᵀU = (H + λ)⁻¹``: the inverse of the upper R with ``R Rᵀ = H + λ``."""
    diagonal = jnp.where(dead, 1, jnp.diagonal(hessian))
    damped = hessian + jnp.diag(diagonal - jnp.diagonal(hessian) + damping * diagonal.mean())
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, jnp.eye(dead.size, dtype=upper.dtype))


def _all_but(cost: Float[Array, "in out"], real: Bool[Array, " in"], count: Int[Array, ""]) -> Bool[Array, "in out"]:
    """False for so many of the smallest, the earlier ones first among equals."""
    return ~smallest(jnp.where(real[:, None], cost, jnp.inf).ravel(), count).reshape(cost.shape)


def _largest(cost: Float[Array, "in out"], real: Bool[Array, " in"], stay: int) -> Bool[Array, "in out"]:
    """True for so many of the largest of each neuron; what fills up the last group goes first."""
    ranks = jnp.where(real[:, None], cost, -jnp.inf).argsort(0, stable=True).argsort(0)
    return ranks >= cost.shape[0] - stay


def _require_solved(path: str, kernel: Array, damping) -> None:
    """Raises a ValueError unless all is finite; next to a large H a small λ is lost to rounding."""
    try:
        _checks.require_finite({path: kernel}, "pruned kernel")
    except ValueError as error:
        raise ValueError(f"{error}; or raise the damping, {damping} may be too small for these inputs") from None
