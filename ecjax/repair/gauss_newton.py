"""Damped Gauss-Newton steps that bring a network's outputs back to their targets, moving only what may move.

With the gap r of the outputs to their targets, the outputs' Jacobian J with respect to the parameters that may move,
and the output metric M, one step solves

    (Jᵀ M J + λ) δ = Jᵀ r

by conjugate gradients, preconditioned by the diagonal, on ``jax.jvp`` and ``jax.vjp`` products, never a matrix, and
goes along δ as far as the objective falls: the step is halved until it does, and not taken if it never does. So the
objective never rises.

The objective is the mean over the samples of the metric's distance of the outputs to their targets, whose second
derivative at the outputs is M. The objective and its gradient are of all samples, batch after batch; the curvature JᵀMJ
is of a part of them, another one each step (Martens, "Deep learning via Hessian-free optimization", 2010).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.shard_alike import shard_alike
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from ecjax import _batches, _precision, _trees
from ecjax._types import Inputs, Network, Params
from ecjax.metrics import Metric, of_samples, scale_of

_HALVINGS = 12
_DAMPINGS = 1e-6, 1e6
_DRAWS = 4
_TINY = 1e-30

Free = Mapping[str, Bool[Array, "..."]]
Data = tuple[Inputs, Array, Array | None]  # inputs, targets, weights
_Step = dict[str, Array]


class State(NamedTuple):
    """Where the steps stand.

    Attributes:
        params: moved so far.
        damping: λ, as a multiple of the mean diagonal of JᵀMJ; adapted after every step.
        objective: the mean objective of all samples at these params; infinite before the first step.
        steps: how many were tried.
    """

    params: Params
    damping: Float[Array, ""]
    objective: Float[Array, ""]
    steps: Int[Array, ""]


class Problem(NamedTuple):
    """What is minimised, compiled once for each.

    Attributes:
        network: pure function ``(params, inputs) -> outputs``.
        blocks: how the samples lie on devices, see ``_batches``.
        products: products with the curvature in a step, one for each iteration of conjugate gradients.
        batch_size: samples at a time.
        curvature_samples: how many samples the curvature is of.
    """

    network: Network
    blocks: int
    products: int
    batch_size: int
    curvature_samples: int


def start(params: Params, damping: float | Float[Array, ""]) -> State:
    """The state before the first step, with λ as a multiple of the mean diagonal of JᵀMJ."""
    dtype = jnp.zeros(()).dtype
    return State(params, jnp.asarray(damping, dtype), jnp.asarray(jnp.inf, dtype), jnp.int32(0))


@_precision.compiled("problem", "steps")
def take_steps(
    problem: Problem,
    metric: Metric,
    state: State,
    free: Free,
    inputs: Inputs,
    targets: Float[Array, "samples *positions outputs"],
    weights: Float[Array, "samples ..."] | None = None,
    *,
    steps: int,
) -> State:
    """Takes several damped steps, each a solution of ``(JᵀMJ + λ) δ = Jᵀr`` along which the objective falls.

    Args:
        problem: the network, and sizes.
        state: where to start.
        free: by its path, each leaf of the params that may move, and which of its entries.
        targets: one row for each sample, or each of its positions.
        weights: how much each of these counts; 1 if None.
        steps: how many.
    """

    def one_step(state, _):
        return _step(problem, metric, state, free, (inputs, targets, weights)), None

    return lax.scan(one_step, state, length=steps)[0]


@_precision.compiled("problem")
def gains(
    problem: Problem,
    metric: Metric,
    state: State,
    removed: Free,
    inputs: Inputs,
    targets: Float[Array, "samples *positions outputs"],
    weights: Float[Array, "samples ..."] | None = None,
) -> dict[str, Float[Array, "..."]]:
    """By how much the objective would fall if one removed weight came back alone: ``g² / 2(h + λ)``.

    With its slope g and the diagonal h of JᵀMJ at weight 0, and λ as in a step. All in one pass for g, and a few
    transposed products for h.

    Args:
        problem: the network, and sizes.
        state: where the weights are 0.
        removed: by their path, the leaves of which some entries are removed, and which.
        targets: one row for each sample, or each of its positions.
        weights: how much each of these counts; 1 if None.

    Returns:
        By path, an array like each of these leaves; 0 for what is not removed.
    """
    data = inputs, targets, weights
    around = _around(state, removed)
    _, gradient = _value_and_gradient(problem, metric, around.moved, around.at_rest, data, around.alike)
    _, diagonal = _curvature(problem, metric, state, around, data)
    damping = state.damping * _mean(diagonal, removed)
    return {path: slope**2 / (2 * (diagonal[path] + damping + _TINY)) for path, slope in gradient.items()}


class _Around(NamedTuple):
    """Moves of what may move, in the precision of the damping: none, what they make of the params, and their layout."""

    at_rest: _Step
    moved: Callable[[_Step], Params]
    alike: Callable[[_Step], _Step]


def _around(state: State, free: Free) -> _Around:
    here = _trees.by_path(state.params)

    def alike(step: _Step) -> _Step:
        """Spread over devices as the params are: of each of these vectors a device holds no more than of them."""
        return {path: shard_alike(here[path], leaf)[1] for path, leaf in step.items()}

    def moved(step: _Step) -> Params:
        moves = {path: jnp.where(free[path], step[path], 0).astype(here[path].dtype) for path in free}
        return _trees.replace(state.params, {path: here[path] + move for path, move in moves.items()})

    at_rest = {path: jnp.zeros(leaf.shape, state.damping.dtype) for path, leaf in here.items() if path in free}
    return _Around(alike(at_rest), moved, alike)


def _step(problem: Problem, metric: Metric, state: State, free: Free, data: Data) -> State:
    around = at_rest, moved, alike = _around(state, free)

    def value(step: _Step) -> Array:
        return _mean_objective(problem, metric, moved(step), data)

    before, gradient = _value_and_gradient(problem, metric, moved, at_rest, data, alike)
    curvature, diagonal = _curvature(problem, metric, state, around, data)
    damping = state.damping * _mean(diagonal, free)
    scales = jax.tree.map(lambda d: d + damping + _TINY, diagonal)

    def damped(step):
        return jax.tree.map(lambda product, s: product + damping * s, curvature(step), step)

    descent = jax.tree.map(jnp.negative, gradient)
    direction, residual = _conjugate_gradients(damped, scales, descent, at_rest, problem.products)
    # ½δᵀAδ − bᵀδ with Aδ = b − residual: what the quadratic says the whole step gains.
    predicted = -(_dot(direction, descent) + _dot(direction, residual)) / 2
    length, after = _backtrack(lambda length: value(jax.tree.map(lambda d: length * d, direction)), before)
    gained = _ratio(after - before, predicted)
    return State(
        # A step that is not taken may hold NaN.
        params=moved(jax.tree.map(lambda d: jnp.where(length > 0, length * d, 0), direction)),
        damping=_adapted(state.damping, length, gained),
        objective=after.astype(state.objective.dtype),
        steps=state.steps + 1,
    )


def _value_and_gradient(problem, metric, moved: Callable, at_rest: _Step, data: Data, alike: Callable):
    samples, dtype = data[0].shape[0], data[1].dtype

    def add(total, index):
        def of_batch(step):
            return _of_batch(problem, metric, moved(step), data, index)

        objective, slopes = jax.value_and_grad(of_batch)(at_rest)
        return jax.tree.map(jnp.add, total, (objective, alike(slopes))), None

    number = _batches.count(samples, problem.batch_size, problem.blocks)
    total, _ = lax.scan(add, (jnp.zeros((), dtype), at_rest), jnp.arange(number))
    return jax.tree.map(lambda leaf: leaf / samples, total)


def _of_batch(problem: Problem, metric: Metric, params: Params, data: Data, index) -> Array:
    """The sum of the distances of one batch's outputs to their targets, in the precision of the targets."""
    (batch, expected, weights), counted = _batches.take(data, index, problem.batch_size, problem.blocks)
    distances = metric.distance(problem.network(params, batch).astype(expected.dtype), expected)
    return jnp.where(counted, of_samples(distances, weights), 0).sum()


