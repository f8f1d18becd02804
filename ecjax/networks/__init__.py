"""What a network is here, what its leaves do, and the doors to it from Flax Linen and Flax NNX.

What most functions of ecjax take, and their docstrings do not explain again:

network: a pure function ``(params, inputs) -> outputs``, jitted or not, that gives each sample its row of outputs, of
    shape (samples, K), whatever the other samples are; or a row for each of its positions, of shape (samples,
    positions, K), which add up: the logits of a language model. Make it once and pass the same function everywhere:
    all of ecjax is compiled once for each network function, with the arrays that it closes over as they are then.
    ``from_linen`` and ``from_nnx`` make one of a Flax module; an Equinox module is its own params, with
    ``lambda module, inputs: jax.vmap(module)(inputs)`` as the network.
params: any pytree: nested dicts, lists, tuples, dataclasses, a single array. Leaves that are no arrays, such as an
    activation in an Equinox module, are left as they are. What a leaf is called means nothing: a *kernel* is one that
    multiplies what depends on the inputs, its *bias* the one that is added to that product (``layers`` shows them).
inputs: calibration inputs, one array with samples along the first axis, of numbers or of tokens. A few thousand are
    usual; no labels.
exclude: patterns of the paths of leaves, as in ``fnmatch``: "head/*", or several in a tuple. What they match is not
    read, scored or pruned, and does not count. Only a repair moves it, unless it is ``frozen`` there.
metric: how a change of the outputs is measured, "euclidean" or "fisher", or a value (``ecjax.metrics``).
weights: how much each sample counts, of shape (samples,), or each position of its outputs, of shape (samples,
    positions): 0 for padding. All count the same if None.
batch_size: samples at a time; it bounds the memory, and changes results by no more than rounding, but for what probes
    draw.

Under ``jit``, ``vmap`` and ``grad`` of your own, shapes are checked as ever, but values can't be seen: NaN in the
inputs, outputs that are probabilities, labels out of range, a temperature below 0 are not refused there.

*Kernels* is a pytree shaped like ``params`` with None in place of every leaf that is no kernel: importances, bias
shifts and masks are Kernels (``prune.Pruned`` shows how to go over these and the params together).
"""

from ecjax._trees import by_path, replace
from ecjax._types import Inputs, Kernels, Loss, Network, Params, Patterns, Targets
from ecjax.graph import Group, Groups, Layer, Layers
from ecjax.networks.linen import MLP, from_linen
from ecjax.networks.nnx import from_nnx, to_nnx
from ecjax.networks.params import groups, layers
from ecjax.networks.statistics import batch_statistics

__all__ = [
    "MLP",
    "Group",
    "Groups",
    "Inputs",
    "Kernels",
    "Layer",
    "Layers",
    "Loss",
    "Network",
    "Params",
    "Patterns",
    "Targets",
    "batch_statistics",
    "by_path",
    "from_linen",
    "from_nnx",
    "groups",
    "layers",
    "replace",
    "to_nnx",
]
