"""Networks of any kind made smaller: what is removed, what can be folded, and what has to stay."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecjax import _trees, compact, graph, networks
from tests import examples
from tests.architectures import ARCHITECTURES
from tests.test_coupled import double, half, size

pytestmark = pytest.mark.usefixtures("float64")
QUICK = ("scanned blocks",)
SLOW = ("residual network", "grouped convolutions", "gated transformer", "vision transformer", "u-net", "recurrent")
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


def assert_compacted(network, params, inputs, atol=1e-12):
    smaller, small = compact.compact(network, params, inputs)
    expected = network(params, inputs)
    np.testing.assert_allclose(smaller(small, inputs), expected, rtol=atol, atol=atol * float(jnp.abs(expected).max()))
    return small


@pytest.mark.parametrize("name", CASES)
def test_units_that_are_zero_in_all_leaves_are_found_and_go(name):
    network, params, inputs = ARCHITECTURES[name]().example
    static = _trees.static_leaves(params)
    network, params, inputs = _trees.WithStatic(network, static), double(_trees.arrays(params)), double(inputs)
    groups = networks.groups(network, params, inputs)
    removed = half(groups)
    zeros = graph.zeroed(params, groups, removed)
    _, expected = graph.without_units(network, params, groups, removed)
    precision = 1e-12 if network(params, inputs).dtype == jnp.float64 else 1e-5
    small = assert_compacted(network, zeros, inputs, precision)
    assert size(small) <= size(expected) < size(params)


def convolved(padding):
    def network(params, x):
        options = {"dimension_numbers": ("NWC", "WIO", "NWC")}
        hidden = jax.nn.sigmoid(jax.lax.conv_general_dilated(x, params["a"], (1,), "SAME", **options) + params["b"])
        hidden = jax.lax.conv_general_dilated(hidden, params["c"], (1,), padding, **options) + params["d"]
        return jnp.tanh(hidden).mean(1) @ params["e"]

    params = {"a": array(3, 2, 5).at[:, :, 1].set(0), "b": array(5), "c": array(3, 5, 4), "d": array(4)}
    return network, params | {"e": array(4, 3)}, array(6, 8, 2)


def test_a_constant_channel_is_folded_where_no_zeros_are_padded():
    network, params, inputs = convolved("VALID")
    small = assert_compacted(network, params, inputs)
    assert small["a"].shape == (3, 2, 4)
    assert small["c"].shape == (3, 4, 4)
    network, params, inputs = convolved("SAME")
    assert assert_compacted(network, params, inputs)["a"].shape == (3, 2, 5)
    unread = params | {"c": params["c"].at[:, 3].set(0)}
    assert assert_compacted(network, unread, inputs)["a"].shape == (3, 2, 4)


def test_a_channel_that_nothing_but_a_norm_reads_stays_until_it_is_zero():
    params = {"a": array(4, 6), "scale": array(6), "b": array(6, 3).at[2].set(0)}

    def network(params, x):
        hidden = x @ params["a"]
        return hidden * jax.lax.rsqrt((hidden**2).mean(-1, keepdims=True) + 1e-6) * params["scale"] @ params["b"]

    inputs = array(5, 4)
    assert networks.groups(network, params, inputs)[0].free
    assert assert_compacted(network, params, inputs)["a"].shape == (4, 6)
    zero = params | {"a": params["a"].at[:, 2].set(0)}
    small = assert_compacted(network, zero, inputs)
    assert small["a"].shape == (4, 5)
    assert small["scale"].shape == (5,)


def test_a_head_that_nothing_reads_goes_as_a_whole():
    example = ARCHITECTURES["rotary attention"]().example
    params = double(example.params)
    params["o"] = params["o"].at[1].set(0)
    small = assert_compacted(example.network, params, double(example.inputs))
    assert {name: leaf.shape for name, leaf in small.items() if name in "qvo"} == {
        "q": (4, 1, 4),
        "v": (4, 1, 4),
        "o": (1, 4, 3),
    }


def test_a_network_that_answers_otherwise_with_smaller_params_is_told():
    """Equinox's attention divides by the root of a head's width as it finds it."""
    attention = eqx.nn.MultiheadAttention(2, 8, dtype=jnp.float64, key=jax.random.key(0))
    params = eqx.tree_at(lambda a: (a.query_proj.weight, a.key_proj.weight), attention, _narrowed(attention))
    network = lambda attention, x: jax.vmap(lambda row: attention(row, row, row))(x)  # noqa: E731
    inputs = array(5, 3, 8)
    with pytest.warns(UserWarning, match="takes the smaller params too, and answers otherwise"):
        smaller, small = compact.compact(network, params, inputs)
    np.testing.assert_allclose(smaller(small, inputs), network(params, inputs), rtol=1e-9)
    np.testing.assert_allclose(jax.jit(smaller)(_numbers(small), inputs), network(params, inputs), rtol=1e-9)


def _numbers(module):
    """Without what is no number: ``jit`` makes arrays of the others, as of the rate of the dropout."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array | float | int) else None, module)


def _narrowed(attention):
    """Queries and keys whose last feature of each head is zero."""
    gone = (jnp.arange(8) % 4 == 3)[:, None]
    return tuple(jnp.where(gone, 0, part.weight) for part in (attention.query_proj, attention.key_proj))


def test_constants_go_on_until_a_bias_takes_them():
    """Values that are constant, through a residual connection and an einsum; the scan keeps what it reads."""
    params = {"a": array(4, 5).at[:, [0, 3]].set(0), "b": array(5), "c": array(5, 5) / 2, "d": array(5)}
    params |= {"e": array(5, 3), "f": array(3)}

    def network(params, x):
        hidden = jnp.cos(x @ params["a"] + params["b"])
        return jnp.einsum("nd,do->no", hidden, params["e"]) + params["f"]

    small = assert_compacted(network, params, array(6, 4))
    assert small["e"].shape == (3, 3)

    def scanned(params, x):
        start = jnp.cos(x @ params["a"] + params["b"])
        turn = lambda h, _: (h + jnp.tanh(h @ params["c"] + params["d"]), None)  # noqa: E731
        return jax.lax.scan(turn, start, None, length=2)[0] @ params["e"] + params["f"]

    assert assert_compacted(scanned, params, array(6, 4))["e"].shape == (5, 3)


def test_what_is_compacted_is_compacted_again_and_computes_in_its_own_precision():
    example = examples.mlp(widths=(7, 6, 3))
    module = lambda params, x: example.network(params, x) + 0 * x.sum(-1, keepdims=True)  # noqa: E731
    kernel = example.params["Dense_1"]["kernel"]
    params = example.params | {"Dense_1": example.params["Dense_1"] | {"kernel": kernel.at[0].set(0)}}
    smaller, small = compact.compact(module, params, example.inputs)
    assert small["Dense_0"]["kernel"].shape == (5, 6)
    assert smaller is not module
    small = _trees.replace(small, {"Dense_2/kernel": small["Dense_2"]["kernel"].at[:2].set(0)})
    smallest, fewest = compact.compact(smaller, small, example.inputs)
    assert fewest["Dense_2"]["kernel"].shape == (4, 3)
    np.testing.assert_allclose(smallest(fewest, example.inputs), smaller(small, example.inputs), rtol=1e-12)
    assert smallest(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), fewest), example.inputs.astype(jnp.bfloat16))[
        0
    ].dtype == (jnp.bfloat16)
