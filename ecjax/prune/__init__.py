"""Decisions: scores in, masks and new params out; one shot or in stages."""

from ecjax.prune.afford import Afforded, Tried, afford
from ecjax.prune.masks import SCOPES, Pruned, apply_masks, sparsity
from ecjax.prune.neurons import neurons
from ecjax.prune.regrowth import Regrowth
from ecjax.prune.selection import smallest
from ecjax.prune.summary import Row, Summary, summary
from ecjax.prune.weights import one_shot
from ecjax.staged import Stage, staged, staged_neurons

__all__ = [
    "SCOPES",
    "Afforded",
    "Pruned",
    "Regrowth",
    "Row",
    "Stage",
    "Summary",
    "Tried",
    "afford",
    "apply_masks",
    "neurons",
    "one_shot",
    "smallest",
    "sparsity",
    "staged",
    "staged_neurons",
    "summary",
]
