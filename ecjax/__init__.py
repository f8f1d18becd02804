"""Prune fully-connected networks in JAX and keep what they know.

``networks`` says what can be pruned, ``score`` how much each weight matters, ``prune`` removes weights, ``train``
teaches what is left; see the README for the formulas.
"""

from ecjax import networks, prune, score, train

__all__ = ["networks", "prune", "score", "train"]
