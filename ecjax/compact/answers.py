"""Whether two networks answer alike: what they give for a few samples, and how far rounding may move that."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core
from jaxtyping import Num, PyTree

from ecjax import _precision, _trees
from ecjax._types import Inputs, Network, Params

_SAMPLES = 4
_DRAWS = 4
_UNITS = 32  # in the last place


def few(inputs: Inputs) -> Num[Array, "few *features"]:
    """A few samples, spread over the inputs; two at least, as an axis of length 1 can't be told from others."""
    count = inputs.shape[0]
    index = np.unique(np.linspace(0, count - 1, _SAMPLES).astype(int)) if count > 1 else np.zeros(2, int)
    return jnp.asarray(inputs[index])


def of(network: Network, params: Params, inputs: Inputs) -> Num[np.ndarray, "samples *outputs"]:
    """What a network answers, with products in full precision.

    Raises:
        ValueError: a network that does not take these, or gives no array with a row for each sample.
    """
    try:
        outputs = _precision.in_full(network)(params, inputs)
    except Exception as error:
        raise ValueError(
            f"the network does not take inputs of shape {inputs.shape} with these params: "
            f"{str(error).strip() or type(error).__name__}"
        ) from error
    if getattr(outputs, "ndim", 0) < 1 or outputs.shape[0] != inputs.shape[0]:
        what = getattr(outputs, "shape", type(outputs).__name__)
        raise ValueError(f"the network must return one array with a row for each sample; it returns {what}")
    return np.asarray(outputs)


def gap(first: Num[np.ndarray, "..."], second: Num[np.ndarray, "..."]) -> float:
    """The greatest difference of two answers; infinity where their shapes differ or only one is NaN."""
    if first.shape != second.shape:
        return np.inf
    ones, others = _wide(first), _wide(second)
    same = (ones == others) | (np.isnan(ones) & np.isnan(others))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0, np.abs(ones - others)).max(initial=0)
    return np.inf if np.isnan(difference) else float(difference)


def require_same(
    name: str,
    found: Num[np.ndarray, "..."],
    expected: Num[np.ndarray, "..."],
    reference: tuple[Network, Params, Inputs],
) -> None:
    """Raises a ValueError if answers differ by more than rounding.

    Args:
        name: of what gave ``found``, with what it might be.
        found: its answers.
        expected: the answers of the network that it stands for.
        reference: this network, its params and inputs.
    """
    difference = gap(found, expected)
    if difference <= _UNITS * _unit(found) * greatest(expected):
        return
    allowed = rounding(*reference) if difference < np.inf else 0.0
    if difference > allowed:
        shapes = "" if found.shape == expected.shape else f" (outputs of shape {found.shape}, not {expected.shape})"
        raise ValueError(
            f"{name}: it answers otherwise, by up to {difference:.2g}{shapes} where the outputs reach "
            f"{greatest(expected):.2g} and rounding explains {allowed:.1g}"
        )


def rounding(network: Network, params: Params, inputs: Inputs) -> float:
    """How far rounding may move the outputs: as far as when every number of the params is rounded anew.

    Rounding is relative to the terms of a sum and not to the sum, so it is not told from the size of the outputs: the
    params are multiplied by ``1 ± δ`` with random signs, δ being some units in the last place of the coarsest floating
    type that the network computes in.
    """
    outputs = of(network, params, inputs)
    unit = min(_UNITS * _coarsest(network, params, inputs), 1 / 32)
    generator = np.random.default_rng(0)

    def moved(leaf):
        if not (_trees.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)):
            return leaf
        signs = generator.choice([-1, 1], np.shape(leaf))
        return jnp.asarray(_wide(np.asarray(leaf)) * (1 + unit * signs), leaf.dtype)

    draws = [gap(outputs, of(network, jax.tree.map(moved, params), inputs)) for _ in range(_DRAWS)]
    return max(draws) + unit * greatest(outputs)


def greatest(outputs: Num[np.ndarray, "..."]) -> float:
    """The greatest magnitude of the outputs that are finite."""
    finite = outputs[np.isfinite(outputs)]
    return float(np.abs(_wide(finite)).max(initial=0))


def _wide(array: Num[np.ndarray, "..."]) -> Num[np.ndarray, "..."]:
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def _unit(outputs: Num[np.ndarray, "..."]) -> float:
    return float(jnp.finfo(outputs.dtype).eps) if jnp.issubdtype(outputs.dtype, jnp.inexact) else 0.0


def _coarsest(network: Callable, params: PyTree, inputs: Inputs) -> float:
    """The unit in the last place of the coarsest inexact type that a network computes in."""
    network, params, _ = _trees.split(network, params)
    jaxpr = jax.make_jaxpr(network)(params, inputs)
    types = {var.aval.dtype for var in _variables(jaxpr.jaxpr) if hasattr(var.aval, "dtype")}
    return max((float(jnp.finfo(kind).eps) for kind in types if jnp.issubdtype(kind, jnp.inexact)), default=0.0)


def _variables(jaxpr: core.Jaxpr) -> Iterator:
    yield from jaxpr.invars
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for value in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _variables(getattr(value, "jaxpr", value))


def _is_jaxpr(value: object) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)
