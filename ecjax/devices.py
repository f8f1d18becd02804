"""Calibration inputs and params on many devices: a mesh, what lies where, and what a call would take of each device.

Samples are spread over the mesh's axis "data" and neurons over its axis "model". Nothing else is needed: all of ecjax
takes such arrays as it takes any other, and the compiler puts in the sums over devices.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from ecjax import _door, _trees
from ecjax._batches import DATA
from ecjax._types import Inputs, Network, Params
from ecjax.graph import flops

MODEL = "model"
_EXCHANGE = r" = (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
_LOOP = r' while\(.*?body=(%[\w.\-]+)(?:.*known_trip_count":\{"n":"(\d+)")?'


def mesh(
    model: int = 1,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm], JAX assigns this name
) -> Mesh:
    """Devices as a mesh of shape (data, model).

    Args:
        model: over how many devices the neurons of a layer are spread; the samples are spread over the others.
        devices: None for all devices of all processes.

    Raises:
        ValueError: a number that does not divide the number of devices.

    Example:
        >>> devices.mesh(devices=jax.devices()[:1]).shape["data"]
        1
    """
    count = jax.device_count() if devices is None else len(devices)
    if model < 1 or count % model:
        raise ValueError(f"model is {model}; it must divide the number of devices, {count}")
    return jax.make_mesh((count // model, model), (DATA, MODEL), (AxisType.Auto,) * 2, devices=devices)


def shard_samples(array: Shaped[Array | np.ndarray, "samples ..."], mesh: Mesh) -> Shaped[Array, "all_samples ..."]:
    """Calibration inputs or targets, their samples in equal parts on the devices of the axis "data".

    Args:
        array: the samples; of several processes, each process gives its own, the same number, and the result is all of
            them together.
        mesh: of ``mesh``.

    Raises:
        ValueError: samples that can't be shared out equally.

    Example:
        >>> mesh = devices.mesh(devices=jax.devices()[:1])
        >>> devices.shard_samples(inputs, mesh).sharding.spec[0]
        'data'
    """
    parts = mesh.shape[DATA] // jax.process_count()
    if array.shape[0] % parts:
        fitting = array.shape[0] - array.shape[0] % parts
        raise ValueError(
            f"{array.shape[0]} samples can't be shared out equally to {parts} devices; give {fitting} of them, "
            "and the moments of the others by moments.update"
        )
    sharding = NamedSharding(mesh, PartitionSpec(DATA))
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)  # also of an array that lies on a device already
    return jax.make_array_from_process_local_data(sharding, np.asarray(array))


def shard_params(network: Network, params: Params, inputs: Inputs | jax.ShapeDtypeStruct, mesh: Mesh) -> Params:
    """Params with the neurons of each layer, an axis of its kernel and of its bias, spread over the axis "model".

    Which axes of a leaf are neurons is read from the network. A layer whose neurons can't be shared out equally is on
    all devices, as is every leaf that is no kernel or bias.

    Args:
        params: the same on every process.
        inputs: some samples, or their shape, to read the network with.
        mesh: of ``mesh``.

    Raises:
        ValueError: a network that does not take these, or without a kernel.

    Example:
        >>> mesh = devices.mesh(devices=jax.devices()[:1])
        >>> devices.shard_params(network, params, inputs, mesh)["Dense_0"]["kernel"].sharding.spec[1]
        'model'
    """
    network, params, static = _trees.split(network, params)
    parts, specs = mesh.shape[MODEL], {}
    for layer in _door.layers(network, params, inputs, need="any", each_alone=False):
        for path, layout in ((layer.kernel, layer.of_kernel), (layer.bias, layer.of_bias)):
            sizes = zip(layout.axes, layout.shape, strict=True) if path and layout else ()
            shared = [place for place, (axis, size) in enumerate(sizes) if axis == "out" and size % parts == 0]
            if shared:
                specs[path] = PartitionSpec(*[None] * shared[0], MODEL)

    def put(path, leaf):
        return jax.device_put(leaf, NamedSharding(mesh, specs.get(path, PartitionSpec())))

    placed = {path: put(path, leaf) for path, leaf in _trees.by_path(params).items()}
    return _trees.whole(_trees.replace(params, placed), static)


class Account(NamedTuple):
    """What a call takes of each device, by the account of the compiler; NaN where it gives none.

    Attributes:
        arguments: bytes of what it is called with.
        temporary: bytes that it holds besides, at most.
        output: bytes of what it gives.
        moved: bytes got from other devices, those of a loop as often as it turns.
        largest: bytes of the largest of these exchanges.
        multiply_adds: of all devices together, counted in the jaxpr; NaN where a loop may turn any number of times.

    Example:
        >>> devices.Account(8, 4, 4, 0, 0, 2)._asdict()["temporary"]
        4
    """

    arguments: float
    temporary: float
    output: float
    moved: float
    largest: float
    multiply_adds: float


def account(call: Callable, *given: Any) -> Account:
    """What a call would take of each device: it is compiled, and nothing is computed.

    So one machine can tell what a network needs that it could not hold, on as many devices as
    ``jax.config.update("jax_num_cpu_devices", 64)`` simulates (``experiments/scale.py``):

        found = devices.account(lambda params, inputs: criterion(network, params, inputs), params, inputs)

    Args:
        call: a pure function of arrays. Under ``jax.set_mesh``, its own shardings are those of the mesh.
        *given: what it is called with: arrays, or each a ``jax.ShapeDtypeStruct``, which may have a sharding.

    Example:
        >>> found = devices.account(network, params, inputs)
        >>> found.output == network(params, inputs).nbytes, found.moved
        (True, 0)
    """
    traced = jax.jit(call).trace(*given)
    program, operations = traced.lower().compile(), flops.of_jaxpr(traced.jaxpr)
    memory, exchanges = program.memory_analysis(), list(_exchanges(program.as_text() or ""))
    names = "argument_size_in_bytes", "temp_size_in_bytes", "output_size_in_bytes"
    return Account(
        *(getattr(memory, name, math.nan) for name in names),
        moved=sum(size * times for size, times in exchanges),
        largest=max((size for size, _ in exchanges), default=0),
        multiply_adds=math.nan if operations.unknown else operations.products / 2,
    )


def _exchanges(text: str) -> Iterator[tuple[int, int]]:
    """The bytes that a device gets from others in each exchange of a program, and how often."""
    bodies = dict(re.findall(r"^(?:ENTRY )?(%[\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    times = dict.fromkeys(bodies, 1)
    for name, body in reversed(bodies.items()):  # a computation comes after all that it calls
        for inside, turns in re.findall(_LOOP, body):
            times[inside] = times[name] * int(turns or 1)
        for shapes in re.findall(_EXCHANGE, body):
            arrays = re.findall(r"[a-z]+(\d*)\[([\d,]*)\]", shapes)  # f32[8,16]; pred[8] are bytes
            sizes = [math.prod(map(int, re.findall(r"\d+", shape))) * int(bits or 8) // 8 for bits, shape in arrays]
            yield max(sizes, default=0), times[name]
