"""What pruning has saved: parameters, bytes, operations and time, form by form."""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Num

from ecjax import _checks, _precision, _trees
from ecjax._types import Inputs, Network, Params
from ecjax.compact import answers, chains
from ecjax.compact.chains import Chain
from ecjax.compact.files import save
from ecjax.compact.forms import Form, Report
from ecjax.compact.sparse import as_numpy, forward, of_chain, require_plain
from ecjax.graph import Flops, count_flops

_MOST_SECONDS, _LEAST_ROUNDS = 10.0, 3  # of the calls with one number of samples
# By name: for JAX, and for NumPy alone; of GELU JAX's default, the approximation by tanh.
_ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "relu": (jax.nn.relu, lambda z: np.maximum(z, 0)),
    "tanh": (jnp.tanh, np.tanh),
    "gelu": (jax.nn.gelu, lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))),
}


class _Sized(NamedTuple):
    """A form before it is timed, and its call."""

    form: Form
    call: Callable


def report(
    network: Network,
    params: Params,
    smaller_network: Network,
    smaller_params: Params,
    inputs: Inputs,
    *,
    activation: Callable | str | None = None,
    numpy_activation: Callable[[np.ndarray], np.ndarray] | None = None,
    batches: Sequence[int] = (1, 256),
    repeats: int = 200,
) -> Report:
    """Compares a network with a smaller one: parameters, bytes, operations, and time of a jitted call.

    The forms are called in turn, so that whatever else a machine does slows down all of them; the median of each is
    taken, after a call that compiles. The params are arguments of the jitted functions. Multilayer perceptrons have
    sparse forms, too, if their activation is given.

    Args:
        params: its parameters, dense: as they were, or with zeros where weights were removed.
        smaller_network: what ``compact`` returns, or any other network that takes these inputs.
        smaller_params: its parameters.
        inputs: what both are called with, repeated as often as a batch needs.
        activation: of a multilayer perceptron, elementwise, after every layer but the last; without it the sparse form
            in JAX is left out. Or by name "relu", "tanh" or "gelu", which stands for numpy_activation as well.
        numpy_activation: the same for NumPy arrays; without it the forms in NumPy are left out.
        batches: the numbers of samples that are timed.
        repeats: calls to take the median time of; fewer, but three, where all forms together take more than ten
            seconds.

    Returns:
        The forms, with the greatest difference of the outputs; ``print`` shows them as a table, and says where the
        smaller network is no faster.

    Raises:
        ValueError: networks that do not take these inputs, or whose outputs differ in shape; an activation with which
            the sparse form answers otherwise than the smaller network, or another network than a multilayer perceptron
            with one.
        ModuleNotFoundError: safetensors is not installed.

    Example:
        >>> smaller, small = compact.compact(network, pruned.params, inputs)
        >>> report = compact.report(network, pruned.params, smaller, small, inputs, activation=nn.relu, repeats=1)
        >>> [form.name for form in report], report[0].flops.products == 2 * (4 * 8 + 8 * 2)
        (['dense', 'compacted', 'sparse'], True)
    """
    _checks.require_positive(repeats, "repeats")
    if isinstance(activation, str):
        activation, numpy_activation = _by_name(activation, numpy_activation)
    _checks.require_inputs(inputs)
    for count in batches:
        _checks.require_positive(count, "a number of batches")
    samples = answers.few(inputs)
    outputs = [answers.of(*both, samples) for both in ((network, params), (smaller_network, smaller_params))]
    if outputs[0].shape != outputs[1].shape:
        raise ValueError(
            f"the networks give outputs of different shapes, {outputs[0].shape} and {outputs[1].shape}; a report "
            "compares two networks that can stand for one another"
        )
    dense = _form("dense", network, params, samples)
    smaller = _form("compacted", smaller_network, smaller_params, samples)
    sized = [_Sized(dense, _jitted(network, params)), _Sized(smaller, _jitted(smaller_network, smaller_params))]
    if activation is not None or numpy_activation is not None:
        chain = chains.read(smaller_network, smaller_params, inputs)
        require_plain(smaller_network, smaller_params, chain)
        same = functools.partial(_require_same_activation, smaller_network, smaller_params, chain)
        sparse = _sparse(smaller, chain)
        if activation is not None:
            sized.append(_Sized(sparse, _in_jax(chain, activation, same)))
        if numpy_activation is not None:
            dense_chain = chains.read(network, params, inputs)
            sized.append(_Sized(dense._replace(runtime="NumPy"), _in_numpy(dense_chain, numpy_activation)))
            for form, call in ((smaller, _in_numpy), (sparse, _in_scipy)):
                called = call(chain, numpy_activation)
                same("numpy_activation", called(as_numpy(chain.samples)))
                sized.append(_Sized(form._replace(runtime="NumPy"), called))
    seconds = {count: _seconds(sized, inputs, count, repeats) for count in batches}
    forms = [
        one.form._replace(seconds={count: seconds[count][place] for count in batches})
        for place, one in enumerate(sized)
    ]
    return Report(forms, difference=answers.gap(*outputs), greatest=answers.greatest(outputs[0]))


