"""Arrays as their bits: as they are, or the entries that are not zero and where they lie, where that is smaller."""

import math

import numpy as np

_MOST = 2**32 - 1  # entries that are counted in 32 bits


def packed(leaf: np.ndarray) -> dict[str, np.ndarray]:
    """The bits of an array, sparse if that is smaller: only what is a plain zero is left out.

    The sparse form is CSR of the transposed matrix whose rows are the leading axes of the array and whose columns are
    the others, wherever between them takes the fewest bytes.
    """
    bits = as_bits(leaf)
    entries = int(np.count_nonzero(bits))
    sizes = {width: _sparse_bytes(bits, entries, width) for width in _widths(bits.shape)}
    if entries > _MOST or not sizes or min(sizes.values()) >= bits.nbytes:
        return {"dense": bits}
    width = min(sizes, key=sizes.__getitem__)
    matrix = bits.reshape(-1, width).T
    column, row = np.nonzero(matrix)
    starts = np.concatenate([[0], np.cumsum(np.bincount(column, minlength=width))]).astype(np.uint32)
    return {"values": matrix[column, row], "rows": row.astype(_index(len(matrix.T))), "starts": starts}


def unpacked(name: str, dtype: np.dtype, shape: tuple[int, ...], tensors: dict[str, np.ndarray]) -> np.ndarray:
    """A leaf from its parts in a file; raises a ValueError where they do not fit together."""
    dense = tensors.get(f"dense:{name}")
    return viewed(_dense_bits(name, dtype, shape, tensors) if dense is None else dense, name, dtype, shape)


def viewed(bits: np.ndarray, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Bits as an array of this dtype and shape, if they are that; raises a ValueError otherwise."""
    if bits.shape != _bits_shape(dtype, shape) or bits.dtype != _bits_dtype(dtype):
        raise ValueError(f"'{name}' is {bits.dtype} of shape {bits.shape}, described as {dtype} of shape {shape}")
    return bits.view(dtype).reshape(shape)


def as_bits(array: np.ndarray) -> np.ndarray:
    """An array's bits as whole numbers: every dtype alike, and minus zero is not a zero.

    Numbers of 16 bytes are two of 8, along an axis of their own.
    """
    native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    return native.view(_bits_dtype(array.dtype)).reshape(_bits_shape(array.dtype, array.shape))


def _bits_dtype(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{min(dtype.itemsize, 8)}")


def _bits_shape(dtype: np.dtype, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, dtype.itemsize // 8) if dtype.itemsize > 8 else shape


def _widths(shape: tuple[int, ...]) -> list[int]:
    """How many columns a matrix has that an array may be reshaped to, for every way to cut its axes in two."""
    return [math.prod(shape[axis:]) for axis in range(1, len(shape) + 1)] if math.prod(shape) else []


def _sparse_bytes(bits: np.ndarray, entries: int, width: int) -> int:
    return entries * (bits.itemsize + _index(bits.size // width).itemsize) + 4 * (width + 1)


def _index(rows: int) -> np.dtype:
    return np.dtype(np.min_scalar_type(max(rows - 1, 0)))


def _dense_bits(name: str, dtype: np.dtype, shape: tuple[int, ...], tensors: dict[str, np.ndarray]) -> np.ndarray:
    values, rows, starts = (tensors[f"{part}:{name}"] for part in ("values", "rows", "starts"))
    shape = _bits_shape(dtype, shape)
    width, size = starts.size - 1, math.prod(shape)
    counts = np.diff(starts.astype(np.int64))
    rows_fit = starts.ndim == 1 and width in _widths(shape) and starts[0] == 0 and (counts >= 0).all()
    types_fit = values.dtype == _bits_dtype(dtype) and rows.dtype.kind == starts.dtype.kind == "u"
    if not (rows_fit and types_fit and values.shape == rows.shape == (starts[-1],)):
        raise ValueError(f"'{name}' is no sparse array of shape {shape}")
    bits = np.zeros((size // width, width), values.dtype)
    bits[rows, np.repeat(np.arange(width), counts)] = values
    return bits.reshape(shape)
