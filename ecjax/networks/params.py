"""What is found in a network: its layers, and its groups of units, as its jaxpr shows them."""

import jax

from ecjax import _door, _trees
from ecjax._types import Inputs, Network, Params, Patterns
from ecjax.graph import Groups, Layers


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


def groups(network: Network, params: Params, inputs: Inputs | jax.ShapeDtypeStruct) -> Groups:
    """Every group of units of a network, what makes and reads it, and whether its units can go.

    Units are what lies along axes that must have the same length: neurons, channels, the features of a residual stream,
    attention heads and their features. They follow from the network's jaxpr; nothing is computed. A unit can go if the
    network that lacks it gives what the network gives whose params are zero wherever it lies; what is not understood
    stays, for a reason. ``print`` shows the groups as a table.

    Args:
        params: its parameters, or their shapes.
        inputs: samples along the first axis, or their shape.

    Raises:
        ValueError: a network that does not take these.

    Example:
        >>> networks.groups(network, params, inputs)
        units  made by         read by         can go
        ────────────────────────────────────────────────────────────────────
        8      Dense_0/kernel  Dense_1/kernel  yes
        2      Dense_1/kernel                  no: is an axis of the outputs
        4                      Dense_0/kernel  no: is an axis of the inputs
    """
    network, params, _ = _trees.split(network, params)
    return _door.groups(network, params, jax.ShapeDtypeStruct(inputs.shape, inputs.dtype))
