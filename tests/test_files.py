"""Files of params of any kind: containers, dtypes, sparse arrays of any number of axes, and networks that are told."""

import collections
import functools
import math

import equinox as eqx
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from ecjax import _trees, compact, graph, networks
from ecjax.compact import answers
from tests.architectures import ARCHITECTURES

DTYPES = ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "complex64", "complex128"]
DTYPES += ["int32", "uint8", "int64", "int4", "bool"]


def as_bytes(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()


def assert_same(found, params):
    assert jax.tree.structure(found) == jax.tree.structure(params)
    found, expected = networks.by_path(found), networks.by_path(params)
    for path, leaf in expected.items():
        if _trees.is_array(leaf):
            assert found[path].dtype == leaf.dtype
            assert found[path].shape == leaf.shape
            assert as_bytes(found[path]) == as_bytes(leaf)
        else:
            assert found[path] is leaf


@flax.struct.dataclass
class Layer:
    kernel: jax.Array
    scale: jax.Array
    name: str = flax.struct.field(pytree_node=False, default="layer")


@jax.tree_util.register_pytree_node_class
class Nameless:
    """A container that says nothing of the names of what it holds."""

    def __init__(self, *leaves):
        self.leaves = leaves

    def tree_flatten(self):
        return self.leaves, None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


def module():
    rngs = nnx.Rngs(0, dropout=1)
    return nnx.Sequential(
        nnx.Linear(2, 3, rngs=rngs, param_dtype=jnp.bfloat16), nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
    )


CONTAINERS = {
    "an NNX module": module,
    "the state of an NNX module": lambda: nnx.state(module()),
    "the params of an NNX module": lambda: nnx.state(module(), nnx.Param),
    "an Equinox module": lambda: eqx.nn.Sequential(
        [eqx.nn.Conv2d(2, 3, 2, key=jax.random.key(0)), eqx.nn.Dropout(), eqx.nn.Lambda(jnp.tanh)]
    ),
    "a dataclass": lambda: [Layer(jnp.ones((2, 3)), jnp.zeros(())), (jnp.zeros((0, 3)), None, {})],
    "ordered and default dicts": lambda: collections.OrderedDict(
        b=jnp.ones(2), a=collections.defaultdict(list, {3: jnp.zeros((2, 0))})
    ),
    "a container without names": lambda: {"a": Nameless(jnp.ones(2), (np.arange(3),))},
    "one array": lambda: jnp.arange(6.0).reshape(2, 3),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_come_back_from_one_like_them(kind, tmp_path):
    params = CONTAINERS[kind]()
    compact.save(tmp_path / "net", params)
    assert_same(compact.load(tmp_path / "net", like=params).params, params)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((9,), "int8") if _trees.is_array(leaf) else leaf, params)
    assert_same(compact.load(tmp_path / "net", like=shapes).params, params)
    nested = compact.load(tmp_path / "net").params
    assert sorted(networks.by_path(nested)) == sorted(networks.by_path(_trees.arrays(params)))
    again = tmp_path / "again"
    compact.save(again, nested)  # nested dicts are params like others
    assert_same(compact.load(again, like=params).params, params)


def test_a_state_with_random_keys_is_a_module_again(tmp_path):
    graph, state = nnx.split(module())
    compact.save(tmp_path / "net", state)
    again = nnx.merge(graph, jax.tree.map(jnp.asarray, compact.load(tmp_path / "net", like=state).params))
    inputs = jnp.ones((4, 2))
    np.testing.assert_array_equal(again(inputs), module()(inputs))  # the same numbers are dropped
    other = jax.random.key(3, impl="rbg")
    compact.save(tmp_path / "key", {"keys": jax.random.split(other, 5)})
    assert_same(compact.load(tmp_path / "key").params, {"keys": jax.random.split(other, 5)})


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 6), max_size=5).map(tuple),
    sparsity=st.sampled_from([0, 0.5, 0.9, 0.99, 1]),
    axis=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_every_bit_of_arrays_of_any_shape(dtype, shape, sparsity, axis, seed, tmp_path_factory):
    """The zeros lie anywhere, or fill whole slices along an axis, as where units went."""
    generator = np.random.default_rng(seed)
    lengths = [n if place == axis else 1 for place, n in enumerate(shape)] if axis < len(shape) else shape
    values = generator.normal(size=shape) * (generator.random(lengths) >= sparsity)
    values = np.asarray(-4 * values if dtype in ("complex64", "complex128") else 4 * values).astype(dtype)
    path = tmp_path_factory.mktemp("files") / "net"
    compact.save(path, {"a": values, "b": np.array(values, order="F")})
    assert_same(compact.load(path).params, {"a": values, "b": values})


def test_bytes_in_another_order(tmp_path):
    values = np.arange(6.0).reshape(2, 3)
    compact.save(tmp_path / "net", {"a": values.astype(">f4"), "b": values.astype(">i8")})
    found = compact.load(tmp_path / "net").params
    assert [leaf.dtype for leaf in found.values()] == [np.float32, np.int64]
    for leaf in found.values():
        np.testing.assert_array_equal(leaf, values)


