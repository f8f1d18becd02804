"""Batch statistics taken anew: what normalisation in evaluation mode divides by, after pruning has changed it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from ecjax import _checks, _precision, _trees
from ecjax._types import Inputs, Params
from ecjax.graph.convolutions import in_loops

COLLECTION = "batch_stats"


def batch_statistics(
    module: Any,
    params: Params,
    variables: Mapping[str, Any],
    inputs: Inputs,
    *,
    batch_size: int = 256,
    **training: Any,
) -> dict[str, Any]:
    """The variables of a Flax Linen module with the batch statistics that these params have on these inputs.

    Pruning moves the means and variances that batch normalisation was trained with; taking them anew is a repair of
    its own, without labels or gradients:

        pruned = prune.one_shot(params, scores, sparsity=0.9)
        variables = networks.batch_statistics(module, pruned.params, variables, inputs, train=True)
        network = networks.from_linen(module, variables=variables, train=False)

    In training mode a module moves its statistics by ``s ← m s + (1 − m) b``, with b those of the batch and m its
    momentum. From two such moves, the first from s = 0, follow m and b; the mean of b over all batches is taken.

    It is for params after one shot. A repair of survivors, as in ``prune.staged``, has made up for what the old
    statistics do; with new ones the network would be worse than before.

    Args:
        module: a ``flax.linen.Module`` with a collection "batch_stats".
        variables: its collections besides "params", as ``from_linen`` takes them.
        inputs: calibration inputs; the last ones that do not fill a batch are left out.
        batch_size: samples that are normalised together.
        **training: arguments that put the module's call into training mode, such as ``train=True``.

    Raises:
        ValueError: bad inputs, variables without batch statistics, or a call that does not move them so.

    Example:
        >>> norm = nn.BatchNorm(use_running_average=None)
        >>> variables = norm.init(jax.random.key(0), inputs, use_running_average=True)
        >>> anew = networks.batch_statistics(norm, variables["params"], variables, inputs, use_running_average=False)
        >>> bool(jnp.allclose(anew["batch_stats"]["mean"], inputs.mean(0), atol=1e-5))
        True
    """
    _checks.require_inputs(inputs)
    _checks.require_positive(batch_size, "batch_size")
    if isinstance(module, nnx.Module):
        raise ValueError(
            "batch_statistics takes a flax.linen.Module, and this is one of flax.nnx, whose own calls in training mode "
            "move its statistics; ecjax/RECIPES.md shows how they are taken anew"
        )
    if not jax.tree.leaves(variables.get(COLLECTION)):
        held = ", ".join(map(repr, variables)) or "none"
        raise ValueError(f"the variables hold no collection 'batch_stats' with anything in it, but: {held}")
    fixed = {name: values for name, values in variables.items() if name not in ("params", COLLECTION)}
    size = min(int(batch_size), inputs.shape[0])

    given = {"params": params, **fixed}, variables[COLLECTION], inputs
    found, moved, there = _of_batches(_InTraining(module, tuple(sorted(training.items()))), size, *given)
    if _checks.are_known(moved) and not moved:
        raise ValueError(
            f"a call with {training or 'no further arguments'} does not move the batch statistics of "
            f"{type(module).__name__}; give those that put it into training mode, such as train=True"
        )
    _checks.require_finite(found, "batch statistics")
    if _checks.are_known(there) and not there:
        raise ValueError(
            f"the statistics of {type(module).__name__} do not move by s ← m s + (1 − m) b, so where they would end is "
            "not known; train the module on instead"
        )
    return {**fixed, COLLECTION: found}


def statistics_in(params: Params) -> set[str]:
    """The paths of batch statistics among params: a Linen collection of its name, or variables of an NNX module."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    of_nnx = tuple(_trees.path_name(steps) + "/" for steps, leaf in leaves if isinstance(leaf, nnx.BatchStat))
    return {path for path in _trees.by_path(params) if COLLECTION in path.split("/") or f"{path}/".startswith(of_nnx)}


@dataclasses.dataclass(frozen=True)
class _InTraining:
    """What a call in training mode makes of batch statistics; equal ones are compiled once."""

    module: Any
    training: tuple[tuple[str, Any], ...]

    def __call__(self, given, inputs):
        held, statistics = given
        variables = {**held, COLLECTION: statistics}
        return self.module.apply(variables, inputs, mutable=[COLLECTION], **dict(self.training))[1][COLLECTION]


@_precision.compiled("moved_by", "size")
def _of_batches(moved_by, size, held, statistics, inputs):
    """The mean over batches of their statistics, whether the module moves any, and whether towards these."""
    moved_by = in_loops(moved_by)

    def of_batch(batch):
        first = moved_by((held, jax.tree.map(jnp.zeros_like, statistics)), batch)  # (1 − m) b
        found = jax.tree.map(_end, first, moved_by((held, first), batch))
        again = moved_by((held, found), batch)
        there = [_close(*pair) for pair in zip(jax.tree.leaves(again), jax.tree.leaves(found), strict=True)]
        return found, jnp.stack([leaf.any() for leaf in jax.tree.leaves(first)]).any(), jnp.stack(there).all()

    batches = inputs[: inputs.shape[0] // size * size].reshape(-1, size, *inputs.shape[1:])
    found, moved, there = lax.map(of_batch, batches)
    return jax.tree.map(lambda leaf: leaf.mean(0), found), moved.all(), there.all()


def _end(first: Array, second: Array) -> Array:
    """Where statistics end that went from 0 to ``first`` and from there to ``second = (1 + m) first``."""
    left = 2 - jnp.vdot(second, first) / jnp.maximum(jnp.vdot(first, first), jnp.finfo(first.dtype).tiny)  # 1 − m
    return first / jnp.where(left > 0, left, 1)


def _close(first: Array, second: Array) -> Array:
    return jnp.abs(first - second).max() <= 1e-3 * jnp.abs(second).max()
