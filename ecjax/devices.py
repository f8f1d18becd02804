"""Calibration inputs and params on many devices: a mesh, and what lies where.

Samples are spread over the mesh's axis "data" and neurons over its axis "model". Nothing else is needed: all of ecjax
takes such arrays as it takes any other, and the compiler puts in the sums over devices.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree, Shaped

from ecjax import networks
from ecjax.networks import Params

DATA = "data"
MODEL = "model"


def mesh(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
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


def shard_params(params: Params, mesh: Mesh) -> Params:
    """Params with the neurons of each layer, the last axis of its kernel and its bias, spread over the axis "model".

    A layer whose neurons can't be shared out equally is on all devices, as is every leaf that is no kernel or bias.

    Args:
        params: the same on every process.
        mesh: of ``mesh``.

    Example:
        >>> mesh = devices.mesh(devices=jax.devices()[:1])
        >>> devices.shard_params(params, mesh)["Dense_0"]["kernel"].sharding.spec[1]
        'model'
    """
    kernels = networks.by_path(networks.kernels(params))
    of_layers = {*kernels, *map(networks.bias_path, kernels)}

    def put(path, leaf):
        shared_out = path in of_layers and leaf.shape[-1] % mesh.shape[MODEL] == 0
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), MODEL) if shared_out else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return networks.replace(params, {path: put(path, leaf) for path, leaf in networks.by_path(params).items()})


def automatic(arrays: PyTree) -> PyTree:
    """The same arrays, where they lie, with the compiler free to place what is computed from them.

    A mesh of ``jax.make_mesh`` has explicit axes unless told otherwise: every product over samples that are spread over
    one would have to name where its result goes, in a user's network too.

    Example:
        >>> devices.automatic(inputs) is inputs
        True
    """

    def of_leaf(leaf):
        if not isinstance(leaf, Array) or isinstance(leaf, jax.core.Tracer):
            return leaf
        sharding = leaf.sharding
        if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
            return leaf
        of_axes = (AxisType.Auto,) * len(sharding.mesh.axis_names)
        mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names, axis_types=of_axes)
        return jax.device_put(leaf, NamedSharding(mesh, sharding.spec))

    return jax.tree.map(of_leaf, arrays)
