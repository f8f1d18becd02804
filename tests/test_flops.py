"""Floating-point operations, against XLA's own count and against counts by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecjax import graph, networks
from ecjax.graph import flops
from tests import examples
from tests.architectures import ARCHITECTURES


def shape(*lengths, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(lengths, dtype)


def counted(function, *shapes):
    return flops.of_jaxpr(jax.make_jaxpr(function)(*shapes))


def by_loops(entries, window, results, stride, low, spread, dilation):
    """Goes over all results and all places of the window."""
    places = np.arange(results)[:, None] * stride + np.arange(window) * dilation - low
    return int(((places >= 0) & (places <= (entries - 1) * spread) & (places % spread == 0)).sum())


@given(
    entries=st.integers(1, 9),
    window=st.integers(1, 5),
    strides=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3)),
    padding=st.tuples(st.integers(-2, 4), st.integers(-2, 4)),
)
def test_convolutions_count_what_meets_an_entry(entries, window, strides, padding):
    stride, spread, dilation = strides
    how = {"window_strides": (stride,), "lhs_dilation": (spread,), "rhs_dilation": (dilation,), "padding": [padding]}
    function = lambda x, w: jax.lax.conv_general_dilated(x, w, **how)  # noqa: E731
    inputs, kernel = shape(2, 3, entries), shape(4, 3, window)
    results = jax.eval_shape(function, inputs, kernel).shape[-1]
    pairs = by_loops(entries, window, results, stride, padding[0], spread, dilation)
    assert counted(function, inputs, kernel).products == 2 * 2 * 3 * 4 * pairs


def test_groups_of_channels_and_of_samples():
    grouped = lambda x, w: jax.lax.conv_general_dilated(x, w, (1,), "VALID", feature_group_count=3)  # noqa: E731
    assert counted(grouped, shape(2, 6, 5), shape(9, 2, 2)).products == 2 * (2 * 9 * 4) * (2 * 2)
    batches = lambda x, w: jax.lax.conv_general_dilated(x, w, (1,), "VALID", batch_group_count=2)  # noqa: E731
    assert counted(batches, shape(4, 6, 5), shape(8, 6, 2)).products == 2 * (2 * 8 * 4) * (6 * 2)


def test_products_of_any_axes_and_of_complex_numbers():
    contracted = lambda a, b: jnp.einsum("nthf,nshf->nhts", a, b)  # noqa: E731
    assert counted(contracted, shape(2, 3, 4, 5), shape(2, 6, 4, 5)).products == 2 * 2 * 4 * 3 * 6 * 5
    multiplied = counted(jnp.matmul, shape(2, 3, dtype=jnp.complex64), shape(3, 4, dtype=jnp.complex64))
    assert multiplied.products == 8 * 2 * 3 * 4
    assert counted(jnp.matmul, shape(2, 0), shape(0, 4)) == graph.Flops()
    rows = counted(jax.lax.ragged_dot, shape(6, 3), shape(2, 3, 4), shape(2, dtype=jnp.int32))
    assert rows.products == 2 * 6 * 3 * 4


@pytest.mark.parametrize("name", ["mlp", "grouped convolutions", "residual network", "u-net"])
def test_products_are_those_of_xla(name):
    """XLA counts elementwise operations in its own way; with none but products there is nothing to differ in."""
    network, params, inputs = ARCHITECTURES[name]().example
    jaxpr = jax.make_jaxpr(lambda arrays, inputs: network(arrays, inputs))(params, inputs)
    alone = []
    for equation in _products(jaxpr.jaxpr):
        arguments = [shape(*variable.aval.shape, dtype=variable.aval.dtype) for variable in equation.invars]
        function = lambda *values, equation=equation: equation.primitive.bind(*values, **equation.params)  # noqa: E731
        alone.append(jax.jit(function).lower(*arguments).cost_analysis()["flops"])
    assert graph.count_flops(network, params, inputs).products == sum(alone)


def _products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for value in equation.params.values():
            if isinstance(getattr(value, "jaxpr", value), jax.extend.core.Jaxpr) and "custom" not in str(equation):
                yield from _products(getattr(value, "jaxpr", value))


def test_a_scan_counts_as_often_as_it_runs():
    network, params, _ = ARCHITECTURES["scanned blocks"]().example
    inputs = shape(5, 4)
    block = 6 * 7 + 7 * 6
    found = graph.count_flops(network, params, inputs)
    assert found.products == 2 * 5 * (4 * 6 + 3 * block + 6 * 2)
    # A turn: squares, their sum, a division, ε, the root, two scales; a bias and silu (σ and ·); the sum.
    assert found.others == 5 * 3 * (6 + 6 + 1 + 1 + 1 + 6 + 6 + 7 + 7 + 7 + 6)
    assert not found.unknown


def test_a_loop_is_counted_once_and_said_to_be_open():
    def network(params, x):
        turn = lambda carry: (carry[0] - 1, carry[1] @ params)  # noqa: E731
        return jax.lax.while_loop(lambda carry: carry[0] > 0, turn, (x.max().astype(int), x))[1]

    found = graph.count_flops(network, jnp.ones((4, 4)), shape(3, 4))
    assert (found.products, found.unknown) == (2 * 3 * 4 * 4, ("while",))
    assert str(found) == f"at least {found.total:,}"


def test_of_branches_the_dearest_counts():
    def network(params, x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ params @ params, lambda x: x @ params, x)

    assert graph.count_flops(network, jnp.ones((4, 4)), shape(3, 4)).products == 2 * 2 * 3 * 4 * 4


def test_other_operations():
    assert counted(nn.relu, shape(3, 4)) == graph.Flops(others=12)
    assert counted(lambda x: x.sum(0), shape(3, 4)) == graph.Flops(others=12)
    assert counted(lambda x: x.T.reshape(2, 6)[:, 1:], shape(3, 4)) == graph.Flops()
    assert counted(lambda x: x + 1, shape(3, dtype=jnp.int32)) == graph.Flops()
    assert counted(lambda table, i: table[i], shape(9, 4), shape(3, dtype=jnp.int32)) == graph.Flops()
    assert counted(lambda x: nn.max_pool(x, (2, 2), (2, 2)), shape(1, 4, 4, 3)) == graph.Flops(others=4 * 4 * 3)
    assert counted(jnp.fft.rfft, shape(3, 8)) == graph.Flops(others=3 * 5 * 8 * 3 // 2)
    assert counted(lambda x: jnp.fft.irfft(x, 8), shape(3, 5, dtype=jnp.complex64)).others == 3 * 5 * 8 * 3 // 2
    assert counted(jnp.cumsum, shape(3, 4)) == graph.Flops(others=12)
    added = counted(lambda x, i, y: x.at[i].add(y), shape(9, 4), shape(2, dtype=jnp.int32), shape(2, 4))
    assert added == graph.Flops(others=8)
    assert counted(lambda x, i, y: x.at[i].set(y), shape(9, 4), shape(2, dtype=jnp.int32), shape(2, 4)).total == 0
    assert counted(jnp.linalg.cholesky, shape(3, 3)).unknown == ("cholesky",)


def test_what_nothing_uses_is_left_out():
    def network(params, x):
        _ = jnp.exp(x @ params)
        return x @ params

    assert graph.count_flops(network, jnp.ones((4, 4)), shape(3, 4)) == graph.Flops(products=96)


def test_leaves_that_are_no_arrays_and_shapes_for_params():
    example = examples.mlp(widths=(7, 3))
    shapes = jax.tree.map(lambda leaf: shape(*leaf.shape, dtype=leaf.dtype), example.params)
    expected = graph.count_flops(*example)
    assert graph.count_flops(example.network, shapes, example.inputs) == expected
    assert expected.products == 2 * 23 * (5 * 7 + 7 * 3)
    network = lambda params, x: params["activation"](example.network(params["layers"], x))  # noqa: E731
    params = {"layers": example.params, "activation": jnp.tanh}
    assert graph.count_flops(network, params, example.inputs) == expected._replace(others=expected.others + 23 * 3)


def test_the_operations_after_units_have_gone_follow_from_shapes():
    network, params, inputs = ARCHITECTURES["convolutions"]().example
    groups = networks.groups(network, params, inputs)
    smaller, small = graph.without_units(network, params, groups, {0: [1]})
    assert graph.count_flops(smaller, small, inputs).products < graph.count_flops(network, params, inputs).products
