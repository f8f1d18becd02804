"""Biases that the outputs ignore, as attention ignores the biases of its keys: softmax sees no common shift.

Their gradients are zero but for rounding, and a quotient of two of them is noise. What is ignored is ignored whatever
the params are, so kernels and biases are drawn at random, where attention is smooth, and everything is computed in the
widest dtype that the network has, at least float32: the sum of a neuron's gradients over samples and positions is then
either of the size of its terms, or that of their rounding.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, PyTree

from ecjax import _batches, _trees
from ecjax._types import Inputs
from ecjax.graph.evaluate import evaluate, in_full, promoted
from ecjax.graph.layers import Layer, Layers
from ecjax.graph.layout import as_leaf, as_matrices
from ecjax.graph.reading import Reading, at_least_two, read

# How large kernels are drawn; a bias is ignored if it is in two draws. Small ones are for what a network scales itself.
_SCALES = 1.0, 1 / 2, 1 / 8, 1 / 32
_LOOKED_AT = 4  # samples
_ROUNDINGS = 1000  # a sum of T terms of random signs is 1/√T of their size, of rounding errors about one of these


def ignored(
    reading: Reading, params: PyTree, inputs: Array, factor: Callable[[Array, Array], Array]
) -> dict[str, Bool[Array, "stack out"]]:
    """By the kernel's path, which of its neurons have a bias that the outputs, or their metric, ignore.

    Args:
        reading: of the network, for params and inputs of these shapes.
        params: of arrays alone.
        inputs: a few samples.
        factor: of the metric: the Fisher metric of logits does not see what is added to all of them.
    """
    biased = [(layer, layer.bias) for layer in reading.layers if layer.bias is not None and not layer.outer]
    if not biased:
        return {}
    biases = [bias for _, bias in biased]
    sites = {site.path: site for bias in biases for site in reading.biases[bias]}
    given = _trees.by_path(params)
    floating = [leaf.dtype for leaf in (*given.values(), inputs) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    widest = jnp.result_type(jnp.float32, *floating)
    leaves = {path: promoted(leaf, widest) for path, leaf in given.items()}
    inputs = promoted(inputs, widest)

    def of_draw(draw):
        key, scale = draw
        drawn = dict(leaves)
        for number, (layer, bias) in enumerate(biased):
            own = jax.random.split(jax.random.fold_in(key, number))
            drawn[layer.kernel] = _drawn(own[0], layer, drawn[layer.kernel], scale)
            drawn[bias] = jax.random.normal(own[1], drawn[bias].shape, drawn[bias].dtype) / 4
        in_widest = functools.partial(in_full, least=widest)
        return _sums(reading, biases, sites, drawn, inputs, key, factor, in_widest)

    keys = jax.random.split(jax.random.key(0), len(_SCALES))
    found, result = lax.map(of_draw, (keys, jnp.asarray(_SCALES))), {}
    for layer, bias in biased:
        sums, terms = found[bias]
        small = (sums <= _ROUNDINGS * jnp.finfo(sums.dtype).eps * terms) & (terms > 0)
        result[layer.kernel] = as_matrices(small.sum(0) > 1, layer.bias_layout)[:, 0]
    return result


def ignored_in(
    network: Callable, layers: Layers, params: PyTree, inputs: Inputs, factor: Callable[[Array, Array], Array]
) -> dict[str, Array]:
    """``ignored`` of a network, seen with a few of its inputs.

    Args:
        layers: that count; without any that sees several rows of a sample, nothing is looked at.
        inputs: all of them.
        factor: of the metric.
    """
    if all(layer.outer or layer.bias is None for layer in layers):
        return {}
    few = at_least_two(_batches.spread(inputs, _LOOKED_AT))
    names = {layer.kernel for layer in layers}
    found = ignored(read(network, params, few), params, few, factor)
    return {path: neurons for path, neurons in found.items() if path in names}


def _drawn(key, layer: Layer, kernel: Array, scale: Array) -> Array:
    matrices = jax.random.normal(key, layer.layout.sizes, kernel.dtype)
    return as_leaf(matrices * (scale / jnp.sqrt(max(layer.layout.sizes[1], 1))).astype(kernel.dtype), layer.layout)


def _sums(
    reading: Reading, biases: list[str], sites, leaves: dict[str, Array], inputs: Array, key, factor, in_full
) -> dict:
    """By the bias's path, the sum of its gradients over samples and positions, and the sum of their sizes."""
    at = frozenset(sites)

    def outputs_of(taps):
        def with_tap(equation, operands, _, tap):
            (result,) = in_full(equation, operands)
            return [result + tap], {}

        (outputs,), _ = evaluate(reading.jaxpr, [*leaves.values(), inputs], at, with_tap, taps, in_full)
        return outputs

    shapes = {}

    def note(equation, operands, site, _):
        (result,) = in_full(equation, operands)
        shapes[site] = jax.ShapeDtypeStruct((*sites[site].turns, *result.shape), result.dtype)
        return [result], {}

    jax.eval_shape(lambda: evaluate(reading.jaxpr, [*leaves.values(), inputs], at, note, {}, in_full)[0])
    outputs, pull = jax.vjp(outputs_of, {site: jnp.zeros(s.shape, s.dtype) for site, s in shapes.items()})
    (slopes,) = pull(factor(outputs, jax.random.normal(key, outputs.shape, outputs.dtype)).astype(outputs.dtype))

    def gathered(slopes):
        """What the biases' own gradients would be, were these those of the sums that they enter."""

        def weighed(moving):
            def of_bias(equation, operands, site, slope):
                bias = operands[sites[site].side]
                result = in_full(equation, lax.stop_gradient(operands))
                return result, {str(site): (jnp.broadcast_to(bias, slope.shape) * slope).sum()}

            arguments = [*(leaves | moving).values(), inputs]
            terms = evaluate(reading.jaxpr, arguments, at, of_bias, slopes, in_full)[1]
            return sum(term.sum() for term in terms.values())

        return jax.grad(weighed)({bias: leaves[bias] for bias in biases})

    sums, terms = gathered(slopes), gathered(jax.tree.map(jnp.abs, slopes))
    return {bias: (jnp.abs(sums[bias]), terms[bias]) for bias in biases}