def _mean_objective(problem: Problem, metric: Metric, params: Params, data: Data) -> Array:
    samples, dtype = data[0].shape[0], data[1].dtype

    def add(total, index):
        return total + _of_batch(problem, metric, params, data, index), None

    number = _batches.count(samples, problem.batch_size, problem.blocks)
    return lax.scan(add, jnp.zeros((), dtype), jnp.arange(number))[0] / samples


def _curvature(
    problem: Problem, metric: Metric, state: State, around: _Around, data: Data
) -> tuple[Callable[[_Step], _Step], _Step]:
    """The product ``v -> JᵀMJ v / samples``, for which the network is linearised once, and its diagonal.

    Of a part of the samples, others in each step. The diagonal is estimated by random signs c, one for each sample and
    output: ``E[(JᵀRᵀc)²]`` (Bekas, Kokiopoulou, Saad 2007). It only sets scales, so a few draws do, and any others
    would do as well.
    """
    at_rest, moved, alike = around
    inputs, weights = jax.tree.map(
        lambda array: _batches.every(array, problem.curvature_samples, state.steps, problem.blocks), (data[0], data[2])
    )
    outputs, push = jax.linearize(lambda step: problem.network(moved(step), inputs), at_rest)
    pull = jax.linear_transpose(push, at_rest)
    scale = jnp.ones((), outputs.dtype) if weights is None else scale_of(weights, outputs)

    def product(step):
        (pulled,) = pull((scale**2 * metric.product(outputs, push(step))).astype(outputs.dtype))
        return jax.tree.map(lambda leaf: leaf / inputs.shape[0], alike(pulled))

    def add_squares(total, key):
        signs = _signs(key, outputs)
        (pulled,) = pull((scale * metric.factor(outputs, signs)).astype(outputs.dtype))
        return jax.tree.map(lambda t, p: t + p**2 / (inputs.shape[0] * _DRAWS), total, alike(pulled)), None

    diagonal, _ = lax.scan(add_squares, at_rest, jax.random.split(jax.random.key(state.steps), _DRAWS))
    return product, diagonal


