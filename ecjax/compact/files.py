"""One safetensors file for a pruned network: each leaf dense or sparse, whichever is smaller, and a few answers."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Num

from ecjax import _checks, _door, _trees, graph
from ecjax._types import Inputs, Network, Params
from ecjax._writing import write_whole
from ecjax.compact import answers, bits

_FORMAT, _VERSION = "ecjax.compact", "2"
_WORDS = 300  # letters of what a network says to params that are not its own; it may print them whole
_HOW = "safetensors is not installed: pip install 'ecjax[files]'"


class Examples(NamedTuple):
    """A few inputs of the network that was saved, and what it answered.

    Attributes:
        outputs: of the network.

    Example:
        >>> size = compact.save("pruned.safetensors", pruned.params, network=network, inputs=inputs)
        >>> examples = compact.load("pruned.safetensors").examples
        >>> examples.inputs.shape, examples.outputs.shape
        ((4, 4), (4, 2))
    """

    inputs: Num[np.ndarray, "samples *features"]
    outputs: Num[np.ndarray, "samples *outputs"]


class Saved(NamedTuple):
    """What a file holds.

    Attributes:
        params: NumPy arrays, which keep double precision whatever JAX is set to, in nested dicts: under whole numbers
            what was in lists and tuples, under their names the fields of others; or in the containers of ``like``.
            Random keys are JAX's.
        widths: of the layers of a multilayer perceptron, as ``networks.MLP`` takes them; None of other networks, and
            without examples.
        examples: None if the file was saved without a network.

    Example:
        >>> size = compact.save("pruned.safetensors", pruned.params, network=network, inputs=inputs)
        >>> saved = compact.load("pruned.safetensors")
        >>> again = saved.require(networks.from_linen(networks.MLP(saved.widths, nn.relu)))
        >>> bool(jnp.array_equal(again(saved.params, inputs), network(pruned.params, inputs)))
        True
    """

    params: Params
    widths: tuple[int, ...] | None
    examples: Examples | None

    def require(self, network: Network) -> Network:
        """The network, if it answers with these params as the one that was saved did.

        Raises:
            ValueError: another network, such as one of another activation; or no examples to tell.
        """
        if self.examples is None:
            raise ValueError(
                "the params were saved without examples, so nothing tells whether this is their network; save them "
                "with network= and inputs="
            )
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf) if _trees.is_array(leaf) else leaf, self.params)
        inputs = jnp.asarray(self.examples.inputs)
        try:
            found = answers.of(network, params, inputs)
        except ValueError as error:
            raise ValueError(
                f"{str(error)[:_WORDS]}. The params are in nested dicts unless compact.load is given like=: params of "
                "the network in its own containers, with what else it holds as it was saved, such as dropout in "
                "inference mode. What compact.compact made smaller is taken by the network that came with it, and "
                "pruned params with their zeros by a module; a file keeps these as small, and what is loaded can be "
                "compacted again"
            ) from error
        name = "the params were saved from another network (of another activation, or a norm over features that went?)"
        answers.require_same(name, found, self.examples.outputs, (network, params, inputs))
        return network


def save(
    path: str | os.PathLike, params: Params, *, network: Network | None = None, inputs: Inputs | None = None
) -> int:
    """Writes params to a safetensors file, each leaf dense or sparse, whichever takes fewer bytes.

    The sparse form of a leaf of any number of axes holds its entries other than zero and where they lie, as CSR does.
    The file appears whole or not at all: it is written beside its place and then moved there. No pickle is involved.
    Params alone do not tell the function: the same arrays are another network with another activation. Given the
    network, the file holds what it answers to a few inputs, and ``load`` refuses a network that answers otherwise.

    Args:
        path: of the file; its folder must exist.
        params: any pytree: nested containers, an Equinox module, an NNX module or its state. Leaves that are no arrays,
            such as an activation in an Equinox module or a Python number, are not saved.
        network: of the params.
        inputs: that it takes, features or tokens; up to four of them are saved as examples.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: params without an array, without values (shapes, or under ``jit``), or with keys that are no names;
            a network without inputs; answers that are NaN or infinite.
        ModuleNotFoundError: safetensors is not installed.

    Example:
        >>> size = compact.save("pruned.safetensors", pruned.params, network=network, inputs=inputs)
        >>> size == pathlib.Path("pruned.safetensors").stat().st_size
        True
    """
    numpy_files = _safetensors()
    if (network is None) != (inputs is None):
        raise ValueError("a network needs inputs, and inputs need the network that answers them: give both or neither")
    _trees.require_params(params)
    names = _trees.by_path(params)  # refuses two leaves of one name
    leaves = {tuple(map(_key, steps)): leaf for steps, leaf in jax.tree_util.tree_leaves_with_path(params)}
    arrays = {steps: leaf for steps, leaf in leaves.items() if _trees.is_array(leaf)}
    if not arrays:
        raise ValueError(f"params hold no array to save; they hold {', '.join(names) or 'nothing'}")
    if not _checks.are_known(arrays):
        raise ValueError("params hold no values to save: they are shapes, or traced; call this outside of jit and vmap")
    examples, widths = None, None
    if network is not None and inputs is not None:
        examples, widths = _examples(network, params, inputs), _widths(network, params, inputs)
    tensors, described = {}, []
    for steps, leaf in arrays.items():
        array, more = _numbers(leaf)
        packed = bits.packed(array)
        tensors |= {f"{part}:{_name(steps)}": np.asarray(packed[part], order="C") for part in packed}
        described.append({"path": steps, **_facts(array), **more})
    if examples is not None:
        tensors |= {f"example:{name}": bits.as_bits(array) for name, array in examples._asdict().items()}
        examples = {name: _facts(array) for name, array in examples._asdict().items()}
    content = json.dumps({"leaves": described, "widths": widths, "examples": examples})
    metadata = {"format": _FORMAT, "version": _VERSION, "content": content, "sha256": _digest(content, tensors)}
    return write_whole(path, numpy_files.save(tensors, metadata))


def load(
    path: str | os.PathLike, network: Network | None = None, *, like: Params | None = None, most_bytes: int = 2**32
) -> Saved:
    """Reads what ``save`` wrote, bit for bit.

    Args:
        path: of the file.
        network: that is to be used with the params; it must answer the examples in the file as the one that was saved.
        like: params of the network, for their containers and all that is no array, such as the inference mode of an
            Equinox module; the values of its arrays do not matter, nor do their shapes.
        most_bytes: what the params may take in memory; a small file of sparse kernels can ask for any amount.

    Raises:
        ValueError: a damaged or foreign file, or one that asks for too much memory, with what is wrong with it; a
            network that answers otherwise, or a file without examples to tell; leaves that are not those of ``like``.
        FileNotFoundError: no such file.
        ModuleNotFoundError: safetensors is not installed.

    Example:
        >>> size = compact.save("pruned.safetensors", pruned.params, network=network, inputs=inputs)
        >>> saved = compact.load("pruned.safetensors", network)
        >>> bool((saved.params["Dense_0"]["kernel"] == pruned.params["Dense_0"]["kernel"]).all())
        True
        >>> compact.load("pruned.safetensors", networks.from_linen(networks.MLP(saved.widths, jnp.tanh)))
        Traceback (most recent call last):
        ValueError: pruned.safetensors: the params were saved from another network (of another activation, or ...
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
        saved = _assembled(json.loads(content), tensors, most_bytes)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its parts do not fit together ({error!r})") from error
    try:
        saved = saved if like is None else saved._replace(params=_in_containers(saved.params, like))
        if network is not None:
            saved.require(network)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return saved


def _key(step: Any) -> str | int:
    """One step of a leaf's path: a name or a whole number, as JSON keeps them."""
    key = next((getattr(step, name) for name in ("key", "idx", "name") if hasattr(step, name)), step)
    if type(key) not in (str, int):
        raise ValueError(f"params under the key {key!r} can't be saved; keys must be names or whole numbers")
    return key


def _name(path: tuple[str | int, ...]) -> str:
    return "/".join(map(str, path))


def _facts(array: np.ndarray) -> dict[str, Any]:
    return {"dtype": array.dtype.name, "shape": array.shape}


def _numbers(leaf: Any) -> tuple[np.ndarray, dict[str, str]]:
    """A leaf as NumPy knows it, and for random keys, as in the state of an NNX module, how numbers come from them."""
    if _trees.is_key(leaf):
        return np.asarray(jax.random.key_data(leaf)), {"random_keys": str(jax.random.key_impl(leaf))}
    return np.asarray(leaf), {}


def _leaf(facts: dict[str, Any], array: np.ndarray) -> np.ndarray | Array:
    """The inverse of ``_numbers``."""
    kind = facts.get("random_keys")
    if kind is None:
        return array
    if type(kind) is not str or array.dtype != np.uint32:
        raise ValueError(f"{array.dtype} of {kind!r} are no random keys")
    return jax.random.wrap_key_data(jnp.asarray(array), impl=kind)


def _examples(network: Network, params: Params, inputs: Inputs) -> Examples:
    _checks.require_inputs(inputs)
    samples = answers.few(inputs)
    outputs = answers.of(network, params, samples)
    _checks.require_finite(outputs, "outputs of the network")
    return Examples(np.asarray(samples), outputs)


def _widths(network: Network, params: Params, inputs: Inputs) -> tuple[int, ...] | None:
    """The widths of a multilayer perceptron; None for another network."""
    network, params, _ = _trees.split(network, params)
    try:
        layers = _door.layers(network, params, inputs, need="any", each_alone=False)
        graph.chain(layers)
    except ValueError:  # not one of those that can be compacted; the examples tell it all the same
        return None
    return tuple(layer.layout.sizes[2] for layer in layers)


def _assembled(described: Any, tensors: dict[str, np.ndarray], most_bytes: int) -> Saved:
    """The network from its parts, which may be anything: what is allocated is checked before."""
    leaves, examples, widths = described["leaves"], described["examples"] or {}, described["widths"]
    declared = {_path(facts["path"]): (_dtype(facts["dtype"]), tuple(facts["shape"])) for facts in leaves}
    answered = {name: (_dtype(facts["dtype"]), tuple(facts["shape"])) for name, facts in examples.items()}
    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in [*declared.values(), *answered.values()])
    if not 0 <= size <= most_bytes:
        raise ValueError(f"its params take {size:,} bytes, more than most_bytes={most_bytes:,}")
    if not declared or len(declared) != len(leaves):
        raise ValueError("it holds no leaves, or two of the same path")
    arrays = {path: bits.unpacked(_name(path), *facts, tensors) for path, facts in declared.items()}
    params = _nested({path: _leaf(facts, array) for facts, (path, array) in zip(leaves, arrays.items(), strict=True)})
    arrays = {name: bits.viewed(tensors[f"example:{name}"], name, *facts) for name, facts in answered.items()}
    return Saved(params, _whole_numbers(widths), Examples(**arrays) if examples else None)


