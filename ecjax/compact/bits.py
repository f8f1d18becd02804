"""Arrays as their bits: as they are, or as CSR where that is smaller."""

import numpy as np


def packed(leaf: np.ndarray) -> dict[str, np.ndarray]:
    """The bits of a matrix as CSR of its transpose if that is smaller: only what is a plain zero is left out."""
    bits = as_bits(leaf)
    if leaf.ndim != 2:
        return {"dense": bits}
    column, row = np.nonzero(bits.T)
    index = np.min_scalar_type(max(leaf.shape[0] - 1, 0))
    counts = np.bincount(column, minlength=leaf.shape[1])
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)
    sparse = {"values": bits.T[column, row], "rows": row.astype(index), "starts": starts}
    return sparse if sum(part.nbytes for part in sparse.values()) < bits.nbytes else {"dense": bits}


def unpacked(name: str, dtype: np.dtype, shape: tuple[int, ...], tensors: dict[str, np.ndarray]) -> np.ndarray:
    """A leaf from its parts in a file; raises a ValueError where they do not fit together."""
    dense = tensors.get(f"dense:{name}")
    return viewed(_dense_bits(name, dtype, shape, tensors) if dense is None else dense, name, dtype, shape)


def viewed(bits: np.ndarray, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Bits as an array of this dtype and shape, if they are that; raises a ValueError otherwise."""
    if bits.shape != shape or bits.dtype != _bits_dtype(dtype):
        raise ValueError(f"'{name}' is {bits.dtype} of shape {bits.shape}, described as {dtype} of shape {shape}")
    return bits.view(dtype)


def _dense_bits(name: str, dtype: np.dtype, shape: tuple[int, ...], tensors: dict[str, np.ndarray]) -> np.ndarray:
    values, rows, starts = (tensors[f"{part}:{name}"] for part in ("values", "rows", "starts"))
    height, width = shape
    counts = np.diff(starts.astype(np.int64))
    rows_fit = starts.shape == (width + 1,) and starts[0] == 0 and (counts >= 0).all()
    types_fit = values.dtype == _bits_dtype(dtype) and rows.dtype.kind == "u"
    if not (rows_fit and types_fit and values.shape == rows.shape == (starts[-1],)):
        raise ValueError(f"'{name}' is no sparse kernel of shape {shape}")
    bits = np.zeros((height, width), values.dtype)
    bits[rows, np.repeat(np.arange(width), counts)] = values
    return bits


def as_bits(array: np.ndarray) -> np.ndarray:
    """An array's bits as whole numbers: every dtype alike, and minus zero is not a zero."""
    return np.ascontiguousarray(array).view(_bits_dtype(array.dtype)).reshape(array.shape)


def _bits_dtype(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}")
