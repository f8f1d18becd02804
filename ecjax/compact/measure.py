"""What pruning has saved: parameters, bytes, operations and time, form by form."""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
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
from ecjax.compact.fold import compact
from ecjax.compact.sparse import as_numpy, forward, of_chain, require_plain

BATCHES = (1, 256)


class Form(NamedTuple):
    """One form of a network, and what it takes.

    Attributes:
        name: "dense", "compacted" or "sparse" (the compacted network's kernels as BCSR or CSR).
        runtime: "JAX", jitted, or "NumPy" (with SciPy for the sparse kernels).
        parameters: numbers in its arrays.
        nonzeros: of these.
        bytes: on disk: arrays as they are for "dense", the file of ``save`` for the others.
        multiply_adds: for one sample.
        seconds: median time of a call, by batch size.

    Example:
        >>> form = compact.Form("dense", "JAX", 58, nonzeros=34, bytes=232, multiply_adds=48, seconds={1: 2e-5})
        >>> form.bytes / form.parameters
        4.0
    """

    name: str
    runtime: str
    parameters: int
    nonzeros: int
    bytes: int
    multiply_adds: int
    seconds: dict[int, float]


class _Sized(NamedTuple):
    """A network whose forms are measured."""

    params: Params
    chain: Chain
    batches: dict[int, np.ndarray]


def report(
    network: Network,
    params: Params,
    inputs: Inputs,
    activation: Callable | None = None,
    *,
    numpy_activation: Callable[[np.ndarray], np.ndarray] | None = None,
    repeats: int = 200,
) -> list[Form]:
    """Compares a multilayer perceptron as it is, compacted, and sparse, in the same runtimes.

    Args:
        params: its parameters, with exact zeros where weights were removed.
        inputs: what it is called with, repeated as often as a batch needs.
        activation: elementwise, after every layer but the last; without it the sparse form in JAX is left out.
        numpy_activation: the same for NumPy arrays; without it the forms in NumPy are left out.
        repeats: calls to take the median time of.

    Raises:
        ValueError: another network, or an activation with which the sparse form answers otherwise than the network.

    Example:
        >>> [form.name for form in compact.report(network, pruned.params, inputs, nn.relu, repeats=1)]
        ['dense', 'compacted', 'sparse']
    """
    _checks.require_positive(repeats, "repeats")
    chain = chains.read(network, params, inputs)
    smaller_network, small = compact(network, params, inputs)
    batches = {count: np.resize(np.asarray(inputs), (count, *inputs.shape[1:])) for count in BATCHES}
    dense = _Sized(params, chain, batches)
    smaller = _Sized(small, chains.read(smaller_network, small, inputs), batches)
    calls = [("dense", "JAX", dense, _jitted(network, params))]
    calls.append(("compacted", "JAX", smaller, _jitted(smaller_network, small)))
    same = functools.partial(_require_same_activation, network, params, chain)
    if activation is not None:
        require_plain(network, params, chain)
        sparse_forward = jax.jit(functools.partial(forward, activation=activation))
        call = functools.partial(sparse_forward, of_chain(smaller.chain, "bcsr"))
        same("activation", _precision.in_full(call)(chain.samples))
        calls.append(("sparse", "JAX", smaller, _waiting(call)))
    if numpy_activation is not None:
        require_plain(network, params, chain)
        for name, sized in (("dense", dense), ("compacted", smaller), ("sparse", smaller)):
            call = _in_numpy(name, sized.chain, numpy_activation)
            same("numpy_activation", call(as_numpy(chain.samples)))
            calls.append((name, "NumPy", sized, call))
    return [_form(*call, repeats) for call in calls]


def _jitted(network: Network, params: Params) -> Callable:
    network, params, _ = _trees.split(network, params)
    return _waiting(functools.partial(jax.jit(network), params))


def _waiting(call: Callable) -> Callable:
    return lambda inputs: jax.block_until_ready(call(inputs))


def _in_numpy(name: str, chain: Chain, activation: Callable) -> Callable:
    if name == "sparse":
        return functools.partial(forward, of_chain(chain, "csr"), activation=activation)
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


def _form(name: str, runtime: str, sized: _Sized, call: Callable, repeats: int) -> Form:
    leaves = [leaf for leaf in jax.tree.leaves(sized.params) if _trees.is_array(leaf)]
    is_sparse = name == "sparse"
    nonzeros = sum(int(jnp.count_nonzero(leaf)) for leaf in leaves)
    kernels = sized.chain.kernels
    convert = np.asarray if runtime == "JAX" else as_numpy
    return Form(
        name=name,
        runtime=runtime,
        parameters=nonzeros if is_sparse else sum(leaf.size for leaf in leaves),
        nonzeros=nonzeros,
        bytes=sum(leaf.nbytes for leaf in leaves) if name == "dense" else _saved_bytes(sized.params),
        multiply_adds=sum(int(np.count_nonzero(kernel)) if is_sparse else kernel.size for kernel in kernels),
        seconds={count: _median_seconds(call, convert(batch), repeats) for count, batch in sized.batches.items()},
    )


def _saved_bytes(params: Params) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return save(Path(folder) / "params.safetensors", params)


def _median_seconds(call: Callable, inputs: np.ndarray, repeats: int) -> float:
    call(inputs)  # compiles, and warms up
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call(inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
