"""The gradient of a kernel from patches, and convolutions with their channels last, against JAX's own."""

import hypothesis
import hypothesis.strategies as some
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ecjax.graph import convolutions
from tests import zoo

pytestmark = pytest.mark.usefixtures("float64")


@hypothesis.given(
    axes=some.integers(1, 2),
    groups=some.integers(1, 2),
    window=some.integers(1, 3),
    strides=some.integers(1, 2),
    dilations=some.tuples(some.integers(1, 2), some.integers(1, 2)),
    padding=some.tuples(some.integers(-1, 2), some.integers(0, 2)),
    order=some.sampled_from(["last", "first"]),
)
def test_every_convolution(axes, groups, window, strides, dilations, padding, order):
    spatial = "HW"[:axes]
    inputs_and_kernel = (f"N{spatial}C", f"{spatial}IO") if order == "last" else (f"NC{spatial}", f"OI{spatial}")
    names = (*inputs_and_kernel, inputs_and_kernel[0])
    shapes = {"N": 2, "C": 2 * groups, "I": 2, "O": 3 * groups, "H": 7, "W": 6}
    generator = np.random.default_rng(0)
    inputs = jnp.asarray(generator.normal(size=[shapes[name] for name in names[0]]))
    kernel = jnp.asarray(generator.normal(size=[shapes[name] if name in "IO" else window for name in names[1]]))
    options = {
        "window_strides": (strides,) * axes,
        "padding": (padding,) * axes,
        "lhs_dilation": (dilations[0],) * axes,
        "rhs_dilation": (dilations[1],) * axes,
        "dimension_numbers": names,
        "feature_group_count": groups,
    }

    def convolved(inputs, kernel):
        return lax.conv_general_dilated(inputs, kernel, **options)

    outputs, pull = jax.vjp(convolved, inputs, kernel)
    slopes = jnp.cos(jnp.arange(outputs.size, dtype=outputs.dtype)).reshape(outputs.shape)
    of_inputs, of_kernel = pull(slopes)
    (equation,) = jax.make_jaxpr(convolved)(inputs, kernel).eqns
    assert convolutions.has_patches(equation)
    np.testing.assert_allclose(
        convolutions.channels_last(equation, [inputs, kernel])[0], outputs, rtol=1e-12, atol=1e-12
    )
    found = convolutions.kernel_gradient(equation, inputs, slopes, kernel.shape)
    np.testing.assert_allclose(found, of_kernel, rtol=1e-10, atol=1e-10)
    (found,), _ = convolutions._by_patches(equation, [inputs, kernel])
    np.testing.assert_allclose(found, outputs, rtol=1e-12, atol=1e-12)
    transposed = jax.linear_transpose(lambda inputs: convolved(inputs, kernel), inputs)
    found = convolutions.all_channels_last(lambda slopes: transposed(slopes)[0])(slopes)
    np.testing.assert_allclose(found, of_inputs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["convolutions", "positions"])
def test_a_network_inside_a_loop_is_the_same(name):
    network, params, inputs = zoo.ZOO[name]().example
    fast = convolutions.in_loops(jax.jit(network))
    assert fast == convolutions.in_loops(fast.network)  # nothing is compiled again for the same network
    rounding = {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(fast(params, inputs), network(params, inputs), **rounding)
    slopes, others = (jax.grad(lambda p, of=of: (of(p, inputs) ** 2).sum())(params) for of in (fast, network))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, **rounding), slopes, others)
    if name == "positions":
        assert str(jax.make_jaxpr(fast)(params, inputs)) == str(jax.make_jaxpr(fast.network)(params, inputs))
