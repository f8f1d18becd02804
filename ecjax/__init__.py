"""Prune fully-connected networks in JAX and keep what they know.

``networks`` says what can be pruned, ``score`` how much each weight matters, ``prune`` removes weights,
``compensate`` repairs what is left, ``surgeon`` chooses weights together and moves the others, ``train`` trains; see
the README for the formulas.
"""

from ecjax import compact, compensate, networks, prune, score, surgeon, train

__all__ = ["compact", "compensate", "networks", "prune", "score", "surgeon", "train"]
