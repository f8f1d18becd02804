"""Repairs: what is left of a pruned network makes up for what was removed.

A repair is a value: ``Biases`` moves all biases together, ``Survivors`` every parameter that no mask has removed. Both
minimise the distance of the outputs to their targets by damped Gauss-Newton steps. ``prune.staged(repair=...)`` applies
one after each stage; called, it repairs what any masks have left. Any function ``(network, params, masks, inputs,
targets) -> params`` is a repair too.
"""

from ecjax.repair.repairs import REPAIRS, Biases, Repair, Survivors
from ecjax.repair.targets import mixture

__all__ = ["REPAIRS", "Biases", "Repair", "Survivors", "mixture"]
