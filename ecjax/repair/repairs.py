"""Repairs: values that say what may move to make up for a removal, and how far."""

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ecjax import _batches, _checks, _door, _memory, _trees, metrics
from ecjax._types import Inputs, Kernels, Metric, Network, Params, Patterns, Targets, Weights
from ecjax.graph import Group, Layers
from ecjax.graph.convolutions import in_loops
from ecjax.graph.gone import of_removed_units
from ecjax.graph.layers import chosen
from ecjax.networks.statistics import statistics_in
from ecjax.repair import gauss_newton
from ecjax.repair.gauss_newton import Free, Problem, State
from ecjax.repair.targets import as_outputs

# A repair of one's own: from what pruning left to params of the same shapes.
Repair = Callable[[Network, Params, Kernels, Inputs, Targets], Params]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Steps:
    """What the repairs below share: how far they go, and the call."""

    iterations: int | None = None
    last_iterations: int | None = None
    products: int | None = None
    curvature_samples: int | None = None
    batch_size: int = 1024
    damping: float | int = 0.01
    metric: Metric | None = None
    frozen: Patterns = ()

    def __call__(
        self,
        network: Network,
        params: Params,
        masks: Kernels,
        inputs: Inputs,
        targets: Targets,
        *,
        weights: Weights | None = None,
    ) -> Params:
        """The params repaired; a ValueError says what of these can't be used."""
        return _alone(self, network, params, masks, inputs, targets, weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survivors(_Steps):
    """Moves every parameter that no mask has removed, towards the targets; removed weights stay exactly zero.

    Each iteration solves ``(JᵀMJ + λ) δ = Jᵀr`` over what may move and goes along δ as far as the objective falls
    (``ecjax/repair/gauss_newton.py``), so the mean objective over the inputs never rises. Source: this library's own;
    the steps are Levenberg's and Marquardt's, with the products of Martens, "Deep learning via Hessian-free
    optimization" (2010).

    Called with ``(network, params, masks, inputs, targets)``, it gives the repaired params: any masks will do, wherever
    they come from. Targets are the dense network's outputs, of shape (samples, K); or, with the metric Fisher, class
    labels of shape (samples,), or a ``mixture`` of both; with positions, they have these as well. ``weights`` say how
    much each sample counts, or each position: 0 for padding. The network is differentiable forwards and backwards.

    It goes further, where it is not told how far, for a regression: a metric other than Fisher's, and fewer than ten
    outputs a sample. On held-out points of an equation four networks pruned to 0.95 had 1.8 to 12 times the dense error
    with the usual numbers, and 1.0 to 1.1 times with the others, for two to five times the price; 784-300-100-10 at
    0.98 loses 0.1 points less with the others, in either metric, for four to five times the price.

    Attributes:
        iterations: Gauss-Newton steps. If None, 3 after a stage of a run that others follow, which go over it again,
            and after the last, by hand and in ``afford`` 10, or 30 for a regression.
        last_iterations: the same after the last stage of a run; as many as iterations if None.
        products: products with the curvature JᵀMJ in a step; if None, 15, or 30 for a regression.
        curvature_samples: how many samples the curvature is of, others in each step; if None, 1,000, or 2,500 for a
            regression.
        batch_size: samples at a time; with curvature_samples, it bounds the memory.
        damping: λ at the start, as a multiple of the mean diagonal of JᵀMJ; adapted after every step.
        metric: of the outputs; None for that of the run, Euclidean without one. Where the run's is Fisher, at the
            temperature that ``metrics.temperature`` finds for the targets, 1 for labels: survivors can keep more than a
            first choice.
        frozen: patterns of the paths of leaves that may not move, as in ``fnmatch``. A kernel that is only excluded
            from pruning moves like the others. The criterion's own shifts still move the bias of a kernel that is
            pruned: exclude it as well, or take a criterion without shifts.

    Example:
        >>> last_layer = repair.Survivors(frozen="Dense_0/*", metric="fisher")
        >>> moved = last_layer(network, pruned.params, pruned.masks, inputs, labels)
        >>> before, after = (loss(network(p, inputs), labels).mean() for p in (pruned.params, moved))
        >>> bool(after < before), bool((moved["Dense_0"]["kernel"] == pruned.params["Dense_0"]["kernel"]).all())
        (True, True)
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Biases(_Steps):
    """Moves all biases of kernels together, towards the targets; no weight moves.

    The steps, the call and the attributes are those of ``Survivors``. Where ``metric`` is None and the run's is Fisher,
    it is Fisher at temperature 1: the first choice is what few parameters can save.

    Example:
        >>> dense = network(params, inputs)
        >>> moved = repair.Biases(metric="fisher")(network, pruned.params, pruned.masks, inputs, dense)
        >>> bool((moved["Dense_0"]["kernel"] == pruned.params["Dense_0"]["kernel"]).all())
        True
    """


# By a part of what JAX says: what that means here.
_NOT_DIFFERENTIABLE = {
    "custom_vjp": "repairs differentiate the network forwards, and it holds a function with jax.custom_vjp, which "
    "can't be; write that one with jax.custom_jvp, or prune with repair=None",
    "Reverse-mode differentiation does not work": "repairs differentiate the network backwards, and what may move "
    "goes through a loop of unknown length (lax.while_loop), which can't be; name its leaves in "
    "repair.Survivors(frozen=...), or prune with repair=None",
}
REPAIRS = {"biases": Biases(), "survivors": Survivors()}

# What a repair takes where it does not say. A regression, which has few outputs in a metric that is not Fisher's, needs
# all digits that there are, and a sample tells less of the curvature.
_USUALLY = {"iterations": 10, "products": 15, "curvature_samples": 1000}
_FOR_REGRESSION = {"iterations": 30, "products": 30, "curvature_samples": 2500}
_FEW_OUTPUTS = 10
_EARLY_STEPS = 3
_LOOKED_AT = 1 << 22  # of the targets' numbers, for a temperature


def named(repair: Any) -> Repair | None:
    """The repair that a name stands for, or the repair itself; None for none.

    Raises:
        ValueError: another name, or what is no repair, or one whose numbers can't be used.
    """
    found = REPAIRS.get(repair) if isinstance(repair, str) else repair
    if found is None and repair is None:
        return None
    if not callable(found) or isinstance(found, type):
        called = f"{repair.__name__}, a class; call it" if isinstance(repair, type) else repr(repair)
        raise ValueError(
            f"repair is {called}; it must be one of None, {', '.join(map(repr, REPAIRS))}, or a repair such as "
            "repair.Survivors(iterations=5), or a function (network, params, masks, inputs, targets) -> params"
        )
    if isinstance(found, Biases | Survivors):
        for name in ("iterations", "last_iterations", "products", "curvature_samples", "batch_size"):
            if getattr(found, name) is not None:
                _checks.require_positive(getattr(found, name), name)
        _checks.require_above_zero(found.damping, "damping")
        if found.metric is not None:
            metrics.named(found.metric)
    return found


def of_stage(repair: Repair | None, *, last: bool) -> Repair | None:
    """The repair after a stage of a run, the last one or one that others follow."""
    if not isinstance(repair, _Steps):
        return repair
    if last:
        return repair if repair.last_iterations is None else _with_steps(repair, repair.last_iterations)
    return _with_steps(repair, _EARLY_STEPS) if repair.iterations is None else repair


def _with_steps(repair: _Steps, iterations: int) -> _Steps:
    return dataclasses.replace(repair, iterations=iterations)


def _with_numbers(repair: _Steps, metric: metrics.Metric, outputs: tuple[int, ...]) -> Any:
    """The repair, with numbers for its metric and the shape of the outputs where it names none."""
    few = not isinstance(metric, metrics.Fisher) and math.prod(outputs[1:]) < _FEW_OUTPUTS
    numbers = _FOR_REGRESSION if few else _USUALLY
    return dataclasses.replace(repair, **{name: n for name, n in numbers.items() if getattr(repair, name) is None})


def own_metric(
    repair: _Steps,
    of_run: metrics.Metric,
    inputs: Inputs,
    targets: Float[Array, "samples *positions outputs"],
    weights: Weights | None = None,
) -> metrics.Metric:
    """The metric that a repair minimises the distance in where it has been given none: that of the run.

    Fisher's at a temperature of its own: that which ``metrics.temperature`` finds for some of the targets, or 1.

    Args:
        repair: one of this library's.
        of_run: the metric of the pruning that it is a part of.
        inputs: which lie on devices as the targets do.
        targets: of the repair, as outputs.
        weights: of samples or of their positions.
    """
    if not isinstance(of_run, metrics.Fisher):
        return of_run
    if isinstance(repair, Biases):
        return metrics.Fisher()
    size, blocks = max(_LOOKED_AT // math.prod(targets.shape[1:]), 1), _batches.blocks(inputs)

    def some(array):
        return _batches.every(jnp.asarray(array), size, jnp.int32(0), blocks)

    return metrics.Fisher(metrics.temperature(*jax.tree.map(some, (targets, weights))))


def movable(
    repair: Biases | Survivors,
    layers: Layers,
    params: Params,
    masks: Kernels,
    groups: Mapping[str, Group] = types.MappingProxyType({}),
) -> Free:
    """What a repair may move: by its path each leaf, and which of its entries.

    What is zero in other leaves because its unit was removed, as a scale, stays zero like a weight.

    Args:
        repair: biases, or every leaf of floating-point numbers but for what the masks removed.
        layers: of the network (``networks.layers``).
        masks: Kernels of booleans, True where the weight stays.
        groups: whose units can go, by name.

    Raises:
        ValueError: masks that do not fit, patterns that match nothing, nothing that could move, or batch statistics
            that would.
    """
    _checks.require_masks(params, masks)
    leaves, kept = _trees.by_path(params), _trees.by_path(masks)
    frozen = chosen(repair.frozen, list(leaves))
    biases, removed = {layer.bias for layer in layers}, of_removed_units(groups, leaves, kept)
    free = {
        path: kept.get(path, ~removed[path] if path in removed else jnp.ones_like(leaf, bool))
        for path, leaf in leaves.items()
        if path not in frozen and jnp.issubdtype(leaf.dtype, jnp.floating)
        if path in biases or isinstance(repair, Survivors)
    }
    moved = sorted(free.keys() & statistics_in(params))
    if moved:
        raise ValueError(
            f"the params hold batch statistics, '{moved[0]}', which a repair would move like weights. Keep them out of "
            "the params (Linen: networks.from_linen(module, variables=...); NNX: networks.from_nnx(module)), or still, "
            f"with repair.{type(repair).__name__}(frozen={tuple(moved)!r})"
        )
    if not free:
        what = "bias of a kernel" if isinstance(repair, Biases) else "parameter"
        raise ValueError(
            f"the network has no {what} that could move with frozen={repair.frozen!r}; give its layers biases of "
            "zeros, or let more of it move"
        )
    return free


def go_on(
    repair: Biases | Survivors,
    network: Network,
    state: State,
    masks: Kernels,
    inputs: Inputs,
    targets: Targets,
    *,
    metric: Metric = "euclidean",
    weights: Weights | None = None,
    exclude: Patterns = (),
) -> State:
    """Repairs, with the damping that earlier steps have found.

    Args:
        repair: what may move, and how far; of ``named``, which has looked at its numbers.
        state: params, damping, objective and number of steps so far.
        masks: Kernels of booleans, True where the weight stays.
        targets: what the outputs should be.
        metric: of the run.
        weights: of samples or of their positions.
        exclude: patterns of paths of leaves that keep every bit in pruning: their units are none that could go.

    Raises:
        ValueError: whatever of these can't be used, or an objective that overflows.
        MemoryError: a device that runs out of memory; it says which size to lower.
    """
    at, problem, metric, data, steps = _entered(repair, network, state.params, inputs, targets, metric, weights)
    groups = _door.units(at.network, at.params, at.inputs, exclude=exclude)
    free = movable(repair, at.layers, at.params, masks, groups)
    given = metric, state._replace(params=at.params), free, *data
    lower = f"lower batch_size={problem.batch_size} or curvature_samples={problem.curvature_samples}"
    try:
        with _memory.enough(f"{lower} of repair.{type(repair).__name__}"):
            found = gauss_newton.take_steps(problem, *given, steps=steps)
            _checks.require_finite(found.objective, "the objective of the repair")
    except (TypeError, ValueError) as error:
        why = next((words for cause, words in _NOT_DIFFERENTIABLE.items() if cause in str(error)), None)
        if why is None:
            raise
        raise ValueError(why) from error
    return found._replace(params=_trees.whole(found.params, at.static))


def gains(
    repair: Survivors,
    network: Network,
    state: State,
    masks: Kernels,
    inputs: Inputs,
    targets: Targets,
    *,
    metric: Metric = "euclidean",
    weights: Weights | None = None,
) -> dict[str, Array]:
    """By the path of each kernel that may move, what the return of each removed weight would gain: ``g² / 2(h + λ)``.

    Args:
        repair: whose objective it is.
        state: params, damping and number of steps so far.
        masks: Kernels of booleans, True where the weight stays.
        targets: what the outputs should be.
        metric: of the run.
        weights: of samples or of their positions.
    """
    at, problem, metric, data, _ = _entered(repair, network, state.params, inputs, targets, metric, weights)
    frozen = chosen(repair.frozen, list(_trees.by_path(at.params)))
    removed = {path: ~mask for path, mask in _trees.by_path(masks).items() if path not in frozen}
    return gauss_newton.gains(problem, metric, state._replace(params=at.params), removed, *data)


def _entered(repair: _Steps, network, params, inputs, targets, metric, weights):
    """The network as read, what is minimised, the metric, (inputs, targets as outputs, weights) and how many steps."""
    of_run = metrics.named(metric if repair.metric is None else repair.metric)
    given = {"metric": of_run, "targets": targets, "weights": weights}
    at = _door.enter(network, params, jnp.asarray(inputs), **given, need="any")
    expected = as_outputs(_batches.placed(targets), at.outputs.shape, of_run)
    metric = of_run if repair.metric is not None else own_metric(repair, of_run, at.inputs, expected, at.weights)
    full = _with_numbers(repair, metric, at.outputs.shape)
    sizes = full.products, full.batch_size, full.curvature_samples
    problem = Problem(in_loops(at.network), _batches.blocks(at.inputs), *map(int, sizes))
    data = _that_count(at.inputs, expected, at.weights, problem.blocks)
    return at, problem, metric, data, int(full.iterations)


def _that_count(inputs: Any, targets: Array, weights: Any, blocks: int) -> tuple[Any, Array, Any]:
    """Without the samples of weight 0, of which alone the curvature of a step might be; the mean stays that of all.

    Where samples lie on several devices they stay, as each device has as many of them.
    """
    counting, samples = _batches.counting(weights, blocks), inputs.shape[0]
    if counting is None:
        return inputs, targets, weights
    inputs, targets, weights = (jnp.asarray(array)[counting] for array in (inputs, targets, weights))
    return inputs, targets, weights * (len(counting) / samples)


def held(params: Params, masks: Kernels, moved: Params, groups: Mapping[str, Group]) -> Params:
    """What a repair of one's own gives, with removed weights and units at zero."""
    before, after = _trees.by_path(params), _trees.by_path(moved)
    kinds, found = (
        {path: (getattr(leaf, "shape", None), str(getattr(leaf, "dtype", ""))) for path, leaf in leaves.items()}
        for leaves in (before, after)
    )
    if jax.tree.structure(params) != jax.tree.structure(moved) or kinds != found:
        raise ValueError(f"the repair must give params like those it got, {kinds}; it gave {found}")
    _checks.require_finite(_trees.arrays(moved), "params of the repair")
    zeros = of_removed_units(groups, _trees.by_path(_trees.arrays(params)), _trees.by_path(masks))
    back = {path: jnp.where(zero, 0, after[path]) for path, zero in zeros.items()}
    return _trees.masked(_trees.replace(moved, back), masks)


def _alone(repair, network, params, masks, inputs, targets, weights) -> Params:
    """A repair that is no part of a run."""
    _checks.require_inputs(inputs)
    _checks.require_masks(params, masks)
    named(repair)
    start = gauss_newton.start(_trees.masked(params, masks), repair.damping)
    return go_on(repair, network, start, masks, inputs, targets, weights=weights).params
