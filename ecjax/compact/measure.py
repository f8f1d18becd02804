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
from jaxtyping import PyTree

from ecjax import checks, networks
from ecjax.compact.files import save
from ecjax.compact.fold import Activation, compact, widths
from ecjax.compact.sparse import as_numpy, forward, to_sparse
from ecjax.networks import Params

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


def report(
    params: Params,
    activation: Activation,
    *,
    numpy_activation: Callable[[np.ndarray], np.ndarray] | None = None,
    repeats: int = 200,
) -> list[Form]:
    """Compares an MLP as it is, compacted, and sparse, in the same runtimes.

    Args:
        params: of the pruned MLP, with exact zeros.
        activation: elementwise, after every layer but the last.
        numpy_activation: the same for NumPy arrays; without it the NumPy forms are left out.
        repeats: calls to take the median time of.

    Raises:
        ValueError: params that are not an MLP's.

    Example:
        >>> [form.name for form in compact.report(pruned.params, nn.relu, repeats=1)]
        ['dense', 'compacted', 'sparse']
    """
    checks.require_positive(repeats, "repeats")
    smaller = compact(params, activation)
    forms = [_jax_form("dense", params, params, _dense(activation, params), repeats)]
    forms.append(_jax_form("compacted", smaller, smaller, _dense(activation, smaller), repeats))
    sparse_forward = jax.jit(functools.partial(forward, activation=activation))
    forms.append(_jax_form("sparse", smaller, to_sparse(smaller), sparse_forward, repeats))
    if numpy_activation is not None:
        call = functools.partial(_numpy_forward, activation=numpy_activation)
        for name, given in (("dense", params), ("compacted", smaller)):
            arrays = jax.tree.map(as_numpy, given)
            forms.append(_form(name, "NumPy", given, functools.partial(call, arrays), repeats))
        sparse_call = functools.partial(forward, to_sparse(smaller, "csr"), activation=numpy_activation)
        forms.append(_form("sparse", "NumPy", smaller, sparse_call, repeats))
    return forms


def _dense(activation: Activation, params: Params) -> Callable:
    bias = networks.bias_path(networks.layers(params)[0]) in networks.by_path(params)
    return jax.jit(networks.pure(networks.MLP(widths(params), activation, use_bias=bias)))


def _numpy_forward(params: Params, inputs: np.ndarray, activation: Callable) -> np.ndarray:
    leaves, paths = networks.by_path(params), networks.layers(params)
    hidden = inputs
    for path in paths:
        hidden = hidden @ leaves[path]
        bias = leaves.get(networks.bias_path(path))
        hidden = hidden if bias is None else hidden + bias
        hidden = hidden if path == paths[-1] else activation(hidden)
    return hidden


def _jax_form(name: str, params: Params, arguments: PyTree, call: Callable, repeats: int) -> Form:
    return _form(name, "JAX", params, lambda inputs: jax.block_until_ready(call(arguments, inputs)), repeats)


def _form(name: str, runtime: str, params: Params, call: Callable, repeats: int) -> Form:
    leaves, paths = networks.by_path(params), networks.layers(params)
    is_sparse = name == "sparse"
    nonzeros = sum(int(jnp.count_nonzero(leaf)) for leaf in leaves.values())
    products = [leaves[path] for path in paths]
    features = products[0].shape[0]
    dtype = products[0].dtype if runtime == "JAX" else as_numpy(products[0]).dtype
    return Form(
        name=name,
        runtime=runtime,
        parameters=nonzeros if is_sparse else sum(leaf.size for leaf in leaves.values()),
        nonzeros=nonzeros,
        bytes=sum(leaf.nbytes for leaf in leaves.values()) if name == "dense" else _saved_bytes(params),
        multiply_adds=sum(int(jnp.count_nonzero(p)) if is_sparse else p.size for p in products),
        seconds={batch: _median_seconds(call, (batch, features), dtype, repeats) for batch in BATCHES},
    )


def _saved_bytes(params: Params) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return save(Path(folder) / "params.safetensors", params, "")


def _median_seconds(call: Callable, shape: tuple[int, int], dtype: jnp.dtype, repeats: int) -> float:
    inputs = np.linspace(-1, 1, int(np.prod(shape))).reshape(shape).astype(dtype)
    call(inputs)  # compiles, and warms up
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call(inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