def _by_name(name: str, numpy_activation: Callable | None) -> tuple[Callable, Callable]:
    if name not in _ACTIVATIONS:
        names = ", ".join(map(repr, _ACTIVATIONS))
        raise ValueError(f"activation is {name!r}; it must be one of {names}, or a function")
    activation, by_numpy = _ACTIVATIONS[name]
    return activation, numpy_activation or by_numpy


def _form(name: str, network: Network, params: Params, samples: Num[jax.Array, "few *features"]) -> Form:
    leaves = [leaf for leaf in jax.tree.leaves(params) if _trees.is_array(leaf)]
    one = jax.ShapeDtypeStruct((1, *samples.shape[1:]), samples.dtype)
    return Form(
        name=name,
        runtime="JAX",
        parameters=sum(leaf.size for leaf in leaves),
        nonzeros=sum(int(np.count_nonzero(np.asarray(leaf))) for leaf in leaves),
        bytes=sum(leaf.nbytes for leaf in leaves) if name == "dense" else _saved_bytes(params),
        flops=count_flops(network, params, one),
        seconds={},
    )


def _sparse(smaller: Form, chain: Chain) -> Form:
    """What the smaller network takes with sparse kernels: zeros are not kept, and not multiplied."""
    products = 2 * sum(int(np.count_nonzero(kernel)) for kernel in chain.kernels)
    flops = Flops(products, smaller.flops.others, smaller.flops.unknown)
    return smaller._replace(name="sparse", parameters=smaller.nonzeros, flops=flops)


def _jitted(network: Network, params: Params) -> Callable:
    network, params, _ = _trees.split(network, params)
    return functools.partial(jax.jit(network), jax.tree.map(jnp.asarray, params))


def _in_jax(chain: Chain, activation: Callable, same: Callable[[str, jax.Array], None]) -> Callable:
    """A call of sparse kernels, jitted; raises a ValueError if the activation is not the network's."""
    call = functools.partial(jax.jit(functools.partial(forward, activation=activation)), of_chain(chain, "bcsr"))
    same("activation", _precision.in_full(call)(chain.samples))
    return call


def _in_scipy(chain: Chain, activation: Callable) -> Callable:
    return functools.partial(forward, of_chain(chain, "csr"), activation=activation)


def _in_numpy(chain: Chain, activation: Callable) -> Callable:
    layers = [
        (as_numpy(kernel), None if bias is None else as_numpy(bias))
        for kernel, bias in zip(chain.kernels, chain.biases, strict=True)
    ]

    def call(inputs):
        hidden = inputs
        for index, (kernel, bias) in enumerate(layers):
            hidden = (activation(hidden) if index else hidden) @ kernel
            hidden = hidden if bias is None else hidden + bias
        return hidden

    return call


def _require_same_activation(
    network: Network, params: Params, chain: Chain, argument: str, found: Num[np.ndarray | jax.Array, "few outputs"]
) -> None:
    name, reference = f"{argument} is not the network's", (network, params, chain.samples)
    answers.require_same(f"{name}: with it after every layer but the last", np.asarray(found), chain.outputs, reference)


def _saved_bytes(params: Params) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return save(Path(folder) / "params.safetensors", params)


def _seconds(sized: Sequence[_Sized], inputs: Inputs, count: int, repeats: int) -> list[float]:
    """The median time of a call of each form with so many samples; all are called in turn."""
    batch = np.resize(np.asarray(inputs), (count, *inputs.shape[1:]))
    given = [jnp.asarray(batch) if one.form.runtime == "JAX" else as_numpy(batch) for one in sized]
    for one, argument in zip(sized, given, strict=True):
        _timed(one.call, argument)  # compiles, and warms up
    times: list[list[float]] = []
    start = time.perf_counter()
    while len(times) < repeats and (len(times) < _LEAST_ROUNDS or time.perf_counter() - start < _MOST_SECONDS):
        times.append([_timed(one.call, argument) for one, argument in zip(sized, given, strict=True)])
    return [statistics.median(of_form) for of_form in zip(*times, strict=True)]


def _timed(call: Callable, inputs: Num[np.ndarray | jax.Array, "samples *features"]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call(inputs))
    return time.perf_counter() - start
