"""Repairs: what the surviving parameters can do for the ones that were removed.

Both bring the outputs back to their targets by damped Gauss-Newton steps (``gauss_newton``) and differ in what may
move: ``joint_biases`` all biases together, ``survivors`` every parameter that no mask has removed.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ecjax import _door, _trees, batches, checks, devices, gauss_newton, metrics
from ecjax.gauss_newton import Free, Problem
from ecjax.graph import Layers
from ecjax.networks import Inputs, Kernels, Network, Params, Targets


def joint_biases(
    network: Network,
    params: Params,
    inputs: Inputs,
    targets: Targets,
    *,
    metric: str = "euclidean",
    temperature: float | int = 1,
    damping: float | int = 0.01,
    iterations: int = 5,
    products: int = 15,
    batch_size: int = 1024,
    curvature_samples: int = 2500,
) -> Params:
    """Moves all biases together towards the targets; no weight moves.

    Each iteration solves ``(JᵀMJ + λ) δ = Jᵀr`` over the biases next to a kernel and goes along δ as far as the
    objective falls (``gauss_newton``), so the mean objective over the inputs never rises. Source: this
    library's own; the steps are Levenberg's and Marquardt's, with the products of Martens, "Deep learning via
    Hessian-free optimization" (2010).

    Args:
        network: pure function ``(params, inputs) -> outputs`` of shape (samples, K), differentiable forwards and
            backwards; compiled once for each.
        params: of the pruned network.
        inputs: calibration inputs, samples along the first axis.
        targets: the dense network's outputs, of shape (samples, K); or, with the metric "fisher", class labels of shape
            (samples,); or a ``mixture`` of both.
        metric: "euclidean" for regression; "fisher" for the logits of a classifier, whose objective is the
            Kullback-Leibler divergence from the softmax of the targets.
        temperature: what "fisher" divides outputs and targets by; above 1, a classifier's second choices count more.
        damping: λ at the start, as a multiple of the mean diagonal of JᵀMJ; adapted after every step.
        iterations: Gauss-Newton steps.
        products: products with the curvature in a step.
        batch_size: samples at a time; it bounds the memory, together with
        curvature_samples: how many samples the curvature is of, others in each step.

    Returns:
        The params with other biases.

    Raises:
        ValueError: bad inputs, targets that do not fit the outputs, an unknown metric, no biases,
            or an objective that overflows.

    Example:
        >>> repaired = compensate.joint_biases(network, pruned.params, inputs, labels, metric="fisher")
        >>> before, after = (loss(network(p, inputs), labels).mean() for p in (pruned.params, repaired))
        >>> bool(after < before), bool((repaired["Dense_0"]["kernel"] == pruned.params["Dense_0"]["kernel"]).all())
        (True, True)
    """
    options = {"metric": metric, "temperature": temperature, "iterations": iterations}
    sizes = {"products": products, "batch_size": batch_size, "curvature_samples": curvature_samples}
    network, params, static = _trees.split(network, params)
    layers = _door.layers(network, params, inputs, scored=False, clear=False)
    start = gauss_newton.start(params, damping)
    repaired = repair(network, start, every_bias(layers, params), inputs, targets, **options, **sizes)
    return _trees.whole(repaired.params, static)


def survivors(
    network: Network,
    params: Params,
    masks: Kernels,
    inputs: Inputs,
    targets: Targets,
    *,
    metric: str = "euclidean",
    temperature: float | int = 4,
    damping: float | int = 0.01,
    iterations: int = 5,
    products: int = 15,
    batch_size: int = 1024,
    curvature_samples: int = 2500,
) -> Params:
    """Moves every surviving parameter towards the targets; removed weights are exactly zero, before and after.

    Any masks will do, wherever they come from. The steps are those of ``joint_biases``, over all weights that the masks
    keep and all parameters that are no kernels. Source: this library's own.

    Args:
        network: pure function ``(params, inputs) -> outputs`` of shape (samples, K), differentiable forwards and
            backwards; compiled once for each.
        params: of the pruned network, or of the dense one.
        masks: Kernels of booleans, True where the weight stays.
        inputs: calibration inputs, samples along the first axis.
        targets: as for ``joint_biases``, like all arguments below.
        metric: "euclidean" or "fisher".
        temperature: of "fisher".
        damping: λ at the start.
        iterations: Gauss-Newton steps.
        products: products with the curvature in a step.
        batch_size: samples at a time.
        curvature_samples: how many samples the curvature is of.

    Returns:
        The params with other survivors.

    Raises:
        ValueError: as ``joint_biases``; masks shaped unlike the params.

    Example:
        >>> dense = network(params, inputs)
        >>> repaired = compensate.survivors(network, pruned.params, pruned.masks, inputs, dense, metric="fisher")
        >>> bool(((repaired["Dense_0"]["kernel"] != 0) == pruned.masks["Dense_0"]["kernel"]).all())
        True
    """
    network, params, static = _trees.split(network, params)
    free = every_survivor(params, masks)
    options = {"metric": metric, "temperature": temperature, "iterations": iterations}
    sizes = {"products": products, "batch_size": batch_size, "curvature_samples": curvature_samples}
    start = gauss_newton.start(_trees.masked(params, masks), damping)
    repaired = repair(network, start, free, inputs, targets, **options, **sizes)
    return _trees.whole(repaired.params, static)


def every_bias(layers: Layers, params: Params) -> Free:
    """What ``joint_biases`` may move: the bias of each kernel.

    Args:
        layers: of the network (``networks.layers``).
        params: its parameters.

    Returns:
        By its path, True for every entry of every such bias.

    Raises:
        ValueError: a network without a bias next to a kernel.

    Example:
        >>> free = compensate.every_bias(networks.layers(network, params, inputs), params)
        >>> {path: leaf.shape for path, leaf in free.items()}
        {'Dense_0/bias': (8,), 'Dense_1/bias': (2,)}
    """
    leaves = _trees.by_path(params)
    free = {layer.bias: jnp.ones(leaves[layer.bias].shape, bool) for layer in layers if layer.bias}
    if not free:
        raise ValueError(
            "no kernel of the network has a bias that could move; give its layers biases of zeros, or let the "
            "survivors move"
        )
    return free


def every_survivor(params: Params, masks: Kernels) -> Free:
    """What ``survivors`` may move: the weights that the masks keep, and every parameter that is no kernel.

    Args:
        params: with the kernels.
        masks: Kernels of booleans, True where the weight stays.

    Returns:
        By its path, for every leaf of floating-point numbers, which entries may move.

    Raises:
        ValueError: masks that are not boolean, or shaped unlike the params.

    Example:
        >>> free = compensate.every_survivor(params, pruned.masks)
        >>> {path: int(leaf.sum()) for path, leaf in free.items() if path.endswith("bias")}
        {'Dense_0/bias': 8, 'Dense_1/bias': 2}
        >>> int(sum(leaf.sum() for leaf in free.values()))  # the 24 weights that stay, and 10 biases
        34
    """
    checks.require_masks(params, masks)
    kept = _trees.by_path(masks)
    leaves = {path: leaf for path, leaf in _trees.by_path(params).items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return {path: kept.get(path, jnp.ones(leaf.shape, bool)) for path, leaf in leaves.items()}


def mixture(
    outputs: Float[Array | np.ndarray, "samples outputs"],
    labels: Int[Array | np.ndarray, " samples"],
    share: float | int,
) -> Float[Array, "samples outputs"]:
    """Targets between a dense classifier's outputs and labels, as logits: ``log((1 − share) softmax(y) + share e)``.

    Source: Hinton, Vinyals, Dean, arXiv:1503.02531, which weighs the losses of both: the same up to a constant.

    Args:
        outputs: the dense network's logits y.
        labels: the classes; e is the unit vector of each.
        share: of the labels, in [0, 1]; 0 keeps the dense network's predictions, 1 the labels alone.

    Raises:
        ValueError: a share outside [0, 1], labels that are not classes of the outputs.

    Example:
        >>> targets = compensate.mixture(jnp.zeros((1, 2)), jnp.array([1]), share=0.5)
        >>> jax.nn.softmax(targets).round(2).tolist()
        [[0.25, 0.75]]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must be in [0, 1], how much the labels count against the outputs")
    checks.require_labels(labels, outputs.shape)
    return jnp.log((1 - share) * jax.nn.softmax(outputs) + share * jax.nn.one_hot(labels, outputs.shape[-1]))


