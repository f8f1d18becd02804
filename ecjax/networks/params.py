"""What is found in a network: its layers, as its jaxpr shows them."""

import jax

from ecjax import _door, _trees
from ecjax._types import Inputs, Network, Params, Patterns
from ecjax.graph import Layers


def layers(
    network: Network, params: Params, inputs: Inputs | jax.ShapeDtypeStruct, *, exclude: Patterns = ()
) -> Layers:
    """Every kernel of a network in order of execution, with its bias, and why a leaf is not pruned.

    The roles are read from the network's jaxpr; nothing is computed. ``print`` shows them as a table.

    Args:
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
    return _door.layers(network, params, inputs, exclude=exclude, need="any", each_alone=False)
