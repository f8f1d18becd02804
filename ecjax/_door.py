"""What every function that takes a network does first: read it, and refuse what it can't be right about.

The reading happens while a function without results is traced, so it is done once for each network and shapes, and
what it found is kept where JAX keeps everything that was traced.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import Array
from jaxtyping import PyTree

from ecjax import _batches, _checks, _precision, _trees, metrics
from ecjax._trees import WithStatic
from ecjax._types import Inputs, Metric, Network, Params, Patterns, Targets, Weights
from ecjax.graph import Group, Groups, Layers, read
from ecjax.graph.groups import couple, of_coupled
from ecjax.graph.layers import as_patterns, chosen
from ecjax.graph.reading import shape_of_two

_COMPARED, _LOOKED_AT = 4, 16  # samples


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["layers", "mixed", "unknown", "row"])
@dataclasses.dataclass(frozen=True)
class _Facts:
    layers: Layers
    mixed: str
    unknown: str
    row: tuple[tuple[int, ...], np.dtype]  # the shape of a sample's outputs, and their dtype


class Entered(NamedTuple):
    """What has passed the door.

    Attributes:
        network: of params that are arrays alone.
        params: these arrays.
        inputs: where they lie, for the compiler to do with what is computed from them as it likes.
        layers: that are not excluded.
        outputs: the shape and dtype of what the network gives for the inputs.
        metric: a metric, no name.
        weights: placed like the inputs.
        static: the leaves of the params that are no arrays.
    """

    network: Network
    params: Params
    inputs: Inputs
    layers: Layers
    outputs: jax.ShapeDtypeStruct
    metric: metrics.Metric
    weights: Weights | None
    static: tuple


def enter(
    network: Network,
    params: Params,
    inputs: Any,
    *,
    exclude: Patterns = (),
    metric: Metric = "euclidean",
    targets: Targets | None = None,
    weights: Weights | None = None,
    need: str = "moments",
    **counts: int | None,
) -> Entered:
    """What every function that takes calibration inputs passes first: all checks, the reading, and where arrays lie.

    Args:
        params: its parameters, any pytree.
        exclude: patterns of paths, which are left alone.
        metric: of the outputs, or its name; any outputs suit the Euclidean one.
        targets: one for each sample, which is all that is asked of them here; None where there are none.
        weights: of samples, or of their positions; None where all count the same.
        need: of every kernel, as ``layers`` says.
        **counts: arguments that must be whole numbers of at least 1; None is one that was not given.

    Raises:
        ValueError: whatever of these can't be used, by its name.
    """
    _checks.require_inputs(inputs)
    if targets is not None:
        _checks.require_targets(inputs, targets)
    metric = metrics.named(metric)
    for name, count in counts.items():
        if count is not None:
            _checks.require_positive(count, name)
    network, params, static = _trees.split(network, params)
    inputs, weights = _batches.placed((inputs, weights))
    facts = _facts(network, params, inputs, exclude=exclude, need=need, each_alone=True)
    outputs = jax.ShapeDtypeStruct((inputs.shape[0], *facts.row[0]), facts.row[1])
    if weights is not None:
        _checks.require_weights(weights, outputs.shape)
        weights = weights.astype(outputs.dtype) if weights.dtype == bool else weights
    metrics.require_outputs(metric, outputs, _few_outputs(network, params, inputs, metric))
    return Entered(network, params, inputs, facts.layers, outputs, metric, weights, static)


def layers(
    network: Network,
    params: Params,
    inputs: Any,
    *,
    exclude: Patterns = (),
    need: str = "moments",
    each_alone: bool = True,
) -> Layers:
    """The layers of a network.

    Args:
        params: its parameters, of arrays alone (``_trees.split``).
        inputs: an array with samples in it, or only its shape.
        exclude: patterns of paths, which are left alone.
        need: what every kernel must be: one that "moments" can score, one whose "weights" enter products one by one, or
            "any".
        each_alone: whether each sample's outputs must depend on this sample alone.

    Raises:
        ValueError: a network that does not take these, mixes samples or has a kernel that can't be scored, by name.
    """
    return _facts(network, params, inputs, exclude=exclude, need=need, each_alone=each_alone).layers


def units(network: Network, params: Params, inputs: Any, *, exclude: Patterns = ()) -> dict[str, Group]:
    """The groups of a network whose units can go, by name (``Groups.named``).

    Args:
        params: its parameters, of arrays alone.
        inputs: an array with samples in it, or only its shape.
        exclude: patterns of paths; groups of which a leaf is left alone stay whole.
    """
    excluded = chosen(exclude, list(_trees.by_path(params)))
    found = groups(network, params, inputs).named
    return {name: group for name, group in found.items() if not any(place.path in excluded for place in group.places)}


def groups(network: Network, params: Params, inputs: Any) -> Groups:
    """All groups of a network, whose params are arrays alone."""
    _require_function(network)
    if isinstance(inputs, jax.ShapeDtypeStruct):
        return of_coupled(couple(network, params, shape_of_two(inputs)))
    try:
        return _traced_groups(params, inputs, network=network).groups
    except ValueError as error:
        raise ValueError(*error.args) from error.__cause__  # without what JAX adds about its frames


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["groups"])
@dataclasses.dataclass(frozen=True)
class _OfUnits:
    groups: Groups


@functools.partial(jax.jit, static_argnames=("network",))
def _traced_groups(params, inputs, *, network) -> _OfUnits:
    return _OfUnits(of_coupled(couple(network, _trees.shapes(params), shape_of_two(inputs))))


def _facts(network, params, inputs, *, exclude, need, each_alone) -> _Facts:
    _checks.require_array(inputs)
    patterns = as_patterns(exclude)
    _require_function(network)
    if isinstance(inputs, jax.ShapeDtypeStruct):
        facts = _read(params, shape_of_two(inputs), network=network, exclude=patterns)
    else:
        try:
            facts = _traced(params, inputs, network=network, exclude=patterns)
        except ValueError as error:
            raise ValueError(*error.args) from error.__cause__  # without what JAX adds about its frames
    if each_alone:
        _require_apart(network, params, inputs, facts)
    if not facts.layers:
        held = ", ".join(f"'{path}' {what}" for path, what in facts.layers.others.items())
        raise ValueError(
            "the network has no kernel to prune: no leaf of its params is multiplied with what depends on the inputs"
            + (f"; {held}" if held else "")
        )
    for layer in facts.layers:
        if (need == "moments" and layer.reason) or (need != "any" and layer.of_kernel is None):
            raise ValueError(
                f"kernel '{layer.kernel}' can't be scored: it {layer.reason}. Leave it out with "
                f"exclude=('{layer.kernel}',); networks.layers shows all kernels"
            )
    return facts


def _read(params, inputs, *, network, exclude) -> _Facts:
    found = read(network, params, inputs, exclude=exclude)
    (outputs,) = found.jaxpr.out_avals
    return _Facts(found.layers, found.mixed, found.unknown, (outputs.shape[1:], np.dtype(outputs.dtype)))


@functools.partial(jax.jit, static_argnames=("network", "exclude"))
def _traced(params, inputs, *, network, exclude) -> _Facts:
    return _read(_trees.shapes(params), shape_of_two(inputs), network=network, exclude=exclude)


def _require_function(network: Callable) -> None:
    """Raises a ValueError for a module in place of its function, or for what ``jit`` can't tell from others."""
    inner = network.network if isinstance(network, WithStatic) else network
    for kind, door in ((linen.Module, "networks.from_linen(module)"), (nnx.Module, "networks.from_nnx(module)")):
        if isinstance(inner, kind):
            raise ValueError(
                f"the network is a module, {type(inner).__name__}; it must be a pure function (params, inputs) -> "
                f"outputs, which {door} makes of it"
            )
    try:
        hash(network)
    except TypeError as error:
        if isinstance(network, WithStatic):
            parts = ", ".join(f"'{path}' ({type(leaf).__name__})" for path, leaf in network.static)
            what = f"the network, or one of the leaves of the params that are no arrays, can't be hashed: {parts}"
        else:
            what = f"the network, of type {type(network).__name__}, can't be hashed"
        raise ValueError(
            f"{what}. Pass a function such as `lambda module, inputs: module(inputs)` with the module as params"
        ) from error


