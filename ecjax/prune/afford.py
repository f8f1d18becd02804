"""The sparsest network that is good enough, by a number of one's own: ``prune.afford``."""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from ecjax import _checks, _progress
from ecjax._types import Inputs, Kernels, Metric, Network, Params, Patterns, Sparsities, Targets, Weights
from ecjax.graph import tables
from ecjax.prune import patterns
from ecjax.prune.masks import require_scope, sparsity
from ecjax.repair import Repair
from ecjax.score.criteria import Criterion
from ecjax.staged import State, require_read, start, step

_SPARSE = 0.9  # where pruning makes nothing better
_LOSS = "What is left has more than the dense network: does evaluate give a loss? Higher is better, so give minus it."


class Tried(NamedTuple):
    """One network that was evaluated.

    Attributes:
        sparsity: of it, ``prune.sparsity`` of its masks.
        value: what ``evaluate`` gave.
        objective: what the repair has left of the mean distance to its targets; infinite without one, and before any.
        affordable: whether the value is no more than ``most_lost`` below the dense network's.

    Example:
        >>> prune.Tried(sparsity=0.9, value=0.96, objective=0.01, affordable=True).value
        0.96
    """

    sparsity: float
    value: float
    objective: float
    affordable: bool


class Afforded(NamedTuple):
    """The sparsest affordable network, and all that was tried; it prints as a table.

    Attributes:
        params: pruned, with removed weights exactly 0.
        masks: Kernels of booleans, True where the weight stays.
        found: its sparsity and value.
        least: the least value that is affordable.
        curve: everything that was tried, from the dense network to the sparsest.

    Example:
        >>> tried = (prune.Tried(0.0, 0.97, float("inf"), True), prune.Tried(0.9, 0.96, 0.01, True))
        >>> prune.Afforded(params, masks=None, found=tried[1], least=0.95, curve=tried)
        sparsity  value  objective  affordable
        ──────────────────────────────────────
        0.0000    0.97              yes
        0.9000    0.96   0.01       yes
        Sparsity 0.9000 has 0.96; 0.95 is affordable, the dense network has 0.97.
        This took 1 stage and 2 evaluations. Nothing sparser was tried: raise sparsest.
    """

    params: Params
    masks: Kernels
    found: Tried
    least: float
    curve: tuple[Tried, ...]

    @property
    def stages(self) -> int:
        """How many times weights were scored, removed and repaired."""
        return len(self.curve) - 1

    @property
    def evaluations(self) -> int:
        """How many times ``evaluate`` was called."""
        return len(self.curve)

    def __repr__(self) -> str:
        """The table, and what was found at what price."""
        return "\n".join([tables.as_text(_cells(self)), *_notes(self)])

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """The same in Jupyter."""
        return tables.as_html(_cells(self), _notes(self))


class _Point(NamedTuple):
    """A network that was tried, and how far towards the sparsest it is."""

    share: float
    state: State
    tried: Tried


