"""Prune fully-connected networks in JAX and keep what they know.

``networks`` says what can be pruned, ``score`` how much each weight matters, ``prune`` removes weights, ``surgeon``
chooses weights together and moves the others, ``train`` teaches what is left; see the README for the formulas.
"""

from ecjax import networks, prune, score, surgeon, train

__all__ = ["networks", "prune", "score", "surgeon", "train"]
