"""The dense layers inside a network: what each kernel multiplies, and a tap on what it gives.

The network is traced to its jaxpr, and the equations are walked with an eye on three kinds of value: a kernel, a bias,
and the product of a kernel with its layer's inputs. All other equations are evaluated as they stand, whole calls
included, so jitted, rematerialised and custom-derivative functions keep their own rules wherever no kernel enters them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core
from jaxtyping import Float

from ecjax import checks, networks
from ecjax.networks import Inputs, Network, Params

# What a kernel, a bias or a product may pass through and still be itself. Only a bias may also change its shape, only
# a kernel or a product be transposed.
_CASTS = {"convert_element_type", "copy", "reduce_precision", "sharding_constraint", "optimization_barrier"}
_BROADCASTS = {"reshape", "broadcast_in_dim", "squeeze", "expand_dims"}
# Calls that only run the jaxpr they hold, on the same arguments, and the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
_BY_DEFINITION = "score.elimination_compensation_by_definition takes any differentiable network"


class _Origin(NamedTuple):
    """What a value in the jaxpr is: the "kernel", "bias" or "product" of the kernel at ``path``, or its transpose."""

    kind: str
    path: str
    transposed: bool = False


class _Layers(NamedTuple):
    """What one walk is given, and what it finds: the taps, each layer's inputs, and where its bias went."""

    samples: int
    taps: Mapping[str, Array]
    inputs: dict[str, Array]
    added: list[str]
    used_otherwise: list[str]


def tapped(
    network: Network, params: Params, inputs: Inputs, taps: Mapping[str, Float[Array, "samples out"]], *, biased: bool
) -> tuple[Float[Array, "samples outputs"], dict[str, Float[Array, "samples in"]]]:
    """Evaluates the network with ``taps`` added to the products of its dense layers.

    The layer with the kernel at ``path`` gives ``a @ kernel + taps[path] + bias``; a path without a tap is left as it
    is. The derivative with respect to a tap is the derivative with respect to the layer's pre-activation.

    Args:
        network: pure function ``(params, inputs) -> outputs``.
        params: its parameters; every kernel must enter one product ``(samples, in) @ (in, out)``, or its transpose.
        inputs: samples along the first axis.
        taps: by the kernel's path (``networks.by_path``).
        biased: whether every kernel must also have a sibling bias that is added to its product.

    Returns:
        The outputs, and by each kernel's path the inputs ``a`` of its layer.

    Raises:
        ValueError: a kernel that is not a factor of exactly one such product, or (with ``biased``) whose
            sibling bias is missing or not added to it; the message names the leaf and what would still work.

    Example:
        >>> taps = capture.zero_taps(params, samples=200)
        >>> outputs, layer_inputs = capture.tapped(network, params, inputs, taps, biased=True)
        >>> {path: a.shape for path, a in layer_inputs.items()}
        {'Dense_0/kernel': (200, 4), 'Dense_1/kernel': (200, 8)}
    """
    kernels = networks.by_path(networks.kernels(params))
    require = checks.require_biases if biased else checks.require_any_kernel
    require(params)
    origins = {path: _Origin("kernel", path) for path in kernels}
    origins |= {networks.bias_path(path): _Origin("bias", path) for path in kernels}

    closed, shape = jax.make_jaxpr(network, return_shape=True)(params, inputs)
    samples = inputs.shape[0]
    checks.require_outputs(shape, samples)
    leaves = networks.by_path(params)
    layers = _Layers(samples, taps, {}, [], [])
    input_leaves = jax.tree.leaves(inputs)
    (outputs,), _ = _walk(
        closed,
        [*leaves.values(), *input_leaves],
        [*map(origins.get, leaves), *[None] * len(input_leaves)],
        layers,
    )
    for path in kernels:
        if path not in layers.inputs:
            raise ValueError(f"kernel '{path}' is not multiplied by anything on the way to the outputs; leave it out")
        if biased and (path not in layers.added or path in layers.used_otherwise):
            raise ValueError(
                f"kernel '{path}': its bias '{networks.bias_path(path)}' is not simply added to its product; "
                + _BY_DEFINITION
            )
    return outputs, {path: layers.inputs[path] for path in kernels}


def _walk(closed, arguments: list, origins: list[_Origin | None], layers: _Layers) -> tuple[list, list]:
    """Evaluates a jaxpr; returns its outputs and what each of them is."""
    jaxpr = getattr(closed, "jaxpr", closed)
    values = dict(zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))
    known = dict(zip(jaxpr.invars, origins, strict=True))

    def read(var):
        return var.val if isinstance(var, core.Literal) else values[var]

    def origin(var) -> _Origin | None:
        return None if isinstance(var, core.Literal) else known.get(var)

    for equation in jaxpr.eqns:
        operands, found = [*map(read, equation.invars)], [*map(origin, equation.invars)]
        if any(found):
            results, kinds = _layer_equation(equation, operands, found, layers)
        else:
            results, kinds = _evaluate(equation, operands), [None] * len(equation.outvars)
        values |= dict(zip(equation.outvars, results, strict=True))
        known |= dict(zip(equation.outvars, kinds, strict=True))
    return [*map(read, jaxpr.outvars)], [*map(origin, jaxpr.outvars)]