def _signs(key: PRNGKeyArray, like: Array) -> Array:
    """Random signs of a bit each: with 32, as ``jax.random.rademacher`` draws them, they take five such arrays."""
    *rows, columns = like.shape
    drawn = jax.random.bits(key, (*rows, -(-columns // 8)), jnp.uint8)
    return 2 * jnp.unpackbits(drawn, axis=-1, count=columns).astype(like.dtype) - 1


def _conjugate_gradients(
    product: Callable[[_Step], _Step], scales: _Step, right: _Step, at_rest: _Step, iterations: int
) -> tuple[_Step, _Step]:
    """An approximate solution of ``product(x) = right`` from rest, preconditioned by scales, and its residual."""

    def iterate(carry, _):
        solution, residual, direction, squared = carry
        image = product(direction)
        length = _ratio(squared, _dot(direction, image))
        solution = jax.tree.map(lambda x, d: x + length * d, solution, direction)
        residual = jax.tree.map(lambda r, i: r - length * i, residual, image)
        scaled = jax.tree.map(jnp.divide, residual, scales)
        new = _dot(residual, scaled)
        direction = jax.tree.map(lambda r, d: r + _ratio(new, squared) * d, scaled, direction)
        return (solution, residual, direction, new), None

    scaled = jax.tree.map(jnp.divide, right, scales)
    start = at_rest, right, scaled, _dot(right, scaled)
    (solution, residual, *_), _ = lax.scan(iterate, start, length=iterations)
    return solution, residual


def _backtrack(value: Callable[[Array], Array], before: Array) -> tuple[Array, Array]:
    """The first of the lengths 1, ½, ¼, … at which the value falls, or 0; and the value there."""

    def higher(carry):
        _, after, halvings = carry
        return ~(after < before) & (halvings < _HALVINGS)

    def halve(carry):
        length, _, halvings = carry
        return length / 2, value(length / 2), halvings + 1

    start = jnp.asarray(2, before.dtype), jnp.full_like(before, jnp.inf), -1
    length, after, _ = lax.while_loop(higher, halve, start)
    return jnp.where(after < before, length, 0), jnp.where(after < before, after, before)


def _adapted(damping: Array, length: Array, gained: Array) -> Array:
    """Levenberg's and Marquardt's rule: trust the quadratic more when it was right, less when it was not."""
    trusted = (length == 1) & (gained > 0.75)
    doubted = (length < 1) | (gained < 0.25)
    factor = jnp.where(trusted, 0.5, jnp.where(doubted, 3.0, 1.0)).astype(damping.dtype)
    return jnp.clip(damping * factor, *_DAMPINGS)


def _dot(first: _Step, second: _Step) -> Array:
    # Not vdot, which makes one axis of all, and brings leaves that are spread over devices together for it.
    return _sum(jnp.tensordot(leaf, second[path], leaf.ndim) for path, leaf in first.items())


def _mean(diagonal: _Step, free: Free) -> Array:
    """The mean over all entries that may move."""
    return _ratio(_sum(leaf.sum() for leaf in diagonal.values()), _sum(jnp.sum(leaf) for leaf in free.values()))


def _sum(numbers: Iterable[Array]) -> Array:
    return jnp.asarray(sum(numbers))


def _ratio(numerator: Array, denominator: Array) -> Array:
    """The quotient, and 0 where there is nothing to divide by."""
    return jnp.where(denominator != 0, numerator / jnp.where(denominator != 0, denominator, 1), 0)
