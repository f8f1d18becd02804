"""A smaller network with the same function: units that pruning has cut off are folded away, and arrays get smaller."""

import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Num

from ecjax import _checks, _door, _precision, _trees, graph, networks
from ecjax._types import Inputs, Network, Params
from ecjax.compact import answers, chains
from ecjax.compact.inert import Evaluation, Found, Seen
from ecjax.graph.groups import Coupled, Groups, by_atom, couple
from ecjax.graph.layers import Layer
from ecjax.graph.reading import Reading
from ecjax.graph.smaller import Removed

_Site = tuple[int, ...]
_OTHERWISE = (
    "the network that was given takes the smaller params too, and answers otherwise with them, as where it divides by "
    "a width that is smaller now: call the smaller network that comes with them, and no other"
)


def compact(network: Network, params: Params, inputs: Inputs) -> tuple[Network, Params]:
    """A smaller network with the same function, and its params.

    Units are neurons, channels, attention heads, features of a residual stream: the free groups of ``networks.groups``.
    One is taken out where

    - nothing reads it any more: all weights that do are zero, and so is what it adds elsewhere;
    - it is zero, or the same for all inputs because no surviving weight joins it to these, and the biases of those that
      read it can take the constant over: they gain ``c · W_j``. Where a reader has no bias of its own, is used more
      than once or in a scan, or pads with zeros, constants other than 0 stay.

    What goes may leave others without a reader, or constant: they go, too. Inputs and outputs stay (``drop_inputs``).

    The smaller network is the network itself where it takes the smaller params and answers alike, as many plain
    functions, Equinox and NNX modules do. Where ``networks.from_linen`` made it of a ``networks.MLP``, it is that of
    the MLP with the smaller widths. Otherwise it is the given network evaluated with fewer units
    (``graph.without_units``): a pure function as ever, traced anew for every shape of inputs.

    Call the smaller network that comes back, and no other: a module may take the smaller params and answer otherwise,
    as Equinox's attention does, which divides by the root of what is now the width of a head. A warning says so.

    Args:
        params: its parameters, with exact zeros where weights were removed.
        inputs: a few are enough, any that the network takes.

    Returns:
        The network, and its params in the containers and dtypes given; the outputs are the same up to rounding.

    Raises:
        ValueError: a network that mixes samples or has no kernel; params or inputs without values; constants that
            overflow.

    Example:
        >>> halved = networks.replace(params, {"Dense_0/kernel": params["Dense_0"]["kernel"].at[:, ::2].set(0)})
        >>> smaller, small = compact.compact(network, halved, inputs)
        >>> small["Dense_0"]["kernel"].shape, small["Dense_1"]["kernel"].shape
        ((4, 4), (4, 2))
        >>> bool(jnp.allclose(smaller(small, inputs), network(halved, inputs), atol=1e-5))
        True
    """
    folded = _folded(network, params, inputs)
    if not any(units.size for units in folded.removed.values()):
        return network, params
    smaller, small = graph.without_units(network, folded.params, folded.groups, folded.removed)
    reference = (network, params, folded.samples)
    for other in (network, _of_module(network, small)):
        if other is not None and _takes(other, small, folded):
            if _answers_alike(other, small, folded, reference):
                return other, small
            warnings.warn(_OTHERWISE, stacklevel=2)
    found = answers.of(smaller, small, folded.samples)
    answers.require_same("the smaller network is not the one that was given", found, folded.outputs, reference)
    return smaller, small


def fold(network: Network, params: Params, inputs: Inputs) -> Params:
    """The params of ``compact`` alone; arguments and errors are those of it.

    Example:
        >>> halved = networks.replace(params, {"Dense_0/kernel": params["Dense_0"]["kernel"].at[:, ::2].set(0)})
        >>> jax.tree.map(jnp.shape, compact.fold(network, halved, inputs)["Dense_1"])
        {'bias': (2,), 'kernel': (4, 2)}
    """
    return compact(network, params, inputs)[1]


class _Folded(NamedTuple):
    """A network with units that can go.

    Attributes:
        params: of the old shapes, zero wherever these units lie; the biases have taken their constants over.
        groups: of the network.
        removed: by the index of a group, the units that can go.
        samples: a few of the inputs.
        outputs: of the given network for these.
    """

    params: Params
    groups: Groups
    removed: dict[int, Int[np.ndarray, " _"]]
    samples: Num[Array, "few *features"]
    outputs: Num[np.ndarray, "few *outputs"]


def _folded(network: Network, params: Params, inputs: Inputs) -> _Folded:
    _checks.require_inputs(inputs)
    inner, arrays, _ = _trees.split(network, params)
    if not _checks.are_known((arrays, inputs)):
        raise ValueError("the shapes of what is compacted depend on values: call this outside of jit, vmap and grad")
    _door.layers(inner, arrays, inputs, need="any")
    samples = answers.few(inputs)
    reading, coupled = graph.read(inner, arrays, samples), couple(inner, arrays, samples)
    found = by_atom(coupled)
    groups, folds = Groups(found.values()), _folding(reading)
    outputs, full, removed = answers.of(network, params, samples), params, {}
    find = _finding(coupled, folds)
    while True:
        seen = find(_trees.arrays(full), samples)
        inert = {
            index: np.flatnonzero(seen.inert[atom])
            for index, (atom, group) in enumerate(found.items())
            if group.free and atom in seen.inert
        }
        after = {index: np.union1d(units, removed.get(index, units)).astype(int) for index, units in inert.items()}
        if sum(map(np.size, after.values())) == sum(map(np.size, removed.values())):
            return _Folded(full, groups, removed, samples, outputs)
        removed = after
        full = _without(full, groups, removed, folds, seen)
        # At full size any network can be called, so the folding is compared before anything is cut out.
        reference = (network, params, samples)
        found_now = answers.of(network, full, samples)
        answers.require_same("the network can't be folded as it was read", found_now, outputs, reference)


