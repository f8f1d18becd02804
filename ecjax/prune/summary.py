"""What masks leave of a network, kernel by kernel: a table."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from ecjax import _checks, _trees
from ecjax._types import Kernels, Params
from ecjax.graph import tables

_INDEX = 4  # bytes of an index, or of where a row starts


class Row(NamedTuple):
    """What the mask of one kernel leaves of it, or all masks of all of them.

    Attributes:
        kernel: its path.
        shape: of the kernel; empty for a sum of several.
        weights: how many it has.
        kept: how many of them stay.
        sparsity: the fraction that is removed; 0 where there are no weights.
        bytes: of the dense array.
        sparse_bytes: of the same as CSR, with a row for each neuron (an entry of the last axis): the weights that stay,
            and 32 bits for the index of each and for where each row starts.

    Example:
        >>> row = prune.summary(pruned.params, pruned.masks).rows[0]
        >>> row.kernel, row.kept, row.bytes == 4 * row.weights
        ('Dense_0/kernel', 12, True)
    """

    kernel: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    sparsity: float
    bytes: int
    sparse_bytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """Rows that print as a table, and show as one in Jupyter.

    Attributes:
        rows: of the kernels that have a mask, in the order of the flattened params.
        total: of all these together; its sparsity is ``prune.sparsity(masks)``.
        others: of all arrays without a mask, such as biases, which are dense in either form.

    Example:
        >>> prune.summary(pruned.params, pruned.masks)
        kernel                 shape  weights  kept  sparsity  bytes  bytes as CSR
        ──────────────────────────────────────────────────────────────────────────
        Dense_0/kernel         4 × 8  32       12    0.625     128    132
        Dense_1/kernel         8 × 2  16       12    0.250     64     108
        kernels with a mask           48       24    0.500     192    240
        arrays without a mask         10       10    0.000     40     40
    """

    rows: tuple[Row, ...]
    total: Row
    others: Row

    def __repr__(self) -> str:
        """The table."""
        return tables.as_text(_cells(self))

    def _repr_html_(self) -> str:
        """The table in Jupyter."""
        return tables.as_html(_cells(self))


def summary(params: Params, masks: Kernels) -> Summary:
    """A table of what masks leave of each kernel, and of all: weights, sparsity, and bytes.

    Args:
        params: pruned, so that they are 0 where a mask is False; or the shapes of arrays, which nobody can check.
        masks: Kernels of booleans, True where the weight stays.

    Raises:
        ValueError: masks that are not boolean, or shaped unlike the params; removed weights that are not 0; values that
            can't be seen, under ``jit`` or ``vmap``.

    Example:
        >>> table = prune.summary(pruned.params, pruned.masks)
        >>> [(row.kernel, row.sparsity) for row in table.rows]
        [('Dense_0/kernel', 0.625), ('Dense_1/kernel', 0.25)]
        >>> table.total.sparsity, table.others.weights
        (0.5, 10)
    """
    _checks.require_masks(params, masks)
    kept = _trees.by_path(masks)
    arrays = {path: leaf for path, leaf in _trees.by_path(params).items() if _trees.is_array(leaf)}
    if not _checks.are_known(kept):
        raise ValueError("a summary counts what the masks keep, and their values can't be seen under jit or vmap")
    rows = tuple(_row(path or "(params)", arrays[path], np.asarray(mask)) for path, mask in kept.items())
    dense = [leaf for path, leaf in arrays.items() if path not in kept]
    weights, size = sum(leaf.size for leaf in dense), sum(leaf.size * leaf.dtype.itemsize for leaf in dense)
    return Summary(rows, _total(rows), Row("arrays without a mask", (), weights, weights, 0.0, size, size))


def _row(path: str, kernel, mask: np.ndarray) -> Row:
    if _checks.are_known(kernel):
        left = int(np.count_nonzero(np.asarray(kernel)[~mask]))
        if left:
            raise ValueError(
                f"{left} weights of '{path}' that its mask removes are not 0: these params are not pruned. Set them "
                "to 0 with prune.apply_masks(params, masks); train.keep_pruned(masks) keeps them there in training"
            )
    itemsize, kept = kernel.dtype.itemsize, int(np.count_nonzero(mask))
    rows = kernel.shape[-1] if kernel.shape else 1
    as_csr = kept * (itemsize + _INDEX) + _INDEX * (rows + 1)
    size = math.prod(kernel.shape)
    return Row(path, tuple(kernel.shape), size, kept, _sparsity(size, kept), size * itemsize, as_csr)


def _total(rows: tuple[Row, ...]) -> Row:
    weights, kept, dense, sparse = (
        sum(getattr(row, name) for row in rows) for name in ("weights", "kept", "bytes", "sparse_bytes")
    )
    return Row("kernels with a mask", (), weights, kept, _sparsity(weights, kept), dense, sparse)


def _sparsity(weights: int, kept: int) -> float:
    return (weights - kept) / max(weights, 1)


_COLUMNS = ("kernel", "shape", "weights", "kept", "sparsity", "bytes", "bytes as CSR")


def _cells(summary: Summary) -> list[tuple[str, ...]]:
    rows = [*summary.rows, summary.total]
    rows += [summary.others] if summary.others.weights else []
    return [_COLUMNS, *map(_line, rows)]


def _line(row: Row) -> tuple[str, ...]:
    shape, counts = " × ".join(map(str, row.shape)), (f"{row.weights:,}", f"{row.kept:,}")
    return row.kernel, shape, *counts, f"{row.sparsity:.3f}", f"{row.bytes:,}", f"{row.sparse_bytes:,}"
