"""Sparse kernels: JAX's BCSR for jitted functions, SciPy's CSR for deployment with NumPy alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax import Array
from jax.experimental import sparse
from jaxtyping import Num, PyTree

from ecjax import networks
from ecjax.networks import Params

KINDS = ("bcsr", "csr")


def to_sparse(params: Params, kind: str = "bcsr") -> PyTree:
    """The params with every kernel sparse and transposed to ``(out, in)``: a row for each neuron.

    Args:
        params: with exact zeros where weights were removed.
        kind: "bcsr" for ``jax.experimental.sparse.BCSR``, which jitted functions take; "csr" for
            ``scipy.sparse.csr_array``, with the other leaves as NumPy arrays, in float32 or wider.

    Raises:
        ValueError: an unknown kind, or a kernel that is no matrix.

    Example:
        >>> kernel = compact.to_sparse(pruned.params, "csr")["Dense_0"]["kernel"]
        >>> kernel.shape, kernel.nnz == int(pruned.masks["Dense_0"]["kernel"].sum())
        ((8, 4), True)
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(map(repr, KINDS))}")
    kernels = networks.by_path(networks.kernels(params))
    for path, kernel in kernels.items():
        if kernel.ndim != 2:
            raise ValueError(f"kernel '{path}' of shape {kernel.shape} is no matrix; only dense layers become sparse")

    def convert(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if kind == "csr":
            array = as_numpy(leaf)
            return scipy.sparse.csr_array(array.T) if name in kernels else array
        return sparse.BCSR.fromdense(jnp.asarray(leaf).T) if name in kernels else leaf

    return jax.tree_util.tree_map_with_path(convert, params)


def as_numpy(leaf: Array | np.ndarray) -> np.ndarray:
    """A leaf for NumPy and SciPy, in float32 or wider: SciPy knows no smaller numbers, and NumPy is slow with them."""
    return np.asarray(leaf, np.result_type(leaf.dtype, np.float32))


def forward(
    params: PyTree, inputs: Num[Array | np.ndarray, "samples in"], activation: Callable
) -> Num[Array | np.ndarray, "samples out"]:
    """An MLP's outputs with sparse kernels from ``to_sparse``; jit it for "bcsr", call it as it is for "csr".

    Args:
        params: of ``to_sparse``.
        inputs: samples along the first axis; NumPy for "csr".
        activation: elementwise, after every layer but the last; a NumPy function for "csr".

    Example:
        >>> sparse = compact.to_sparse(pruned.params, "csr")
        >>> outputs = compact.forward(sparse, np.asarray(inputs), lambda z: np.maximum(z, 0))  # needs no JAX
        >>> np.allclose(outputs, network(pruned.params, inputs), atol=1e-5)
        True
    """
    is_sparse = lambda leaf: isinstance(leaf, sparse.BCSR | scipy.sparse.csr_array)  # noqa: E731
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_sparse)
    }
    paths = sorted((path for path, leaf in leaves.items() if is_sparse(leaf)), key=networks.by_number)
    hidden = inputs.T
    for path in paths:
        hidden = leaves[path] @ hidden
        bias = leaves.get(networks.bias_path(path))
        hidden = hidden if bias is None else hidden + bias[:, None]
        hidden = hidden if path == paths[-1] else activation(hidden)
    return hidden.T
