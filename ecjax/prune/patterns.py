"""Which kernels are pruned to which sparsity: one number for all, or a number for each pattern of their paths."""

import collections
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from ecjax import _checks
from ecjax._types import Sparsities, Sparsity
from ecjax.graph.layers import inside

# What errors say: the argument, what it is a fraction of, and what a pattern is to match.
WEIGHTS, UNITS = ("sparsity", "weights", "kernel"), ("fraction", "units, or of their cost,", "group")


def require_sparsities(sparsity: Any, words: tuple[str, str, str] = WEIGHTS) -> None:
    """Raises a ValueError unless this is a number in [0, 1], or one for each of several patterns of paths."""
    name, counted, _ = words
    if not isinstance(sparsity, Mapping):
        _checks.require_sparsity(sparsity, name, counted)
        return
    if not sparsity:
        raise ValueError(f"{name} is {{}}; give it a number for each pattern of paths: {{'*': 0.8}}")
    for pattern, number in sparsity.items():
        if not isinstance(pattern, str):
            raise ValueError(f"{name} of {pattern!r}; it must be of a pattern of paths, such as 'Dense_0/*'")
        _checks.require_sparsity(number, name, counted)


def towards(sparsity: Sparsities | None, part: float, start: Any = 0.0) -> Sparsities:
    """A part of the way to the sparsity, or to that of each pattern, from where it starts; the part itself for N:M."""
    if sparsity is None:
        return part
    if isinstance(sparsity, Mapping):
        starts = start if isinstance(start, Mapping) else dict.fromkeys(sparsity, start)
        return _of_each(sparsity, lambda pattern, number: towards(number, part, starts[pattern]))
    return sparsity if part == 1 else start + (sparsity - start) * part


def with_more(sparsity: Sparsities, fraction: float | int) -> Sparsities:
    """The sparsity, or that of each pattern, where this fraction of the weights left has come back besides."""
    if isinstance(sparsity, Mapping):
        return _of_each(sparsity, lambda _, number: with_more(number, fraction))
    return max(float(sparsity - fraction * (1 - sparsity)), 0.0)


def _of_each(sparsity: Mapping[str, Any], number_of: Callable[[str, Any], Any]) -> Mapping[str, Any]:
    """A mapping of the same kind: not by jax.tree.map, which would change the order of the patterns."""
    kind = collections.OrderedDict if isinstance(sparsity, collections.OrderedDict) else dict
    return kind((pattern, number_of(pattern, number)) for pattern, number in sparsity.items())


def begun(sparsity: Sparsities, masks: Mapping[str, Any]) -> Sparsities:
    """The sparsity that masks have, or that of the kernels of each pattern, by the paths of these."""
    shares = [
        sum(jnp.sum(~masks[path]) for path in paths) / max(sum(masks[path].size for path in paths), 1)
        for _, paths in groups(sparsity, masks)
    ]
    return dict(zip(sparsity, shares, strict=True)) if isinstance(sparsity, Mapping) else shares[0]


def groups(
    sparsity: Sparsities, kernels: Iterable[str], words: tuple[str, str, str] = WEIGHTS
) -> list[tuple[Sparsity, list[str]]]:
    """The kernels that are pruned together, and to which sparsity: those of each pattern, of which the first counts.

    Args:
        sparsity: one for all kernels, or one for each pattern, as in ``fnmatch``.
        kernels: their paths; or the names of groups of units.
        words: what errors call them.

    Raises:
        ValueError: a pattern that gets no kernel, or patterns of which the order could be lost.
    """
    kernels, (name, _, one) = list(kernels), words
    if not isinstance(sparsity, Mapping):
        return [(sparsity, kernels)]
    matched = {pattern: [path for path in kernels if _matches(path, pattern)] for pattern in sparsity}
    of_several = [path for path in kernels if sum(path in paths for paths in matched.values()) > 1]
    kept_in_order = isinstance(sparsity, collections.OrderedDict) or _checks.are_known(tuple(sparsity.values()))
    if of_several and not kept_in_order:
        raise ValueError(
            f"several of the patterns {', '.join(map(repr, sparsity))} match '{of_several[0]}', and a dict that goes "
            f"through jit loses its order; give a collections.OrderedDict, or patterns of which one matches each {one}"
        )
    taken, found = set(), []
    for pattern, number in sparsity.items():
        here = [path for path in matched[pattern] if path not in taken]
        if not here:
            raise ValueError(
                f"the pattern {pattern!r} of the {name} gets no {one}: it matches none, or others before it match "
                f"all of them{inside(pattern, kernels)}. The {one}s that may be pruned are {', '.join(kernels)}"
            )
        taken.update(here)
        found.append((number, here))
    return found


def _matches(path: str, pattern: str) -> bool:
    return path == pattern or fnmatch.fnmatchcase(path, pattern)
