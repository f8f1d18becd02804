"""One safetensors file for a pruned network: each layer dense or sparse, whichever is smaller."""

import hashlib
import json
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


def load(path: str | os.PathLike) -> Saved:
    """Reads what ``save`` wrote, bit for bit.

    Raises:
        ValueError: a damaged or foreign file, with what is wrong with it.
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
        described = json.loads(content)
        leaves = {name: _unpacked(name, facts, tensors) for name, facts in described["leaves"].items()}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is damaged: its parts do not fit together ({error!r})") from error
    params = _nested(leaves)
    kernels = networks.by_path(params)
    return Saved(params, described["activation"], tuple(kernels[p].shape[1] for p in networks.layers(params)))


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


def _unpacked(name: str, facts: dict, tensors: dict[str, np.ndarray]) -> np.ndarray:
    dtype, shape = jnp.dtype(facts["dtype"]), tuple(facts["shape"])
    if name in tensors:
        bits = tensors[name]
    else:
        values, source, starts = (tensors[name + suffix] for suffix in (".values", ".inputs", ".starts"))
        bits = np.zeros(shape, values.dtype)
        bits[source, np.repeat(np.arange(shape[1]), np.diff(starts))] = values
    return bits.view(dtype).reshape(shape)


def _bits(array: np.ndarray) -> np.ndarray:
    """An array's bits as whole numbers: every dtype alike, and minus zero is not a zero."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)


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