def afford(
    network: Network,
    params: Params,
    inputs: Inputs,
    evaluate: Callable[[Params], Any],
    *,
    most_lost: float | int,
    sparsest: Sparsities = 0.99,
    stages: int = 12,
    halvings: int = 4,
    criterion: Criterion | str | None = None,
    repair: Repair | str | None = "survivors",
    metric: Metric = "euclidean",
    targets: Targets | None = None,
    weights: Weights | None = None,
    scope: str = "network",
    exclude: Patterns = (),
    key: PRNGKeyArray | None = None,
    progress: bool | Callable[[Tried], None] | None = None,
) -> Afforded:
    """The sparsest network of a staged run that ``evaluate`` finds no more than ``most_lost`` below the dense one.

    The run goes up to ``sparsest`` along the cubic of ``staged``, and each stage is evaluated. From the last affordable
    one it goes on in smaller steps: the gap to the stage after is halved again and again, and a step that is affordable
    is where the next one starts. Nothing that was tried and is sparser than what comes back is affordable; where not
    even the smallest step is, the dense network comes back as it is. Values are compared, so this does not go through
    ``jit`` or ``vmap``. Source: this library's own.

    Args:
        evaluate: ``params -> number``, higher is better: the accuracy, or minus the loss, on validation data. Not on
            test data: the sparsity is chosen by it, so it flatters what is found.
        most_lost: how much lower than the dense network's the number may be.
        sparsest: where the run ends; a number, or one for each pattern of paths, as in ``one_shot``: then all of them
            grow alike.
        stages: of the run, evaluated one by one; the params of all are kept until the end.
        halvings: of the gap after the last affordable stage, each with a stage and an evaluation; fewer where no
            weight lies in between.
        criterion: as for ``staged``, like repair, metric and targets.
        repair: of every stage.
        targets: of the repair.
        scope: where weights compete: "network", "layer" or "neuron".
        key: random key, for criteria that draw.
        progress: True for a bar, as for ``staged``; or a function called with each network tried, the dense one first.

    Raises:
        ValueError: bad input, as ``staged`` says; an ``evaluate`` that gives NaN or no number; ``most_lost`` below 0,
            or of 1 and more where ``evaluate`` gives a fraction.

    Example:
        >>> held_out = jax.random.normal(jax.random.key(9), (100, 4))
        >>> right = held_out[:, 0] > held_out[:, 1]
        >>> accuracy = lambda params: (network(params, held_out).argmax(-1) == right).mean()
        >>> how = {"stages": 3, "halvings": 2, "metric": "fisher"}
        >>> afforded = prune.afford(network, params, inputs, accuracy, most_lost=0.02, **how)
        >>> bool(accuracy(afforded.params) >= accuracy(params) - 0.02)
        True
        >>> afforded.found.sparsity == prune.sparsity(afforded.masks), afforded.stages, afforded.evaluations
        (True, 5, 6)
    """
    _require(evaluate, most_lost, sparsest, scope, progress)
    _checks.require_positive(stages, "stages")
    _checks.require_positive(halvings, "halvings")
    of_run = {"metric": metric, "weights": weights, "exclude": exclude, "key": key}
    require_read(network, params, inputs, criterion=criterion, repair=repair, **of_run)
    state = start(network, params, inputs, repair=repair, targets=targets, **of_run)
    dense = Tried(0.0, _value(evaluate, params, "the dense network"), math.inf, True)
    if not math.isfinite(dense.value):
        raise ValueError(f"evaluate gave {dense.value} for the dense network; nothing is a little below that")
    least = dense.value - most_lost
    if 0 < dense.value <= 1 <= most_lost:
        raise ValueError(
            f"evaluate gave {dense.value:.4g} for the dense network, so with most_lost={most_lost} nothing from 0 to 1 "
            "is too low; give a fraction, 0.01 for one point, or let evaluate give percent"
        )

    def go_on(before: _Point, share: float) -> _Point:
        reached = patterns.towards(sparsest, share)
        state = step(network, before.state, inputs, reached, criterion=criterion, repair=repair, scope=scope)
        removed = sparsity(state.masks)
        value = _value(evaluate, state.params, f"sparsity {removed:.4f}")
        tried = Tried(removed, value, float(state.objective), value >= least)
        tell(tried)
        return _Point(share, state, tried)

    first, most = _Point(0.0, state, dense), 1 + int(stages) + int(halvings)
    with _progress.told(progress, "network", most, ("sparsity", "value", "affordable")) as tell:
        tell(dense)
        best, above, of_stages = _in_stages(go_on, first, int(stages))
        best, between = (best, []) if above is None else _halved(go_on, best, above, int(halvings))
    masks = best.state.masks
    if best is first:  # of the kernels that the sparsest has a number for, and no others
        masks = jax.tree.map(jnp.ones_like, of_stages[0].state.masks)
    curve = sorted([dense, *(point.tried for point in of_stages + between)])
    found = Afforded(best.state.params, masks, best.tried, least, tuple(curve))
    if _may_be_loss(found):
        warnings.warn(_LOSS, stacklevel=2)
    return found


