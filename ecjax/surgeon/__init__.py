"""The brain surgeons: saliencies with interactions, joint selection, and survivors that move to make up.

``sparse_gpt`` does all of it kernel by kernel; the others see the whole network.
"""

from ecjax.surgeon.fisher import (
    brain_surgeon_saliency,
    brain_surgeon_saliency_from_gradients,
    brain_surgeon_update,
    combinatorial_update,
    loss_gradients,
    removal_cost,
)
from ecjax.surgeon.selection import combinatorial_selection
from ecjax.surgeon.sparse_gpt import Kernel, sparse_gpt

__all__ = [
    "Kernel",
    "brain_surgeon_saliency",
    "brain_surgeon_saliency_from_gradients",
    "brain_surgeon_update",
    "combinatorial_selection",
    "combinatorial_update",
    "loss_gradients",
    "removal_cost",
    "sparse_gpt",
]
