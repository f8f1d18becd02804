"""Networks of Flax NNX modules, and modules with other params."""

from typing import Any, cast

from flax import nnx
from jax import Array

from ecjax._trees import by_path, replace, require_params
from ecjax._types import Inputs, Network, Params


def from_nnx(module: object) -> tuple[Network, Params]:
    """The pure function ``(params, inputs) -> outputs`` of a Flax NNX module, and its params.

    The params are nested dicts under the names of the module's attributes, with whole numbers for the members of an
    ``nnx.List`` or ``nnx.Sequential``: what belongs to ``module.layers[0].kernel`` in scores and masks is
    ``scores.importance["layers"][0]["kernel"]``. All other variables keep the values that they have now, whatever a
    call does to them. The module itself is never changed; ``to_nnx`` makes one of pruned params.

    Make the function once and pass it everywhere: everything in ecjax is compiled once per network function.

    Args:
        module: a ``flax.nnx.Module`` that takes inputs of shape (samples, *features), in evaluation mode
            (``module.eval()``) if it has dropout or batch statistics.

    Returns:
        The network function, and the values of the module's ``nnx.Param`` variables as nested dicts.

    Raises:
        ValueError: no NNX module; or, when the network is called, one that draws random numbers or moves its batch
            statistics.

    Example:
        >>> module = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
        >>> network, params = networks.from_nnx(module)
        >>> network(params, inputs).shape
        (200, 2)
        >>> score.magnitude(network, params, inputs).importance["layers"][0]["kernel"].shape
        (4, 8)
    """
    _require_module(module)
    graph, state, others = nnx.split(module, nnx.Param, ...)
    fixed = nnx.to_pure_dict(others)

    def network(params: Params, inputs: Inputs) -> Array:
        called: Any = nnx.merge(graph, params, fixed)
        before = _state_of_training(called)
        outputs = called(inputs)
        for path, value in _state_of_training(called).items():
            if value is not before.get(path):
                raise ValueError(
                    f"a call of the module changes '{path}': it is in training mode, where outputs are random or "
                    "samples interact; call module.eval() before networks.from_nnx"
                )
        return outputs

    return network, nnx.to_pure_dict(state)


def to_nnx(module: object, params: Params) -> nnx.Module:
    """A new module like ``module``, with the values of its ``nnx.Param`` variables taken from ``params``.

    Args:
        module: the ``flax.nnx.Module`` that was given to ``from_nnx``; it stays as it is. The new one has its mode and
            its batch statistics as they are now: in evaluation mode, and not trained since, it is the network.
        params: as ``from_nnx`` gives them, pruned or trained since; also with the smaller arrays of
            ``compact.compact`` (attributes such as ``in_features`` then still tell the old widths).

    Raises:
        ValueError: no NNX module, params under other paths than the module's, or fewer units than its batch statistics
            have: of those the smaller network of ``compact.compact`` knows.

    Example:
        >>> module = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        >>> network, params = networks.from_nnx(module)
        >>> pruned = prune.one_shot(params, score.magnitude(network, params, inputs), sparsity=0.75)
        >>> smaller = networks.to_nnx(module, pruned.params)
        >>> int((smaller.kernel[...] == 0).sum()), int((module.kernel[...] == 0).sum())
        (6, 0)
    """
    _require_module(module)
    require_params(params)
    graph, state, others = nnx.split(module, nnx.Param, ...)
    own = nnx.to_pure_dict(state)
    expected, given = by_path(own), by_path(params)
    for path in [*expected, *given]:
        if path not in given or path not in expected:
            there = "has no such variable" if path in given else "needs it"
            raise ValueError(f"the params do not fit the module at '{path}': the module {there}")
    for path, statistic in by_path(nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))).items():
        for beside, leaf in expected.items():
            alike = beside.rpartition("/")[0] == path.rpartition("/")[0] and leaf.shape == statistic.shape
            if alike and given[beside].shape != leaf.shape:
                raise ValueError(
                    f"the module keeps the statistics '{path}' of {leaf.size} units, and '{beside}' is of "
                    f"{given[beside].size} now; call the smaller network that compact.compact gave with these params"
                )
    return cast("nnx.Module", nnx.merge(graph, replace(own, given), nnx.to_pure_dict(others)))


def _require_module(module: object) -> None:
    if not isinstance(module, nnx.Module):
        raise ValueError(
            f"from_nnx and to_nnx take a flax.nnx.Module, got {type(module).__name__}; for Flax Linen there is "
            "networks.from_linen, and any pure function (params, inputs) -> outputs is a network as it stands"
        )


def _state_of_training(module: nnx.Module) -> dict[str, Array]:
    """What only training changes, by path: batch statistics, and the state of random numbers."""
    return by_path(nnx.to_pure_dict(nnx.state(module, (nnx.BatchStat, nnx.RngState))))
