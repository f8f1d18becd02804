"""How a change in the network's outputs is measured: ``δᵀ M δ`` for each sample, with M the output metric.

``Euclidean()``, or "euclidean": M = I, the squared change in the raw outputs.
``Fisher(temperature=T)``, or "fisher" for T = 1: M = (diag(p) − ppᵀ) / T² with p = softmax(outputs / T), the Fisher
information of a classifier's logits. Half of ``δᵀ M δ`` is the Kullback-Leibler divergence between the two predictions,
to second order. Above 1, a temperature sees more of what a classifier knows than its first choice (Hinton, Vinyals,
Dean, arXiv:1503.02531).

Outputs of more axes than (samples, K) have positions between the two; they add up. A metric sees the last axis alone.

A metric of one's own is a pytree with the three methods of ``Metric``. Its arrays are leaves, so that they may change
without compiling anew:

    >>> class Weighted(NamedTuple):
    ...     '''``Σ_k w_k δ_k²``: some outputs count more than others.'''
    ...
    ...     weights: jax.Array
    ...
    ...     def factor(self, outputs, coefficients):
    ...         return jnp.sqrt(self.weights) * coefficients
    ...
    ...     def product(self, outputs, change):
    ...         return self.weights * change
    ...
    ...     def distance(self, outputs, targets):
    ...         return (self.weights * (outputs - targets) ** 2).sum(-1) / 2
    >>> first_counts_more = Weighted(jnp.array([10.0, 1.0]))
    >>> pruned = prune.staged(network, params, inputs, sparsity=0.5, stages=2, metric=first_counts_more)
    >>> prune.sparsity(pruned.masks)
    0.5
"""

import dataclasses
import functools
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ecjax import _checks, _temperature

__all__ = ["METRICS", "Euclidean", "Fisher", "Metric", "named", "squared_norm", "temperature"]

Outputs = Float[Array, "samples *positions outputs"]


@runtime_checkable
class Metric(Protocol):
    """What a metric offers: for each sample a factor R of M with ``RᵀR = M``, M itself, and a distance to minimise.

    Example:
        >>> metric = metrics.Fisher(temperature=2.0)
        >>> metric.product(jnp.zeros((1, 2)), jnp.array([[1.0, -1.0]])).tolist()
        [[0.125, -0.125]]
    """

    def factor(self, outputs: Outputs, coefficients: Outputs) -> Outputs:
        """``Rᵀ c``: the rows of R, taken at the outputs and combined with coefficients c, as many as outputs.

        A unit vector c picks one row; random signs c make a probe, as ``E[Rᵀc cᵀR] = M`` (Hutchinson, Communications in
        Statistics 18, 1989).
        """
        ...

    def product(self, outputs: Outputs, change: Outputs) -> Outputs:
        """``M δ``, with M taken at the outputs."""
        ...

    def distance(self, outputs: Outputs, targets: Outputs) -> Float[Array, "samples *positions"]:
        """What a repair minimises: at least 0, and where the outputs are the targets its second derivative is M."""
        ...


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Euclidean:
    """M = I: the squared change in raw outputs, for regression.

    Example:
        >>> metrics.Euclidean().distance(jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2))).tolist()
        [2.5]
    """

    def factor(self, outputs: Outputs, coefficients: Outputs) -> Outputs:  # noqa: ARG002, the outputs do not matter
        """``c``."""
        return coefficients

    def product(self, outputs: Outputs, change: Outputs) -> Outputs:  # noqa: ARG002
        """``δ``."""
        return change

    def distance(self, outputs: Outputs, targets: Outputs) -> Float[Array, "samples *positions"]:
        """``½ Σ_k (y_k − t_k)²``."""
        return jnp.sum((outputs - targets) ** 2, -1) / 2


