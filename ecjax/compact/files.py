"""One safetensors file for a pruned network: each layer dense or sparse, whichever is smaller."""

import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ecjax import networks
from ecjax.networks import Params

_FORMAT, _VERSION = "ecjax.compact", "1"
_HOW = "safetensors is not installed: pip install 'ecjax[files]'"


class Saved(NamedTuple):
    """What a file holds.

    Attributes:
        params: nested dicts of NumPy arrays, which keep double precision whatever JAX is set to.
        activation: its name, as given to ``save``.
        widths: of the layers: ``networks.MLP(widths, activation)`` is the network.

    Example:
        >>> size = compact.save("pruned.safetensors", pruned.params, activation="relu")
        >>> saved = compact.load("pruned.safetensors")
        >>> saved.activation, saved.widths
        ('relu', (8, 2))
    """

    params: Params
    activation: str
    widths: tuple[int, ...]


def save(path: str | os.PathLike, params: Params, activation: str) -> int:
    """Writes params to a safetensors file, each kernel as it is or as CSR, whichever takes fewer bytes.

    The file appears whole or not at all: it is written beside its place and then moved there. No pickle is involved.

    Args:
        path: of the file; its folder must exist.
        params: an MLP's, as nested dicts.
        activation: a name for the activation, kept with the params: "relu", "tanh".

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: params that are not nested dicts of an MLP.
        ModuleNotFoundError: safetensors is not installed.

    Example:
        >>> size = compact.save("pruned.safetensors", pruned.params, activation="relu")
        >>> size == pathlib.Path("pruned.safetensors").stat().st_size
        True
    """
    numpy_files = _safetensors()
    networks.layers(params)
    leaves = {name: np.asarray(leaf) for name, leaf in networks.by_path(params).items()}
    steps = [step for path, _ in jax.tree_util.tree_leaves_with_path(params) for step in path]
    if not all(isinstance(step, jax.tree_util.DictKey) for step in steps):
        raise ValueError("only params of nested dicts, as Flax makes them, can be saved")
    kernels = networks.by_path(networks.kernels(params))
    tensors, described = {}, {}
    for name, leaf in leaves.items():
        packed = _packed(leaf) if name in kernels else {"": _bits(leaf)}
        tensors |= {name + suffix: np.ascontiguousarray(part) for suffix, part in packed.items()}
        described[name] = {"dtype": leaf.dtype.name, "shape": leaf.shape}
    content = json.dumps({"activation": activation, "leaves": described})
    metadata = {"format": _FORMAT, "version": _VERSION, "content": content, "sha256": _digest(content, tensors)}
    return _write_whole(Path(path), numpy_files.save(tensors, metadata))


def load(path: str | os.PathLike, *, most_bytes: int = 2**32) -> Saved:
    """Reads what ``save`` wrote, bit for bit.

    Args:
        path: of the file.
        most_bytes: what the params may take in memory; a small file of sparse kernels can ask for any amount.

    Raises:
        ValueError: a damaged or foreign file, or one that asks for too much memory, with what is wrong with it.
        FileNotFoundError: no such file.
        ModuleNotFoundError: safetensors is not installed.

    Example:
        >>> size = compact.save("pruned.safetensors", pruned.params, activation="relu")
        >>> loaded = compact.load("pruned.safetensors").params["Dense_0"]["kernel"]
        >>> bool((loaded == pruned.params["Dense_0"]["kernel"]).all())
        True
    """
    _safetensors()
    import safetensors

    Path(path).stat()  # raises FileNotFoundError with its own words
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} was not written by ecjax.compact.save: its format is {metadata.get('format')!r}")
    if metadata.get("version") != _VERSION:
        raise ValueError(f"{path} is of version {metadata.get('version')!r}; this ecjax reads version {_VERSION!r}")
    content = metadata.get("content", "")
    if metadata.get("sha256") != _digest(content, tensors):
        raise ValueError(f"{path} is damaged: its sha256 does not match its content")
    try:
        return _assembled(json.loads(content), tensors, most_bytes)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its parts do not fit together ({error!r})") from error