def repair(
    network: Network,
    state: gauss_newton.State,
    free: Free,
    inputs: Inputs,
    targets: Targets,
    *,
    metric: str,
    temperature: float | int = 1,
    iterations: int = 5,
    products: int = 15,
    batch_size: int = 1024,
    curvature_samples: int = 2500,
) -> gauss_newton.State:
    """What both repairs do once it is said what may move; goes on with the damping that steps before have found.

    Args:
        network: pure function ``(params, inputs) -> outputs``.
        state: where to start.
        free: each leaf of the params that may move, by its path, and which of its entries.
        inputs: as for ``joint_biases``, like all arguments below.
        targets: what the outputs should be.
        metric: "euclidean" or "fisher".
        temperature: of "fisher".
        iterations: Gauss-Newton steps.
        products: products with the curvature in a step.
        batch_size: samples at a time.
        curvature_samples: how many samples the curvature is of.

    Raises:
        ValueError: bad inputs, targets that do not fit the outputs, an unknown metric, a temperature, damping or size
            that is not above 0.

    Example:
        >>> start = gauss_newton.start(pruned.params, damping=0.01)
        >>> free = compensate.every_bias(networks.layers(network, params, inputs), params)
        >>> state = compensate.repair(network, start, free, inputs, labels, metric="fisher")
        >>> int(state.steps)
        5
    """
    checks.require_inputs(inputs)
    checks.require_targets(inputs, targets)
    metrics.require(metric)
    checks.require_above_zero(temperature, "temperature")
    checks.require_above_zero(state.damping, "damping")
    sizes = {"products": products, "batch_size": batch_size, "curvature_samples": curvature_samples}
    for name, size in {"iterations": iterations, **sizes}.items():
        checks.require_positive(size, name)
    inputs, targets = devices.automatic((jnp.asarray(inputs), targets))
    expected = _as_outputs(targets, _outputs_shape(network, state.params, inputs), metric)
    problem = Problem(network, metric, float(temperature), batches.blocks(inputs), **sizes)
    repaired = gauss_newton.take_steps(problem, state, free, inputs, expected, steps=int(iterations))
    checks.require_finite(repaired.objective, "the objective of the repair")
    return repaired


def _outputs_shape(network: Network, params: Params, inputs: Array) -> tuple[int, ...]:
    _door.layers(network, params, inputs, scored=False, clear=False)
    return jax.eval_shape(network, params, inputs).shape


def _as_outputs(targets: Targets, shape: tuple[int, ...], metric: str) -> Float[Array, "samples outputs"]:
    """Targets as rows of outputs: as they are, or the logits of labels."""
    if np.shape(targets) == shape:
        return jnp.asarray(targets, jnp.promote_types(targets.dtype, jnp.float32))
    if metric == "fisher" and np.ndim(targets) == 1:
        checks.require_labels(targets, shape)
        return jnp.log(jax.nn.one_hot(targets, shape[-1]))
    labels = f", or labels of shape {shape[:1]}" if metric == "fisher" else ""
    raise ValueError(f"targets of shape {np.shape(targets)} do not fit outputs of shape {shape}{labels}")
