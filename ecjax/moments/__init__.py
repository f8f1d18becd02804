"""What each layer saw: the moments of its inputs, weighted by how sensitive the outputs are to its neurons.

With ``g_ki = ∂y_k/∂z_i`` at pre-activation ``z_i`` and the sensitivity ``S_i = Σ_k g_ki²`` of each sample (``gᵀ M g``
for another output metric M), a layer with inputs ``a`` is described by ``Σ S_i``, by the S-weighted mean of each
``a_j`` and by its S-weighted sum of squared deviations. Elimination-compensation and optimal brain damage are read off
these.

Moments are additive: ``start``, ``update`` with one batch after another, on one machine or on several, and ``merge``;
``score.elimination_compensation_from_moments`` reads the scores off them. They are plain pytrees, to be saved and gone
on with. ``of_batches`` does so for an iterator, ``of_inputs`` for one array.

They cost one forward pass and K backward passes to the pre-activations, then two matrix products a layer; no gradient
with respect to a weight is formed for any sample.
"""

from ecjax.moments.additive import InputMoments, LayerMoments, Moments, merge, start
from ecjax.moments.stream import Batch, of_batches, of_inputs, update

__all__ = [
    "Batch",
    "InputMoments",
    "LayerMoments",
    "Moments",
    "merge",
    "of_batches",
    "of_inputs",
    "start",
    "update",
]
