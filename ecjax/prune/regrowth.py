"""Growing back: the weights that would lower the objective most return, so that as many others may go.

As Evci et al., arXiv:1911.11134, grow by the slope; here by what a step at the curvature would gain, ``g² / 2(h + λ)``.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ecjax import _checks, _trees
from ecjax._types import Kernels, Params, Sparsities
from ecjax.graph import Layers
from ecjax.prune import patterns
from ecjax.prune.masks import least_important
from ecjax.score import Scores, surgeon


class Regrowth(NamedTuple):
    """How much grows back after the last stage of a run, and how often.

    Attributes:
        fraction: of the weights left that grow back, and of those then left that go again; above 0, at most 1.
        cycles: how often at most; no more once the objective has not fallen.
        criterion: by which as many go again, by name or as a function; that of the run if None. Where few weights are
            left ``"optimal_brain_surgeon"`` finds better ones than elimination-compensation, for more time.

    Example:
        >>> how = {"stages": 2, "metric": "fisher", "regrow": prune.Regrowth(fraction=0.5, cycles=2)}
        >>> prune.sparsity(prune.staged(network, params, inputs, 0.75, **how).masks)
        0.75
    """

    fraction: float | int = 0.5
    cycles: int = 6
    criterion: Any = None


def named(regrow: Any) -> Regrowth | None:
    """What a fraction alone stands for, or the value itself.

    Raises:
        ValueError: a fraction that is not above 0 and at most 1, fewer than one cycle, or what is neither.
    """
    if regrow is None:
        return None
    found = regrow if isinstance(regrow, Regrowth) else Regrowth(regrow)
    if not _checks.is_number(found.fraction):
        raise ValueError(
            f"regrow is {found.fraction!r}; it must be a fraction such as 0.5, or prune.Regrowth(fraction, cycles)"
        )
    if not 0 < found.fraction <= 1:
        raise ValueError(f"regrow is {found.fraction}; it must be above 0 and at most 1, of the weights left")
    _checks.require_positive(found.cycles, "cycles")
    return found


def require_few(
    params: Params, layers: Layers, sparsity: Sparsities, fraction: float | int, masks: Mapping[str, Any]
) -> None:
    """Raises a ValueError if more weights will be left than the optimal brain surgeon can weigh: not after the run."""
    groups = patterns.groups(patterns.with_more(sparsity, fraction), masks)
    sizes = [(float(number), sum(masks[path].size for path in paths)) for number, paths in groups]
    leaves = _trees.by_path(params)
    biases = sum(leaves[path].size for path in {layer.bias for layer in layers if layer.bias is not None})
    surgeon.require_few(sum(round((1 - number) * size) for number, size in sizes) + biases)


def grown(
    params: Params,
    masks: Kernels,
    gains: Mapping[str, Float[Array, "..."]],
    sparsity: Sparsities,
    *,
    fraction: float | int,
    scope: str,
    layers: Layers,
    before: Kernels | None = None,
) -> Kernels:
    """Masks with more weights: of each scope those of most gain, a fraction of the weights left there.

    Args:
        masks: True where the weight stays.
        gains: by the path of a kernel, what the return of each removed weight gains; none of others.
        sparsity: that the masks have.
        fraction: of the weights left.
        scope: where weights compete.
        layers: of the network, for the scope "neuron".
        before: what was removed before the run, and does not return.
    """
    importance = {
        path: jnp.where(mask, jnp.inf, gains.get(path, jnp.zeros(mask.shape)))
        for path, mask in _trees.by_path(masks).items()
    }
    first = {} if before is None else _trees.by_path(before)
    importance |= {path: jnp.where(first[path], importance[path], -1) for path in first}  # below every gain
    scores = Scores(_trees.as_kernels(params, importance), layers=layers)
    found = least_important(params, scores, patterns.with_more(sparsity, fraction), scope=scope, exclude=()).masks
    return _trees.as_kernels(
        params, {path: mask & first.get(path, True) for path, mask in _trees.by_path(found).items()}
    )