def _finding(coupled: Coupled, folds: Iterable[_Site]) -> Callable[[Params, Inputs], Found]:
    """A compiled function of params and samples that says what is known of the units."""
    evaluation = Evaluation(coupled.atoms, frozenset(folds))

    @jax.jit
    @_precision.in_full
    def found(leaves, samples):
        everything = Seen(samples, np.ones(samples.shape, bool))
        _, found = evaluation.follow(coupled.walked, [*map(Seen, leaves), everything])
        return found

    return lambda params, samples: jax.tree.map(np.asarray, found([*_trees.by_path(params).values()], samples))


def _folding(reading: Reading) -> dict[_Site, tuple[Layer, str]]:
    """The layers whose bias can take constants over, and the path of this bias, by the site of their only product."""
    found = {}
    for layer in reading.layers:
        if layer.bias is None or layer.of_kernel is None or layer.of_kernel.stacked:
            continue
        (product, *others), (added, *also) = reading.products[layer.kernel], reading.biases[layer.bias]
        if not (others or also or added.turns) and _takes_constants(reading, product.site):
            found[product.site] = layer, layer.bias
    return found


def _takes_constants(reading: Reading, site: _Site) -> bool:
    """Whether a product turns constants into constants: one of matrices, or a convolution without padding."""
    jaxpr = reading.jaxpr.jaxpr
    for index in site[:-1]:
        equation = jaxpr.eqns[index]
        inside = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if inside is None or equation.primitive.name in ("scan", "while", "cond"):
            return False
        jaxpr = getattr(inside, "jaxpr", inside)
    equation = jaxpr.eqns[site[-1]]
    if equation.primitive.name == "dot_general":
        return not equation.params["dimension_numbers"][1][0]
    options = equation.params
    padded = any(low or high for low, high in options["padding"]) or any(n != 1 for n in options["lhs_dilation"])
    return not padded and options["feature_group_count"] == options["batch_group_count"] == 1


def _without(
    full: Params, groups: Groups, removed: Removed, folds: dict[_Site, tuple[Layer, str]], seen: Found
) -> Params:
    """The params with zeros in place of some units, and with biases that have taken their constants over."""
    leaves = _trees.by_path(full)
    zeros = graph.zeroed(full, groups, removed)
    shifted, after = {}, _trees.by_path(zeros)
    for site, (layer, path) in folds.items():
        kernel, bias = leaves[layer.kernel], leaves[path]
        if after[layer.kernel] is kernel or site not in seen.constants:
            continue
        gone = chains.entries(kernel, layer.layout) * (chains.entries(after[layer.kernel], layer.layout) == 0)
        shift = _shift(np.asarray(seen.constants[site]), gone)
        if shift.any():
            row = chains.entries(bias, layer.bias_layout)[0].astype(np.float64) + shift
            moved = chains.with_entries(bias, layer.bias_layout, row[None])
            shifted[path] = chains.like(bias, moved)
    _checks.require_finite(shifted, "folded biases")
    return graph.zeroed(_trees.replace(zeros, shifted), groups, removed)


def _shift(constants: Float[np.ndarray, "..."], gone: Float[np.ndarray, "in out"]) -> Float[np.ndarray, " out"]:
    """What the weights that go add to each neuron; a convolution reads the same channels in all of its window."""
    rows = np.tile(constants.astype(np.float64).reshape(-1), len(gone) // max(constants.size, 1))
    with np.errstate(over="ignore", invalid="ignore"):  # refused by name, where it reaches a bias
        return np.where((gone != 0).any(1), rows, 0) @ gone.astype(np.float64)


def _of_module(network: Network, small: Params) -> Network | None:
    """The network of an MLP with the widths of the smaller params; None for other networks."""
    module = getattr(network, "module", None)
    if not isinstance(module, networks.MLP):
        return None
    return networks.from_linen(
        module.clone(
            features=tuple(small[f"Dense_{number}"]["kernel"].shape[1] for number in range(len(module.features)))
        )
    )


def _takes(network: Network, small: Params, folded: _Folded) -> bool:
    """Whether a network takes the smaller params, and gives outputs of the same shape."""
    inner, arrays, _ = _trees.split(network, small)
    try:
        return jax.eval_shape(inner, arrays, folded.samples).shape == folded.outputs.shape
    except Exception:  # whatever a network raises that is of other widths
        return False


def _answers_alike(network: Network, small: Params, folded: _Folded, reference: tuple) -> bool:
    """Whether a network that takes the smaller params gives the outputs of the one that was given."""
    try:
        found = answers.of(network, small, folded.samples)
        answers.require_same("", found, folded.outputs, reference)
    except ValueError:
        return False
    return True
