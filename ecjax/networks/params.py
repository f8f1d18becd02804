"""What a network is here: a pure function ``(params, inputs) -> outputs``, and the layers that are found in it.

``params`` is any pytree: nested dicts, lists, tuples, dataclasses, a single array; leaves that are no arrays (an
activation in an Equinox module) are left as they are. What a leaf is *called* means nothing. A *kernel* is a leaf that
multiplies what depends on the inputs; its *bias* is the leaf that is added to that product. *Kernels* is a pytree
shaped like ``params`` with None in place of every leaf that is no kernel: importances, bias shifts and masks are
Kernels (``prune.Pruned`` shows how to go over these and the params together).
"""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax import Array
from jaxtyping import Num, PyTree, Shaped

from ecjax import _door, _trees
from ecjax.graph import Layers

Params = PyTree
Kernels = PyTree
Inputs = Num[Array | np.ndarray, "samples *features"]
Network = Callable[[Params, Inputs], Array]
# Not checked against the samples of the inputs here: ``checks.require_targets`` says it more clearly.
Targets = Shaped[Array | np.ndarray, "_samples *outputs"]
Loss = Callable[[Array, Array], Array]
Patterns = str | Iterable[str]


def layers(
    network: Network, params: Params, inputs: Inputs | jax.ShapeDtypeStruct, *, exclude: Patterns = ()
) -> Layers:
    """Every kernel of a network in order of execution, with its bias, and why a leaf is not pruned.

    The roles are read from the network's jaxpr; nothing is computed. ``print`` shows them as a table.

    Args:
        network: pure function ``(params, inputs) -> outputs``.
        params: its parameters, or their shapes.
        inputs: samples along the first axis, or their shape.
        exclude: patterns of paths of leaves, as in ``fnmatch``, that are left alone: "head/*".

    Raises:
        ValueError: a network that does not take these, without a kernel, or a pattern that matches nothing.

    Example:
        >>> networks.layers(network, params, inputs)
        kernel          shape  axes     bias          positions  weights  pruned
        ────────────────────────────────────────────────────────────────────────
        Dense_0/kernel  4 × 8  in, out  Dense_0/bias  1          32       yes
        Dense_1/kernel  8 × 2  in, out  Dense_1/bias  1          16       yes
    """
    network, params, _ = _trees.split(network, params)
    return _door.layers(network, params, inputs, exclude=exclude, scored=False, clear=False, each_alone=False)