@functools.cache
def kernel(shape, sparsity):
    """Random entries of which exactly a fraction is zero."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=math.prod(shape)).astype(np.float32)
    values[generator.permutation(values.size)[: round(sparsity * values.size)]] = 0
    return values.reshape(shape)


@pytest.mark.parametrize("shape", [(3, 3, 16, 32), (32, 16, 3, 3), (4608,), (16, 9, 32), (4, 4, 4, 4, 18)])
def test_sparse_kernels_of_any_layout_make_small_files(shape, tmp_path):
    """At 0.95 an entry takes 5 or 6 bytes, and each column of the best matrix 4."""
    empty = compact.save(tmp_path / "net", {"kernel": np.zeros((0, *shape), np.float32)})
    dense = compact.save(tmp_path / "net", {"kernel": kernel(shape, 0)}) - empty
    sparse = compact.save(tmp_path / "net", {"kernel": kernel(shape, 0.95)}) - empty
    entries = round(0.05 * math.prod(shape))
    columns = [math.prod(shape[axis:]) for axis in range(1, len(shape) + 1)]
    best = min(entries * (5 if 4608 // n <= 256 else 6) + 4 * (n + 1) for n in columns)
    assert abs(dense - 4 * 4608) < 100
    assert abs(sparse - best) < 300  # the header names three parts instead of one
    assert sparse < 0.12 * dense
    half = compact.save(tmp_path / "net", {"kernel": kernel(shape, 0.1)}) - empty
    assert half == dense


NETWORKS = ["gated transformer", "scanned blocks"]
SLOW = ["residual network", "u-net", "grouped convolutions", "tied embedding"]


@pytest.mark.parametrize("name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_any_network_is_told_from_others(name, tmp_path):
    """Of images, of sequences and of tokens; Linen, NNX, Equinox and plain JAX."""
    network, params, inputs = ARCHITECTURES[name]().example
    network = eqx.filter_jit(network)
    compact.save(tmp_path / "net", params, network=network, inputs=inputs)
    saved = compact.load(tmp_path / "net", network, like=params)
    assert_same(saved.params, params)
    assert saved.widths is None
    assert saved.examples.inputs.dtype == inputs.dtype
    with pytest.raises(ValueError, match="answers otherwise"):
        compact.load(tmp_path / "net", lambda params, x: 1.001 * network(params, x), like=params)
    with pytest.raises(ValueError, match=r"net: the network does not take inputs of shape \(4, .*in nested dicts"):
        compact.load(tmp_path / "net", lambda params, x: network([params], x))


def test_a_network_that_reads_other_tokens_is_refused(tmp_path):
    """One that shifts its tokens by one, and one that looks ahead."""
    network, params, tokens = ARCHITECTURES["gated transformer"]().example
    compact.save(tmp_path / "net", params, network=network, inputs=np.asarray(tokens, np.uint8))
    assert compact.load(tmp_path / "net", network, like=params).examples.inputs.dtype == np.uint8
    for other in (lambda params, x: network(params, x + 1), lambda params, x: network(params, x[:, ::-1])):
        with pytest.raises(ValueError, match="answers otherwise"):
            compact.load(tmp_path / "net", other, like=params)


def test_outputs_that_are_complex_or_whole_numbers(tmp_path):
    params, inputs = {"w": np.arange(6, dtype=np.complex64).reshape(3, 2) * (1 + 1j)}, np.ones((5, 3), np.float32)
    network = lambda params, x: x @ params["w"]  # noqa: E731
    compact.save(tmp_path / "net", params, network=network, inputs=inputs)
    compact.load(tmp_path / "net", network)
    with pytest.raises(ValueError, match="answers otherwise"):
        compact.load(tmp_path / "net", lambda params, x: network(params, x).conj())
    classes = lambda params, x: jnp.round(x @ params["w"].real).astype(int)  # noqa: E731
    compact.save(tmp_path / "net", params, network=classes, inputs=inputs)
    compact.load(tmp_path / "net", classes)
    with pytest.raises(ValueError, match="answers otherwise"):
        compact.load(tmp_path / "net", lambda params, x: classes(params, x) + 1)
    counts = lambda params, x: x + params["n"]  # noqa: E731
    whole = (counts, {"n": np.arange(3)}, np.ones((2, 3), int))
    assert answers.rounding(*whole) == 0


def test_a_network_with_fewer_units_is_told_too(tmp_path):
    network, params, inputs = ARCHITECTURES["scanned blocks"]().example
    groups = networks.groups(network, params, inputs)
    smaller, small = graph.without_units(network, params, groups, {0: [2], 1: [0, 6]})
    compact.save(tmp_path / "net", small, network=smaller, inputs=inputs)
    assert compact.load(tmp_path / "net", smaller).params["in"].shape == (3, 5, 5)
    with pytest.raises(ValueError, match="net: the network does not take inputs"):
        compact.load(tmp_path / "net", graph.without_units(network, params, groups, {1: [0, 6]})[0])


def test_params_without_values_are_refused(tmp_path):
    module = nn.Dense(3)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="params hold no values to save: they are shapes, or traced"):
        compact.save(tmp_path / "net", shapes)
    with pytest.raises(ValueError, match="call this outside of jit"):
        jax.jit(lambda params: compact.save(tmp_path / "net", params))({"a": jnp.ones(2)})
