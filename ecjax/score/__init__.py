"""Criteria: params and calibration inputs in, an importance for every weight out.

The criteria differ in what may move to repair a removal: nothing (``optimal_brain_damage``), the adjacent bias
(``elimination_compensation``, by its definition, from three moments, or on the true change in the outputs), or all that
is left (``optimal_brain_surgeon``). The rest are the baselines they are measured against.
"""

from ecjax.score.baselines import gradient_magnitude, magnitude, random
from ecjax.score.criteria import CRITERIA, NEURON_CRITERIA, Criterion
from ecjax.score.definition import elimination_compensation_by_definition
from ecjax.score.linear import (
    elimination_compensation,
    elimination_compensation_from_moments,
    optimal_brain_damage,
    optimal_brain_damage_from_moments,
)
from ecjax.score.neuron_baselines import neuron_group_norm, neuron_norm, neuron_random, neuron_variance
from ecjax.score.neurons import (
    neuron_elimination_compensation,
    neuron_elimination_compensation_by_definition,
    neuron_elimination_compensation_from_moments,
)
from ecjax.score.nonlinear import nonlinear_elimination_compensation
from ecjax.score.scores import NeuronScores, Scores
from ecjax.score.surgeon import optimal_brain_surgeon
from ecjax.score.wanda import wanda

__all__ = [
    "CRITERIA",
    "NEURON_CRITERIA",
    "Criterion",
    "NeuronScores",
    "Scores",
    "elimination_compensation",
    "elimination_compensation_by_definition",
    "elimination_compensation_from_moments",
    "gradient_magnitude",
    "magnitude",
    "neuron_elimination_compensation",
    "neuron_elimination_compensation_by_definition",
    "neuron_elimination_compensation_from_moments",
    "neuron_group_norm",
    "neuron_norm",
    "neuron_random",
    "neuron_variance",
    "nonlinear_elimination_compensation",
    "optimal_brain_damage",
    "optimal_brain_damage_from_moments",
    "optimal_brain_surgeon",
    "random",
    "wanda",
]