def _called(network: Callable, params: PyTree, inputs: Array) -> np.ndarray:
    """The outputs of a few samples.

    Raises:
        ValueError: a network that does not take so many, or does not give each a row.
    """
    try:
        outputs = np.asarray(network(params, inputs), np.float64)
    except Exception as error:
        raise ValueError(
            f"the network does not take {inputs.shape[0]} samples, and must take any number of them: {error}"
        ) from error
    if outputs.shape[:1] != inputs.shape[:1]:
        raise ValueError(
            f"the network must return one array of shape (samples, outputs), here ({inputs.shape[0]}, K); "
            f"it returns one of shape {outputs.shape}"
        )
    return outputs


def _require_apart(network: Callable, params: PyTree, inputs, facts: _Facts) -> None:
    """Raises a ValueError if samples are mixed, or if that can't be found out."""
    if facts.mixed:
        raise ValueError(
            f"the network mixes samples, in {facts.mixed}: what one sample gives depends on the others, so none has a "
            "sensitivity of its own. Batch statistics belong in evaluation mode (Linen: use_running_average=True; NNX: "
            "module.eval()); other sums over samples belong outside of the network"
        )
    if not facts.unknown:
        return
    if not _checks.are_known((params, inputs)):
        raise ValueError(
            f"the network holds {facts.unknown}, which may mix samples; that is found out by comparing samples "
            "together and alone, which takes values: call this outside of jit"
        )
    if inputs.shape[0] < 2:
        return
    few = jnp.asarray(_batches.spread(inputs, _COMPARED))
    together = _called(network, params, few)
    alone = np.concatenate([_called(network, params, few[i : i + 1]) for i in range(len(few))])
    scale = np.nanmax(np.abs(alone), initial=0)
    if not np.allclose(together, alone, rtol=0, atol=1e-3 * scale, equal_nan=True):
        raise ValueError(
            f"the network mixes samples, probably in {facts.unknown}: {len(few)} samples give other outputs together "
            "than each alone, so none has a sensitivity of its own. Dropout belongs in evaluation mode"
        )


def _few_outputs(network: Callable, params: PyTree, inputs, metric: metrics.Metric) -> Array | None:
    """What the network gives for a few samples; None where values can't be seen, or do not matter."""
    if isinstance(metric, metrics.Euclidean) or not _checks.are_known((params, inputs, metric)):
        return None
    few = _called_in_full(network, params, _batches.spread(inputs, _LOOKED_AT))
    return few if _checks.are_known(few) else None  # under jit, what is computed of constants can't be seen either


@_precision.compiled("network")
def _called_in_full(network, params, inputs):
    return network(params, inputs)
