"""The brain surgeons: saliencies with interactions, joint selection, and survivors that move to make up."""

from ecjax.surgeon.fisher import (
    brain_surgeon_saliency,
    brain_surgeon_saliency_from_gradients,
    brain_surgeon_update,
    combinatorial_update,
    loss_gradients,
    removal_cost,
)
from ecjax.surgeon.selection import combinatorial_selection

__all__ = [
    "brain_surgeon_saliency",
    "brain_surgeon_saliency_from_gradients",
    "brain_surgeon_update",
    "combinatorial_selection",
    "combinatorial_update",
    "loss_gradients",
    "removal_cost",
]