@functools.partial(jax.tree_util.register_dataclass, data_fields=["temperature"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Fisher:
    """M = (diag(p) − ppᵀ) / T² with p = softmax(y / T): the Fisher information of the logits y of a classifier.

    Attributes:
        temperature: T, above 0; a leaf, so that another one compiles nothing anew.

    Example:
        >>> rows = metrics.Fisher().factor(jnp.zeros((2, 2)), jnp.eye(2))  # each of one sample
        >>> (rows.T @ rows).round(6).tolist()  # diag(p) − ppᵀ
        [[0.25, -0.25], [-0.25, 0.25]]
    """

    temperature: Any = 1.0

    def _per_temperature(self, values: Outputs) -> Outputs:
        return values / jnp.asarray(self.temperature, values.dtype)  # in the dtype of the network, whatever T's is

    def factor(self, outputs: Outputs, coefficients: Outputs) -> Outputs:
        """The rows ``√p_k (e_k − p) / T``, combined."""
        probabilities = jax.nn.softmax(self._per_temperature(outputs))
        weighted = jnp.sqrt(probabilities) * self._per_temperature(coefficients)
        return weighted - probabilities * weighted.sum(-1, keepdims=True)

    def product(self, outputs: Outputs, change: Outputs) -> Outputs:
        """``p (δ − Σ_k p_k δ_k) / T²``, entry by entry."""
        probabilities = jax.nn.softmax(self._per_temperature(outputs))
        weighted = probabilities * self._per_temperature(change)
        return self._per_temperature(weighted - probabilities * weighted.sum(-1, keepdims=True))

    def distance(self, outputs: Outputs, targets: Outputs) -> Float[Array, "samples *positions"]:
        """``KL(softmax(t / T) || softmax(y / T))``."""
        expected, found = (jax.nn.log_softmax(self._per_temperature(logits)) for logits in (targets, outputs))
        # The logits of what is never expected, of another label, are minus infinity.
        return jnp.sum(jnp.where(expected > -jnp.inf, jnp.exp(expected) * (expected - found), 0), -1)


def temperature(
    outputs: Float[Array | np.ndarray, "samples *positions outputs"],
    weights: Float[Array | np.ndarray, "samples ..."] | None = None,
    *,
    entropy: float | int = 0.3,
    least: float | int = 1.0,
) -> Float[Array, ""]:
    """The temperature at which predictions say enough: ``min T ≥ T₀ : mean H(softmax(y / T)) ≥ s log K``.

    A network that is sure of nearly every sample tells little but its first choices; a higher temperature shows what
    else it knows. The entropies H rise with T, so this is a bisection. Of labels as logits, minus infinity but for one,
    it is 1: K counts the outputs that are not masked, which are those at most 10,000 below the largest.

    The survivors' repair takes it where it is given no metric. On held-out images of MNIST, pruned to 0.98 without
    labels, three networks 784-300-100-10 (five epochs of Adam) lost 1.22, 0.93 and 0.85 points at T = 1, 2 and 4, and
    0.76 by the rule, which says about 3; three 784-40-20-10 (plain SGD, 50,000 images) 1.58, 1.97 and 1.88, and 1.74 by
    the rule, about 1.8 (``python -m experiments.frontier --networks large modest --sparsities 0.98 --validation
    --temperature 2``). A narrow residual convnet (dense 98.58 %) kept 96.73, 97.50, 97.73 and 97.77 % at a sparsity of
    0.9 at T = 1, 2, 4 and 8, and 97.56 at the rule's 2.5; at 0.95 95.65, 96.37, 96.80 and 96.25, and 96.72.

    Of text, where much is open, it says 1. The next of 1,000 words by an MLP, pruned to 0.8 (dense 3.317 nats), had
    3.332, 3.380 and 3.455 nats at 1, 2 and 4, the next of 500 pairs of characters (3.243) 3.687, 3.764 and 3.929, the
    next of 65 characters (1.608, mean of two seeds) 1.942 and 1.943 at 1 and 2. A character transformer (1.527) alone
    had 1.769, 1.751, 1.733, 1.724 and 1.731 at 1, 2, 3, 4 and 8, so that 4 is better there.

    Args:
        outputs: y, the dense network's logits.
        weights: how much each sample or position counts; 1 if None.
        entropy: s, the share of the largest entropy there is, between 0 and 1.
        least: T₀, however much the predictions say.

    Returns:
        T, a number that may be traced, for ``metrics.Fisher``.

    Raises:
        ValueError: a share that is not between 0 and 1; labels or probabilities in place of logits; NaN.

    Example:
        >>> sure = 20 * jax.random.normal(jax.random.key(0), (100, 10))
        >>> round(float(metrics.temperature(sure)), 1), round(float(metrics.temperature(sure / 100)), 1)
        (4.3, 1.0)
        >>> how = repair.Survivors(metric=metrics.Fisher(metrics.temperature(network(params, inputs), entropy=0.5)))
    """
    if not (_checks.is_number(entropy) and 0 < entropy < 1):
        raise ValueError(f"entropy is {entropy!r}; it must be between 0 and 1, a share of the largest there is")
    if np.ndim(outputs) < 2 or not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(
            f"outputs are {outputs.dtype} of shape {np.shape(outputs)}; they must be logits, a row for each sample"
        )
    _checks.require_above_zero(least, "least")
    logits = jnp.asarray(outputs)
    _checks.require_known(logits)
    probabilities = _checks.are_probabilities(logits)
    if _checks.are_known(probabilities) and probabilities:
        raise ValueError("outputs are at least 0 and sum to one: probabilities; give logits, as jnp.log(probabilities)")
    return _temperature.least(logits, weights, entropy, float(least))


METRICS = {"euclidean": Euclidean(), "fisher": Fisher()}


def named(metric: Any) -> Metric:
    """The metric that a name stands for, or the metric itself.

    Raises:
        ValueError: another name, what is no metric, or a temperature that is not above 0.

    Example:
        >>> metrics.named("fisher")
        Fisher(temperature=1.0)
        >>> metrics.named("manhattan")
        Traceback (most recent call last):
        ValueError: metric is 'manhattan'; it must be one of 'euclidean', 'fisher', or a metric such as ...
    """
    found: Any = METRICS.get(metric) if isinstance(metric, str) else metric
    missing = [name for name in ("factor", "product", "distance") if not callable(getattr(found, name, None))]
    if missing or isinstance(found, type):
        called = f"{metric.__name__}, a class; call it" if isinstance(metric, type) else repr(metric)
        raise ValueError(
            f"metric is {called}; it must be one of {', '.join(map(repr, METRICS))}, or a metric such as "
            "metrics.Fisher(temperature=2.0), with the methods factor, product and distance"
        )
    numbers = Array | np.ndarray | np.generic | float | int
    if not all(isinstance(leaf, numbers) for leaf in jax.tree.leaves(found)):
        raise ValueError(
            f"metric is {metric!r}, which is no pytree of numbers; make it a NamedTuple, or register its class with "
            "jax.tree_util.register_dataclass"
        )
    if isinstance(found, Fisher):
        if found.temperature is None or jnp.shape(found.temperature):
            raise ValueError(f"temperature is {found.temperature!r}; it must be one number above 0")
        _checks.require_above_zero(found.temperature, "temperature")
    return found


def require_outputs(metric: Metric, outputs: jax.ShapeDtypeStruct, few: Outputs | None) -> None:
    """Raises a ValueError unless a metric suits the outputs of a network.

    Args:
        metric: a metric, not its name.
        outputs: their shape and dtype.
        few: a few of them; None where values can't be seen.
    """
    if isinstance(metric, Fisher) and outputs.shape[-1] == 1:
        raise ValueError(
            "the metric is Fisher's, and the network has one output: the softmax of one logit is 1 whatever it is, so "
            "every importance would be 0. Take metric='euclidean', or give the network two logits (0 and this one)"
        )
    if isinstance(metric, Fisher) and few is not None and _checks.are_probabilities(few):
        raise ValueError(
            "the metric is Fisher's, which takes logits, and the network ends in a softmax: its outputs are at least 0 "
            "and sum to one. Leave the softmax out of the network, or take metric='euclidean'"
        )
    if not isinstance(metric, Euclidean | Fisher):
        _require_methods(metric, outputs)
    if few is None or few.size == 0 or isinstance(metric, Euclidean):
        return
    few = few.astype(jnp.promote_types(few.dtype, jnp.float32))
    change = jnp.cos(jnp.arange(few.size, dtype=few.dtype)).reshape(few.shape)  # any that is not special
    seen = metric.product(few, change)
    if not seen.any():
        raise ValueError(
            f"the metric {type(metric).__name__} sees no change in the outputs of this network: its product is 0, and "
            "so would every importance be. Fisher's is where logits are so far apart that the softmax is 0 or 1; take "
            "a higher temperature, or metric='euclidean'"
        )
    if not isinstance(metric, Fisher):
        _require_consistent(metric, few, change, seen)


def _require_methods(metric: Metric, outputs: jax.ShapeDtypeStruct) -> None:
    """Raises a ValueError unless the three methods take and give the right shapes."""
    kind = type(metric).__name__
    outputs = outputs.update(shape=(outputs.shape[0] + 1, *outputs.shape[1:]))  # it must take any number of samples
    for name, expected in (("factor", outputs.shape), ("product", outputs.shape), ("distance", outputs.shape[:-1])):
        try:
            found = getattr(jax.eval_shape(getattr(metric, name), outputs, outputs), "shape", None)
        except Exception as error:
            raise ValueError(f"{kind}.{name} does not take outputs of shape {outputs.shape}: {error}") from error
        if found != expected:
            raise ValueError(
                f"{kind}.{name} gives {'no array' if found is None else f'shape {found}'} for outputs of shape "
                f"{outputs.shape}; it must give {expected}"
                + (", one for each sample (and position)" if name == "distance" else "")
            )


def _require_consistent(metric: Metric, outputs: Outputs, change: Outputs, seen: Outputs) -> None:
    """Raises a ValueError unless factor, product and distance belong together.

    Args:
        metric: one of the user's own.
        outputs: a few.
        change: δ, of these.
        seen: M δ, what the product says.
    """
    kind = type(metric).__name__

    def far(other):
        tolerance = 1e-2 * float(jnp.abs(seen).max())
        return not jnp.allclose(other, seen, rtol=1e-2, atol=tolerance, equal_nan=True)

    (rows,) = jax.linear_transpose(lambda coefficients: metric.factor(outputs, coefficients), change)(change)  # R δ
    if far(metric.factor(outputs, rows)):
        raise ValueError(
            f"factor and product of {kind} do not belong together: with R the matrix whose transpose factor "
            "applies, product must apply RᵀR"
        )
    slope = jax.grad(lambda changed: metric.distance(changed, outputs).sum())
    if far(jax.jvp(slope, (outputs,), (change,))[1]):
        raise ValueError(
            f"distance and product of {kind} do not belong together: where the outputs are the targets, the second "
            "derivative of distance must be what product applies; for product w δ it is ½ w (y − t)²"
        )


def squared_norm(
    metric: Metric, outputs: Outputs, change: Outputs, weights: Float[Array, "samples ..."] | None = None
) -> Float[Array, " samples"]:
    """``δᵀ M δ`` for each sample, summed over its positions.

    Not as ``‖R δ‖²``: XLA compiles ``Σ_k p_k (δ_k − Σ_l p_l δ_l)²`` wrongly for CPUs where many weights are mapped over
    (jaxlib 0.10.2), and its results are off by as much as they are large.

    Args:
        metric: a metric, not its name.
        outputs: where it is taken.
        change: δ, the change in the outputs.
        weights: how much each sample, or each of its positions, counts; 1 if None.

    Example:
        >>> logits, change = jnp.zeros((1, 2)), jnp.array([[1.0, -1.0]])
        >>> [metrics.squared_norm(metric, logits, change).round(5).tolist() for metric in metrics.METRICS.values()]
        [[2.0], [1.0]]
    """
    return of_samples(jnp.sum(change * metric.product(outputs, change), -1), weights)


def of_samples(
    values: Float[Array, "samples *positions"], weights: Float[Array, "samples ..."] | None
) -> Float[Array, " samples"]:
    """The sum over the positions of each sample, weighted."""
    if weights is not None:
        values = values * weights.reshape(*weights.shape, *(1,) * (values.ndim - weights.ndim)).astype(values.dtype)
    return values.reshape(values.shape[0], -1).sum(-1)


def scale_of(weights: Float[Array, "samples ..."], outputs: Float[Array, "samples ..."]) -> Array:
    """What the rows of the metric are scaled by, so that their squares count by the weights."""
    return jnp.sqrt(weights.reshape(*weights.shape, *(1,) * (outputs.ndim - weights.ndim))).astype(outputs.dtype)


def row_of(outputs: Float[Array, "samples ..."], index: Any, probes: int | None, key: Any) -> Array:
    """The coefficients of a row of the metric's factor, alike for all samples; with probes, random signs for all."""
    if probes is not None:
        return jax.random.rademacher(jax.random.fold_in(key, index), outputs.shape, outputs.dtype)
    rows = math.prod(outputs.shape[1:])
    chosen = jax.nn.one_hot(index, rows, dtype=outputs.dtype).reshape(outputs.shape[1:])
    return jnp.broadcast_to(chosen, outputs.shape)