def _path(steps: list) -> tuple[str | int, ...]:
    if not isinstance(steps, list) or any(type(step) not in (str, int) for step in steps):
        raise ValueError(f"{steps!r} is no path of a leaf")
    return tuple(steps)


def _whole_numbers(widths: Any) -> tuple[int, ...] | None:
    if widths is None:
        return None
    if not isinstance(widths, list) or any(type(width) is not int or width < 0 for width in widths):
        raise ValueError(f"{widths!r} are no widths of layers")
    return tuple(widths)


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


def _digest(content: str, tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape} ".encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def _nested(leaves: dict[tuple[str | int, ...], np.ndarray | Array]) -> Params:
    """Nested dicts from paths like ``("Dense_0", "kernel")``; the array itself from the empty path."""
    if () in leaves and len(leaves) == 1:
        return leaves[()]
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, name = path
        here = tree
        for parent in parents:
            here = here.setdefault(parent, {})
        if name in here:
            raise ValueError(f"the path {path} leads to a leaf and further")
        here[name] = leaf
    return tree


def _in_containers(params: Params, like: Params) -> Params:
    """The leaves of nested dicts in other containers."""
    found = _trees.by_path(params)
    expected = {path: leaf for path, leaf in _trees.by_path(like).items() if _trees.is_array(leaf)}
    for path in [*expected, *found]:
        if path not in found or path not in expected:
            where = "like" if path in expected else "the file"
            raise ValueError(f"the leaves of the file are not those of like: only {where} holds '{path}'")
    return _trees.replace(like, found)
