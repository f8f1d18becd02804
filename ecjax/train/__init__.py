"""Training, fine-tuning that keeps zeros zero, and pruning while an optimiser trains, with optax."""

from ecjax.train.gradual import Gradual, gradually
from ecjax.train.training import Epoch, State, Trained, epoch, fit, keep_pruned, start, steps_per_epoch

__all__ = [
    "Epoch",
    "Gradual",
    "State",
    "Trained",
    "epoch",
    "fit",
    "gradually",
    "keep_pruned",
    "start",
    "steps_per_epoch",
]