def _layer_equation(equation, operands: list, found: list, layers: _Layers) -> tuple[list, list]:
    """Evaluates an equation that a kernel, a bias or a product enters."""
    name = equation.primitive.name
    if name in _CALLS:
        return _walk(equation.params[_CALLS[name]], operands, found, layers)
    kinds = [origin.kind if origin else None for origin in found]
    path = next(origin.path for origin in found if origin)
    if name in _CASTS or (name in _BROADCASTS and kinds == ["bias"]):
        return _evaluate(equation, operands), found
    if name == "transpose" and kinds != ["bias"] and equation.params["permutation"] == (1, 0):
        return _evaluate(equation, operands), [found[0]._replace(transposed=not found[0].transposed)]
    if name == "dot_general" and sorted(map(str, kinds)) == ["None", "kernel"]:
        return _product(equation, operands, found, layers)
    if "kernel" in kinds:
        path = found[kinds.index("kernel")].path
        raise ValueError(
            f"kernel '{path}' enters the operation '{name}', not one matrix product (samples, in) @ kernel; "
            + _BY_DEFINITION
        )
    is_layer = name in ("add", "add_any") and sorted(map(str, kinds)) == ["bias", "product"]
    if is_layer and found[0].path == found[1].path and not any(origin.transposed for origin in found):
        layers.added.append(path)
    else:
        layers.used_otherwise.extend(origin.path for origin in found if origin)
    return _evaluate(equation, operands), [None] * len(equation.outvars)


def _product(equation, operands: list, found: list, layers: _Layers) -> tuple[list, list]:
    """Evaluates a kernel's product, with its tap, and notes what the kernel is multiplied with.

    Samples may lie along either axis, the kernel on either side: ``jax.vmap`` of ``kernel.T @ x`` has it on the left.
    """
    side = 0 if found[0] else 1
    _, path, transposed = found[side]
    if path in layers.inputs:
        raise ValueError(f"kernel '{path}' is used twice in one pass; {_BY_DEFINITION}")
    layer_inputs = operands[1 - side]
    contracted, batched = equation.params["dimension_numbers"]
    one_product = contracted[side] == (int(transposed),) and batched == ((), ())
    if layer_inputs.ndim == 2 and contracted[1 - side] == (0,):
        layer_inputs = layer_inputs.T
    if layer_inputs.ndim != 2 or layer_inputs.shape[0] != layers.samples or not one_product:
        raise ValueError(
            f"kernel '{path}' multiplies an array of shape {layer_inputs.shape}, where a dense layer takes "
            f"(samples, in) @ kernel with {layers.samples} samples here; {_BY_DEFINITION}"
        )
    layers.inputs[path] = layer_inputs
    (product,) = _evaluate(equation, operands)
    if path in layers.taps:
        tap = layers.taps[path].astype(product.dtype)
        product = product + (tap.T if side == 0 else tap)
    return [product], [_Origin("product", path, transposed=side == 0)]


def _evaluate(equation, operands: list) -> list:
    """Runs one equation by itself; ``core.jaxpr_as_fun`` is the public way to bind a primitive again."""
    variables = [var for var in equation.invars if not isinstance(var, core.Literal)]
    source = core.DebugInfo("ecjax.capture", equation.primitive.name, None, None)
    jaxpr = core.Jaxpr((), variables, equation.outvars, [equation], equation.effects, source)
    arguments = [
        operand for operand, var in zip(operands, equation.invars, strict=True) if not isinstance(var, core.Literal)
    ]
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*arguments)


def tap_dtype(kernel: Array | np.ndarray) -> jnp.dtype:
    """What a kernel's taps and moments are held in: at least float32, whatever the layer computes in.

    Example:
        >>> capture.tap_dtype(jnp.ones((4, 8), jnp.bfloat16))
        dtype('float32')
    """
    return jnp.promote_types(kernel.dtype, jnp.float32)


def zero_taps(params: Params, samples: int) -> dict[str, Float[Array, "samples out"]]:
    """Zero taps for every dense layer: the place to differentiate at.

    Args:
        params: with the kernels.
        samples: how many rows the taps have.

    Example:
        >>> {path: tap.shape for path, tap in capture.zero_taps(params, samples=200).items()}
        {'Dense_0/kernel': (200, 8), 'Dense_1/kernel': (200, 2)}
    """
    return {
        path: jnp.zeros((samples, kernel.shape[-1]), tap_dtype(kernel))
        for path, kernel in networks.by_path(networks.kernels(params)).items()
    }