def _assembled(described: dict, tensors: dict[str, np.ndarray], most_bytes: int) -> Saved:
    """The network from its parts, which may be anything: what is allocated is checked before."""
    declared = {name: (_dtype(facts["dtype"]), tuple(facts["shape"])) for name, facts in described["leaves"].items()}
    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in declared.values())
    if not 0 <= size <= most_bytes:
        raise ValueError(f"its params take {size:,} bytes, more than most_bytes={most_bytes:,}")
    if not isinstance(described["activation"], str):
        raise ValueError(f"its activation is {described['activation']!r}, no name")
    params = _nested({name: _unpacked(name, *facts, tensors) for name, facts in declared.items()})
    leaves = networks.by_path(params)
    return Saved(params, described["activation"], tuple(leaves[path].shape[1] for path in networks.layers(params)))


def _dtype(name: str) -> np.dtype:
    """A dtype of numbers by its name; NumPy alone knows no bfloat16."""
    dtype = jnp.dtype(name)
    if not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        raise ValueError(f"{name!r} is no dtype of numbers")
    return dtype


def _safetensors():
    try:
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_HOW) from error
    return safetensors.numpy


def _packed(kernel: np.ndarray) -> dict[str, np.ndarray]:
    """A kernel's bits as CSR of its transpose if that is smaller: only what is a plain zero is left out."""
    bits = _bits(kernel)
    neuron, source = np.nonzero(bits.T)
    index = np.min_scalar_type(max(kernel.shape[0] - 1, 0))
    counts = np.bincount(neuron, minlength=kernel.shape[1])
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)
    sparse = {".values": bits.T[neuron, source], ".inputs": source.astype(index), ".starts": starts}
    return sparse if sum(part.nbytes for part in sparse.values()) < bits.nbytes else {"": bits}


def _unpacked(name: str, dtype: np.dtype, shape: tuple[int, ...], tensors: dict[str, np.ndarray]) -> np.ndarray:
    bits = tensors[name] if name in tensors else _dense_bits(name, dtype, shape, tensors)
    if bits.size != math.prod(shape) or bits.dtype != _bits_dtype(dtype):
        raise ValueError(f"'{name}' is {bits.dtype} of shape {bits.shape}, described as {dtype} of shape {shape}")
    return bits.view(dtype).reshape(shape)


def _dense_bits(name: str, dtype: np.dtype, shape: tuple[int, ...], tensors: dict[str, np.ndarray]) -> np.ndarray:
    values, source, starts = (tensors[name + suffix] for suffix in (".values", ".inputs", ".starts"))
    inputs, neurons = shape
    counts = np.diff(starts.astype(np.int64))
    rows_fit = starts.shape == (neurons + 1,) and starts[0] == 0 and (counts >= 0).all()
    types_fit = values.dtype == _bits_dtype(dtype) and source.dtype.kind == "u"
    if not (rows_fit and types_fit and values.shape == source.shape == (starts[-1],)):
        raise ValueError(f"'{name}' is no sparse kernel of shape {shape}")
    bits = np.zeros((inputs, neurons), values.dtype)
    bits[source, np.repeat(np.arange(neurons), counts)] = values
    return bits


def _bits(array: np.ndarray) -> np.ndarray:
    """An array's bits as whole numbers: every dtype alike, and minus zero is not a zero."""
    return np.ascontiguousarray(array).view(_bits_dtype(array.dtype)).reshape(array.shape)


def _bits_dtype(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}")


def _digest(content: str, tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape} ".encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def _nested(leaves: dict[str, np.ndarray]) -> dict:
    """Nested dicts from paths like ``"Dense_0/kernel"``."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        here = tree
        for parent in parents:
            here = here.setdefault(parent, {})
        here[name] = leaf
    return tree


def _write_whole(path: Path, content: bytes) -> int:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return len(content)