def _in_stages(
    go_on: Callable[[_Point, float], _Point], first: _Point, stages: int
) -> tuple[_Point, _Point | None, list[_Point]]:
    """A staged run: its last affordable network, the one a stage after it if there is one, and all of them."""
    points = [first]
    for number in range(1, stages + 1):
        points.append(go_on(points[-1], 1 - (1 - number / stages) ** 3))
    last = max(number for number, point in enumerate(points) if point.tried.affordable)
    return points[last], points[last + 1] if last < stages else None, points[1:]


def _halved(
    go_on: Callable[[_Point, float], _Point], low: _Point, high: _Point, halvings: int
) -> tuple[_Point, list[_Point]]:
    """The sparsest affordable network between one that is and one that is not, by bisection; and all it tried."""
    points = []
    while len(points) < halvings and not _are_next(low, high):
        points.append(go_on(low, (low.share + high.share) / 2))
        low, high = (points[-1], high) if points[-1].tried.affordable else (low, points[-1])
    return low, points


def _require(evaluate: Any, most_lost: Any, sparsest: Any, scope: Any, progress: Any) -> None:
    """Raises a ValueError for what is no evaluation, loss, sparsity or scope; errors are those of ``afford``."""
    if not callable(evaluate):
        raise ValueError(
            f"evaluate is {evaluate!r}; it must be a function of params, which gives a number, higher is better"
        )
    _progress.require(progress)
    if isinstance(most_lost, bool) or not isinstance(most_lost, float | int | np.number) or not 0 <= most_lost < np.inf:
        raise ValueError(
            f"most_lost is {most_lost!r}; it must be a number of at least 0, in the units of evaluate: how much lower "
            "than for the dense network it may be"
        )
    if isinstance(scope, tuple):
        raise ValueError(f"scope {scope} is of one sparsity, and afford looks for one: use staged")
    require_scope(scope, sparsest)


def _value(evaluate: Callable[[Params], Any], params: Params, of: str) -> float:
    found = evaluate(params)
    if not _checks.are_known(found):
        raise ValueError("afford compares what evaluate gives, which can't be seen under jit or vmap; call it outside")
    try:
        value = float(found)
    except (TypeError, ValueError) as error:
        what = f"an array of shape {found.shape}" if hasattr(found, "shape") else f"a {type(found).__name__}"
        raise ValueError(f"evaluate gave {what} for {of}; it must give one number, higher is better") from error
    if math.isnan(value):
        raise ValueError(
            f"evaluate gave NaN for {of}, which is neither more nor less than what the dense network has; let it give "
            "minus infinity for a network that is not to be afforded"
        )
    return value


def _are_next(low: _Point, high: _Point) -> bool:
    """Whether no number of weights lies between those that two networks have lost."""
    weights = sum(mask.size for mask in jax.tree.leaves(high.state.masks))
    return round((high.tried.sparsity - low.tried.sparsity) * weights) <= 1


def _cells(afforded: Afforded) -> list[tuple[str, ...]]:
    rows = [("sparsity", "value", "objective", "affordable")]
    for tried in afforded.curve:
        objective = f"{tried.objective:.3g}" if math.isfinite(tried.objective) else ""
        rows.append((f"{tried.sparsity:.4f}", f"{tried.value:.4g}", objective, "yes" if tried.affordable else "no"))
    return rows


def _may_be_loss(afforded: Afforded) -> bool:
    dense, found = afforded.curve[0], afforded.found
    return found.value > dense.value + (dense.value - afforded.least) and found.sparsity > _SPARSE


def _notes(afforded: Afforded) -> list[str]:
    found, dense = afforded.found, afforded.curve[0]
    what = f"Sparsity {found.sparsity:.4f} has {found.value:.4g}" if found.sparsity else "No weight may go"
    stages = f"{afforded.stages} stage{'' if afforded.stages == 1 else 's'}"
    price = f"This took {stages} and {afforded.evaluations} evaluations."
    if found.sparsity == afforded.curve[-1].sparsity:
        price += " Nothing sparser was tried: raise sparsest."
    if _may_be_loss(afforded):
        price += f" {_LOSS}"
    return [f"{what}; {afforded.least:.4g} is affordable, the dense network has {dense.value:.4g}.", price]
