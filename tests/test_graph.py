"""The reading of a network: what each leaf does, in order of execution, whatever it is called and wherever it lies."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from jax.ad_checkpoint import checkpoint_name

from ecjax import _door, _trees, graph, networks, score
from tests import zoo

pytestmark = pytest.mark.usefixtures("float64")
N = 5


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


def inputs(features=4, samples=N):
    return array(samples, features, seed=1)


def roles(layers):
    return [(layer.kernel, layer.bias) for layer in layers]


def scored(network, params, x, **options):
    """The layers as every score reads them; a kernel that can't be scored is a ValueError."""
    network, params, _ = _trees.split(network, params)
    return _door.layers(network, params, x, **options)


def require_gradients(network, params, x):
    """What the reading says of each scored layer is what per-sample gradients are: of the kernel, and of the bias."""
    network, params, _ = _trees.split(network, params)
    outputs, pairs = jax.jit(_gradients, static_argnums=0)(network, params, x)
    np.testing.assert_allclose(*outputs, rtol=1e-12, atol=1e-12)
    for path, (found, expected) in pairs.items():
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12, err_msg=path)


def _gradients(network, params, x):
    """The outputs twice, and by path each leaf's per-sample gradients twice: of the network, and from the taps."""
    reading = graph.read(network, params, x)
    layers = graph.Layers(layer for layer in reading.layers if not layer.reason)
    zeros = graph.zero_taps(layers, params, len(x))
    outputs, pull = jax.vjp(lambda taps: graph.tapped(reading, params, x, taps)[0], zeros)
    (taps,) = jax.vmap(lambda row: pull(jnp.broadcast_to(row, outputs.shape)))(jnp.eye(outputs.shape[1]))
    layer_inputs = graph.tapped(reading, params, x, {})[1]
    leaves = _trees.by_path(params)
    moved = {path: leaves[path] for layer in layers for path in (layer.kernel, layer.bias) if path is not None}
    by_leaf = jax.vmap(
        lambda x: jax.jacrev(lambda moved: network(_trees.replace(params, moved), x[None])[0])(moved), out_axes=1
    )(x)
    pairs = {}
    for layer in layers:
        of_taps = taps[layer.kernel]
        of_kernel = jax.vmap(jax.vmap(lambda leaf, layer=layer: graph.as_matrices(leaf, layer.layout)[0]))
        pairs[layer.kernel] = (
            of_kernel(by_leaf[layer.kernel]),
            layer_inputs[layer.kernel][:, :, None] * of_taps[:, :, None],
        )
        if layer.bias is not None:
            of_bias = jax.vmap(jax.vmap(lambda leaf, layer=layer: graph.as_matrices(leaf, layer.bias_layout)[0, 0]))
            pairs[layer.bias] = of_bias(by_leaf[layer.bias]), of_taps
    return (outputs, network(params, x)), pairs


# Containers, and the order of layers.


class Dense(NamedTuple):
    scale: jax.Array
    kernel: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Two:
    last: Any
    first: Any


class Module(eqx.Module):
    tail: eqx.nn.Linear
    body: eqx.nn.Linear
    activation: Any
    width: int = eqx.field(static=True)

    def __call__(self, x):
        return jax.vmap(self.tail)(self.activation(jax.vmap(self.body)(x)))


def linear(inputs, outputs):
    return eqx.nn.Linear(inputs, outputs, key=jax.random.key(0))


def two_layers(of_first, of_second):
    def network(params, x):
        (first, a), (second, b) = of_first(params), of_second(params)
        return jnp.tanh(x @ first + a) @ second + b

    return network


W, B, U, C = (4, 3), (3,), (3, 2), (2,)
CONTAINERS = {
    "dict": lambda: (
        two_layers(lambda p: (p["z"]["w"], p["z"]["b"]), lambda p: (p["a"]["w"], p["a"]["b"])),
        {"z": {"w": array(*W), "b": array(*B)}, "a": {"w": array(*U), "b": array(*C)}},
        [("z/w", "z/b"), ("a/w", "a/b")],
    ),
    "FrozenDict": lambda: (
        two_layers(lambda p: (p["z"]["w"], p["z"]["b"]), lambda p: (p["a"]["w"], p["a"]["b"])),
        FrozenDict({"z": {"w": array(*W), "b": array(*B)}, "a": {"w": array(*U), "b": array(*C)}}),
        [("z/w", "z/b"), ("a/w", "a/b")],
    ),
    "list of tuples": lambda: (
        two_layers(lambda p: p[1], lambda p: p[0]),
        [(array(*U), array(*C)), (array(*W), array(*B))],
        [("1/0", "1/1"), ("0/0", "0/1")],
    ),
    "NamedTuple": lambda: (
        two_layers(lambda p: (p[0].scale, p[0].kernel), lambda p: (p[1].scale, p[1].kernel)),
        (Dense(array(*W), array(*B)), Dense(array(*U), array(*C))),
        [("0/scale", "0/kernel"), ("1/scale", "1/kernel")],
    ),
    "dataclass": lambda: (
        two_layers(lambda p: (p.first["bias"], p.first["kernel"]), lambda p: (p.last["bias"], p.last["kernel"])),
        Two({"bias": array(*U), "kernel": array(*C)}, {"bias": array(*W), "kernel": array(*B)}),
        [("first/bias", "first/kernel"), ("last/bias", "last/kernel")],
    ),
    "Equinox module": lambda: (
        lambda module, x: module(x),
        Module(linear(3, 2), linear(4, 3), jax.nn.relu, 3),
        [("body/weight", "body/bias"), ("tail/weight", "tail/bias")],
    ),
    "eqx.nn.MLP": lambda: (
        lambda mlp, x: jax.vmap(mlp)(x),
        eqx.nn.MLP(4, 2, 3, 2, jnp.tanh, key=jax.random.key(0)),
        [(f"layers/{i}/weight", f"layers/{i}/bias") for i in range(3)],
    ),
    "a flat dict of odd names": lambda: (
        two_layers(lambda p: (p["*"], p[""]), lambda p: (p["[a] b"], p["é.kernel"])),
        {"*": array(*W), "": array(*B), "[a] b": array(*U), "é.kernel": array(*C)},
        [("*", ""), ("[a] b", "é.kernel")],
    ),
    "numbers as keys": lambda: (
        two_layers(lambda p: p[10], lambda p: p[9]),
        {10: (array(*W), array(*B)), 9: (array(*U), array(*C))},
        [("10/0", "10/1"), ("9/0", "9/1")],
    ),
    "a single array": lambda: (lambda w, x: jnp.tanh(x @ w), array(*W), [("", None)]),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_is_read_in_order_of_execution(name):
    network, params, expected = CONTAINERS[name]()
    assert roles(scored(network, params, inputs())) == expected
    require_gradients(network, params, inputs())


def test_leaves_that_are_no_arrays_are_static():
    network, params, expected = CONTAINERS["Equinox module"]()
    split, arrays, static = _trees.split(network, params)
    assert static == (("activation", jax.nn.relu),)
    assert arrays.activation is None
    assert _trees.whole(arrays, static).activation is jax.nn.relu
    np.testing.assert_array_equal(split(arrays, inputs()), network(params, inputs()))
    assert not networks.layers(network, params, inputs()).others
    assert roles(networks.layers(network, params, inputs())) == expected


def test_leaves_that_do_nothing_are_shown():
    network, params, _ = CONTAINERS["dict"]()
    more = params | {"step": jnp.asarray(3), "key": jax.random.key(0), "none": None, "old": array(4, 3)}
    layers = scored(network, more, inputs())
    assert len(layers) == 2
    assert layers.others == dict.fromkeys(("key", "old", "step"), "is not used")


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        networks.layers(
            lambda p, x: x @ p["a"]["b"] @ p["a/b"], {"a": {"b": array(4, 4)}, "a/b": array(4, 2)}, inputs()
        )


def test_misleading_names_in_any_order_of_sorting():
    def network(params, x):
        hidden = jnp.tanh(x @ params["output"]["bias"] + params["output"]["kernel"])
        hidden = jnp.tanh(hidden @ params["input"]["scale"] + params["hidden"]["bias"])
        return hidden @ params["hidden"]["kernel"] + params["input"]["bias"]

    square, row = (4, 4), (4,)
    params = {
        "output": {"bias": array(*square), "kernel": array(*row)},
        "input": {"scale": array(*square), "bias": array(*row)},
        "hidden": {"kernel": array(*square), "bias": array(*row)},
    }
    layers = scored(network, params, inputs())
    assert roles(layers) == [
        ("output/bias", "output/kernel"),
        ("input/scale", "hidden/bias"),
        ("hidden/kernel", "input/bias"),
    ]
    assert [layer.follows for layer in layers] == [None, "output/bias", "input/scale"]
    assert graph.chain(layers) is layers


# Layouts.

LAYOUTS = {
    "x @ W": ((4, 6), ("in", "out"), lambda w, x: x @ w),
    "x @ W.T": ((6, 4), ("out", "in"), lambda w, x: x @ w.T),
    "(W @ x.T).T": ((6, 4), ("out", "in"), lambda w, x: (w @ x.T).T),
    "(W.T @ x.T).T": ((4, 6), ("in", "out"), lambda w, x: (w.T @ x.T).T),
    "vmap of W @ x": ((6, 4), ("out", "in"), lambda w, x: jax.vmap(lambda x: w @ x)(x)),
    "vmap of x @ W": ((4, 6), ("in", "out"), lambda w, x: jax.vmap(jnp.dot, (0, None))(x, w)),
    "vmap, samples last": ((6, 4), ("out", "in"), lambda w, x: jax.vmap(lambda x: w @ x, 1, 1)(x.T).T),
    "einsum": ((6, 4), ("out", "in"), lambda w, x: jnp.einsum("oi,ni->no", w, x)),
    "several output axes": (
        (4, 2, 3),
        ("in", "out", "out"),
        lambda w, x: jnp.einsum("nd,dhf->nhf", x, w).reshape(-1, 6),
    ),
    "output axes around": (
        (2, 4, 3),
        ("out", "in", "out"),
        lambda w, x: jnp.einsum("nd,hdf->nhf", x, w).reshape(-1, 6),
    ),
    "several input axes": (
        (2, 2, 6),
        ("in", "in", "out"),
        lambda w, x: jnp.einsum("nhf,hfo->no", x.reshape(-1, 2, 2), w),
    ),
    "input axes exchanged": (
        (2, 2, 6),
        ("in", "in", "out"),
        lambda w, x: jnp.einsum("nhf,fho->no", x.reshape(-1, 2, 2), w),
    ),
    "flat": ((24,), ("in·out",), lambda w, x: x @ w.reshape(4, 6)),
    "flat, transposed": ((24,), ("out·in",), lambda w, x: x @ w.reshape(6, 4).T),
    "rearranged": ((2, 6, 2), ("in", "out", "in"), lambda w, x: x @ w.transpose(2, 0, 1).reshape(4, 6)),
    "a leading axis": ((1, 4, 6), ("1", "in", "out"), lambda w, x: x @ w.squeeze(0)),
    "broadcast over samples": (
        (4, 6),
        ("in", "out"),
        lambda w, x: (x[:, None] @ jnp.broadcast_to(w, (len(x), *w.shape)))[:, 0],
    ),
    "tensordot": ((4, 6), ("in", "out"), lambda w, x: jnp.tensordot(x, w, 1)),
    "another dtype": ((4, 6), ("in", "out"), lambda w, x: x @ w.astype(jnp.float32).astype(jnp.float64)),
    "one input": ((6,), ("out",), lambda w, x: jnp.einsum("n,o->no", x[:, 0], w)),
    "one output": ((4,), ("in",), lambda w, x: jnp.repeat(jax.vmap(lambda x: jnp.vdot(w, x))(x)[:, None], 6, 1)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_a_kernel(name):
    shape, axes, product = LAYOUTS[name]
    params = {"bias": array(*shape), "kernel": array(6, 2), "c": array(2)}
    network = lambda p, x: jnp.tanh(product(p["bias"], x)) @ p["kernel"] + p["c"]  # noqa: E731
    (layer, _) = layers = scored(network, params, inputs())
    assert roles(layers) == [("bias", None), ("kernel", "c")]
    assert (layer.shape, layer.axes, layer.positions) == (shape, axes, 1)
    assert layer.weights == layer.layout.sizes[1] * layer.layout.sizes[2]
    if name not in ("another dtype",):
        require_gradients(network, params, inputs())
    matrices = graph.as_matrices(params["bias"], layer.layout)
    np.testing.assert_array_equal(graph.as_leaf(matrices, layer.layout), params["bias"])


def test_what_a_layer_or_a_product_lacks_is_said_by_name():
    (layer,) = networks.layers(lambda w, x: x @ w @ w.T, array(4, 4), inputs())
    with pytest.raises(ValueError, match="kernel '' is no matrix of inputs and neurons: it is used 2 times, not as"):
        graph.as_matrices(array(4, 4), layer.layout)
    with pytest.raises(ValueError, match="kernel '' has no bias"):
        graph.as_matrices(array(4), layer.bias_layout)
    (product,) = graph.read(lambda w, x: (x - x.mean(0)) @ w, array(4, 6), inputs()).products[""]
    with pytest.raises(ValueError, match="the samples can't be followed through the product of ''"):
        _ = product.rows


BIASES = {
    "(out,)": ((6,), lambda z, b: z + b),
    "first": ((6,), lambda z, b: b + z),
    "(1, out)": ((1, 6), lambda z, b: z + b),
    "reshaped": ((2, 3), lambda z, b: z + b.reshape(6)),
    "to a reshaped product": ((2, 3), lambda z, b: (z.reshape(-1, 2, 3) + b).reshape(-1, 6)),
    "to a product of exchanged axes": (
        (3, 2),
        lambda z, b: (z.reshape(-1, 2, 3).transpose(0, 2, 1) + b).transpose(0, 2, 1).reshape(-1, 6),
    ),
    "to a transposed product": ((6,), lambda z, b: (z.T + b[:, None]).T),
    "to a broadcast product": ((6,), lambda z, b: (jnp.broadcast_to(z[:, None], (len(z), 2, 6)) + b).sum(1)),
    "under vmap": ((6,), lambda z, b: jax.vmap(lambda z: z + b)(z)),
    "under jit": ((6,), lambda z, b: jax.jit(jnp.add)(z, b)),
    "under checkpoint": ((6,), lambda z, b: jax.checkpoint(jnp.add)(z, b)),
}


@pytest.mark.parametrize("name", BIASES)
def test_every_way_to_add_a_bias(name):
    shape, add = BIASES[name]
    params = {"w": array(4, 6), "b": array(*shape), "u": array(6, 2)}
    network = lambda p, x: jnp.tanh(add(x @ p["w"], p["b"])) @ p["u"]  # noqa: E731
    assert roles(scored(network, params, inputs())) == [("w", "b"), ("u", None)]
    require_gradients(network, params, inputs())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_is_the_bias_of_one_output_only(shape):
    network = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["u"]  # noqa: E731
    params = {"w": array(4, 1), "b": array(*shape), "u": array(1, 2)}
    assert roles(scored(network, params, inputs())) == [("w", "b"), ("u", None)]
    require_gradients(network, params, inputs())
    several = {"w": array(4, 3), "b": array(*shape), "u": array(3, 2)}
    layers = scored(network, several, inputs())
    assert roles(layers) == [("w", None), ("u", None)]
    assert "added" in layers.others["b"]
    require_gradients(network, several, inputs())


# What a leaf may do besides. A network has those of w, v (4, 3), b, d (3,), u (3, 2), c (2,), ... that it uses.


def head(p, h):
    return jnp.tanh(h) @ p["u"] + p["c"]


@jax.custom_vjp
def clipped(value):
    return value


clipped.defvjp(lambda value: (value, None), lambda _, cotangent: (jnp.clip(cotangent, -0.01, 0.01),))


@jax.custom_jvp
def thrice(value):
    return value


thrice.defjvp(lambda primals, tangents: (primals[0], 3 * tangents[0]))


@jax.custom_jvp
def own_product(w, x):
    return x @ w


own_product.defjvp(lambda primals, tangents: (own_product(*primals), 2 * (primals[1] @ tangents[0])))


@jax.custom_vjp
def own_transpose(w, x):
    return x @ w


own_transpose.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (2 * kept[1].T @ g, g @ kept[0].T))


@jax.custom_jvp
def own_sum(z, b):
    return z + b


own_sum.defjvp(lambda primals, tangents: (primals[0] + primals[1], tangents[0] + 2 * tangents[1]))

MASK = np.arange(12).reshape(4, 3) % 2 == 0

# By name: the network up to its head; the biases of kernels that are scored.
SCORED = {
    "sums of products": (lambda p, x: x @ p["w"] + x @ p["v"] + p["b"], {"w": "b", "v": "b"}),
    "a bias, then another product": (lambda p, x: x @ p["w"] + p["b"] + x @ p["v"], {"w": "b", "v": "b"}),
    "a bias in each of two products": (
        lambda p, x: (x @ p["w"] + p["b"]) + (x @ p["v"] + p["d"]),
        {"w": "b", "v": "d"},
    ),
    "two biases": (lambda p, x: x @ p["w"] + p["b"] + p["d"], {"w": "b"}),
    "two biases, added first": (lambda p, x: x @ p["w"] + (p["b"] + p["d"]), {"w": None}),
    "a gate": (lambda p, x: (x @ p["w"]) * jax.nn.sigmoid(x @ p["v"] + p["b"]), {"w": None, "v": "b"}),
    "a skip connection": (lambda p, x: x[:, :3] + (x @ p["w"] + p["b"]), {"w": "b"}),
    "a skip connection added first": (lambda p, x: x[:, :3] + x @ p["w"] + p["b"], {"w": "b"}),
    "a skip connection added between": (lambda p, x: x @ p["w"] + jnp.tanh(x[:, :3]) + p["b"], {"w": "b"}),
    "a skip connection of a product with a bias": (
        lambda p, x: (lambda h: h + jnp.tanh(h) @ p["square"] + p["d"])(x @ p["w"] + p["b"]),
        {"w": "b", "square": "d"},
    ),
    "skip connections without biases": (
        lambda p, x: (lambda h: h + jnp.tanh(h) @ p["square"] + p["d"])(x[:, :3] + x @ p["w"]),
        {"w": None, "square": "d"},
    ),
    "a product scaled before its bias": (lambda p, x: 2 * (x @ p["w"]) + p["b"], {"w": "b"}),
    "a product divided before its bias": (lambda p, x: x @ p["w"] / jnp.sqrt(4.0) + p["b"], {"w": "b"}),
    "a product scaled in another sum": (lambda p, x: 2 * (x @ p["w"]) + x @ p["v"] + p["b"], {"w": None, "v": None}),
    "a bias subtracted": (lambda p, x: x @ p["w"] - p["b"], {"w": "b"}),
    "a bias subtracted from": (lambda p, x: p["b"] - x @ p["w"], {"w": "b"}),
    "a product subtracted": (lambda p, x: x[:, :3] - x @ p["w"] + p["b"], {"w": "b"}),
    "a bias after a scale for each neuron": (lambda p, x: (x @ p["w"]) * jnp.arange(3.0) + p["b"], {"w": None}),
    "a product for another's bias": (lambda p, x: x @ p["w"] + x @ p["v"], {"w": None, "v": None}),
    "the inputs held fixed": (lambda p, x: jax.lax.stop_gradient(x) @ p["w"] + p["b"], {"w": "b"}),
    "all held fixed": (lambda p, x: jax.lax.stop_gradient(x @ p["w"] + p["b"]), {"w": "b"}),
    "a bias held fixed": (lambda p, x: x @ p["w"] + jax.lax.stop_gradient(p["b"]), {"w": None}),
    "a product held fixed": (lambda p, x: jax.lax.stop_gradient(x @ p["w"]) + p["b"], {"w": None}),
    "a bias inside custom_jvp": (lambda p, x: own_sum(x @ p["w"], p["b"]), {"w": None}),
    "a bias through custom_vjp": (lambda p, x: x @ p["w"] + clipped(p["b"]), {"w": None}),
    "a bias through custom_jvp": (lambda p, x: x @ p["w"] + thrice(p["b"]), {"w": None}),
    "a product through custom_vjp": (lambda p, x: clipped(x @ p["w"]) + p["b"], {"w": None}),
    "a product through custom_jvp": (lambda p, x: thrice(x @ p["w"]) + p["b"], {"w": None}),
    "a product with a name": (lambda p, x: checkpoint_name(x @ p["w"], "z") + p["b"], {"w": "b"}),
    "a kernel and a bias with names": (
        lambda p, x: x @ checkpoint_name(p["w"], "w") + checkpoint_name(p["b"], "b"),
        {"w": "b"},
    ),
    "both through custom_vjp": (lambda p, x: clipped(x @ p["w"] + p["b"]), {"w": "b"}),
    "jit, checkpoint, named_call": (
        lambda p, x: jax.jit(jax.checkpoint(jax.named_call(lambda w, b, x: x @ w + b, name="dense")))(
            p["w"], p["b"], x
        ),
        {"w": "b"},
    ),
    "a sum that is used once more, without bias": (
        lambda p, x: (lambda h: h + jnp.tanh(h) @ p["square"])(x @ p["w"] + p["b"]),
        {"w": "b", "square": None},
    ),
    "a product that is used once more, without bias": (
        lambda p, x: (lambda h: h + (jnp.tanh(h) @ p["square"] + p["b"]))(x @ p["w"]),
        {"w": None, "square": "b"},
    ),
}


def leaves_of(before):
    """Just the leaves that a network takes."""
    shapes = {"w": W, "v": W, "b": B, "d": B, "square": (3, 3), "table": (2, 3), "stack": (2, 4, 4)}
    params = {name: array(*shape, seed=ord(name[0])) for name, shape in shapes.items()}

    def used(name):
        try:
            jax.eval_shape(before, {other: leaf for other, leaf in params.items() if other != name}, inputs())
        except KeyError:
            return True
        return False

    return {name: leaf for name, leaf in params.items() if used(name)} | {"u": array(*U), "c": array(*C)}


@pytest.mark.parametrize("name", SCORED)
def test_biases_are_what_is_added_to_a_product(name):
    before, expected = SCORED[name]
    params = leaves_of(before)
    network = lambda p, x: head(p, before(p, x))  # noqa: E731
    layers = scored(network, params, inputs())
    assert dict(roles(layers)) == expected | {"u": "c"}
    assert set(layers.others) == set(params) - set(expected) - set(expected.values()) - {"u", "c"}
    assert "is not used" not in layers.others.values()
    if all(layer.outer for layer in layers):
        require_gradients(network, params, inputs())
    else:  # a product was scaled before its bias
        slopes = jax.vmap(lambda x: jax.jacrev(lambda p: network(p, x[None])[0])(params))(inputs())
        scores = score.elimination_compensation(network, params, inputs())
        a, b = slopes["w"], slopes["b"][:, :, None]
        np.testing.assert_allclose(scores.bias_shift["w"], params["w"] * (a * b).sum((0, 1)) / (b**2).sum((0, 1)))


# By name: the network up to its head; the leaves that the table shows as kernels which can't be scored.
UNSCORED = {
    "tied": (lambda p, x: (x @ p["w"]) @ p["w"].T @ p["v"], ["w"]),
    "inside custom_jvp": (lambda p, x: own_product(p["w"], x) + p["b"], ["w"]),
    "inside custom_vjp": (lambda p, x: own_transpose(p["w"], x) + p["b"], ["w"]),
    "with and without its bias": (lambda p, x: (lambda z: jnp.tanh(z + p["b"]) + z)(x @ p["w"]), ["w"]),
    "a bias of two": (lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) * (x @ p["v"] + p["b"]), ["w", "v"]),
    "also a bias": (lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) * p["b"], ["w"]),
    "also added": (lambda p, x: x @ p["w"] + p["w"][0], ["w"]),
    "also multiplied entry by entry": (lambda p, x: x @ p["w"] + (x[:, :, None] * p["w"]).sum(1), ["w"]),
    "also returned": (lambda p, x: x @ p["w"] + jnp.linalg.norm(p["w"]), ["w"]),
    "slices": (lambda p, x: x[:, :2] @ p["w"][:2] + x[:, 2:] @ p["w"][2:], ["w"]),
    "a dynamic slice": (lambda p, x: x[:, :2] @ jax.lax.dynamic_slice(p["w"], (1, 0), (2, 3)), ["w"]),
    "rows looked up": (lambda p, x: x[:, :2] @ p["w"][jnp.array([0, 2])], ["w"]),
    "stacked": (
        lambda p, x: jax.lax.scan(
            lambda h, w: (jnp.tanh(h @ w), None), x[:, :3], jnp.stack([p["square"], p["square"]])
        )[0],
        ["square"],
    ),
    "put together": (lambda p, x: jnp.concatenate([x, x], 1) @ jnp.concatenate([p["w"], p["v"]]), ["w", "v"]),
    "a while loop": (
        lambda p, x: jax.lax.while_loop(
            lambda c: c[0] < p["c"][0], lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["square"])), (0.0, x[:, :3])
        )[1],
        ["square", "u"],
    ),
    "a branch": (
        lambda p, x: jax.lax.cond(x.shape[0] > jnp.asarray(3), lambda x: x @ p["w"], lambda x: x[:, :3], x),
        ["w"],
    ),
    "a stack": (
        lambda p, x: (
            jnp.einsum("nsi,sio->no", jnp.stack([x, jnp.cos(x)], 1), p["stack"])[:, :3]
            + jnp.einsum("nsi,sio->nso", jnp.stack([x, jnp.cos(x)], 1), p["stack"])[:, 0, :3]
        ),
        ["stack"],
    ),
    "a complex product": (lambda p, x: jnp.abs((x + 1j) @ p["w"] + p["b"]), ["w"]),
    "a mask closed over": (lambda p, x: x @ (MASK * p["w"]) + p["b"], ["w"]),
    "a mask in jnp.where": (lambda p, x: x @ jnp.where(MASK, p["w"], 0), ["w"]),
    "negated": (lambda p, x: x @ -p["w"], ["w"]),
    "scaled by a leaf": (lambda p, x: x @ (p["w"] * p["d"]), ["w"]),
    "scaled and transposed": (lambda p, x: x @ (0.5 * p["w"].T).T.reshape(4, 3), ["w"]),
    "weight normalisation": (lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)), ["w"]),
    "a low-rank update": (lambda p, x: x @ (p["w"] + p["v"] @ p["square"]), ["w"]),
    "held fixed": (lambda p, x: x @ jax.lax.stop_gradient(p["w"]), ["w"]),
}


@pytest.mark.parametrize("name", UNSCORED)
def test_kernels_that_can_not_be_scored_are_refused_by_name(name):
    before, refused = UNSCORED[name]
    params = leaves_of(before)
    network = lambda p, x: head(p, before(p, x))  # noqa: E731
    layers = networks.layers(network, params, inputs())
    assert sorted(layer.kernel for layer in layers if layer.reason) == sorted(refused)
    first = next(layer.kernel for layer in layers if layer.reason)
    with pytest.raises(ValueError, match=rf"kernel '{first}' can't be scored.*exclude=\('{first}',\)"):
        scored(network, params, inputs())
    others = scored(network, params, inputs(), exclude=refused) if set(refused) != {"square", "u"} else ()
    assert not {layer.kernel for layer in others} & set(refused)


# By name: the network up to its head; leaves that are no kernels, and a word of what is said of each.
OTHERS = {
    "a low-rank factor": (
        lambda p, x: x @ (p["w"] @ p["square"]) + p["b"],
        {"w": "arithmetic", "square": "arithmetic"},
    ),
    "products by hand": (lambda p, x: (x[:, :, None] * p["w"]).sum(1), {"w": "entry by entry"}),
    "a scale": (lambda p, x: x[:, :3] * p["d"], {"d": "entry by entry"}),
    "a shift of the inputs": (lambda p, x: x[:, :3] + p["d"], {"d": "added"}),
    "an embedding": (lambda p, x: p["table"][(x[:, 0] > 0).astype(int)], {"table": "looked up"}),
    "not used": (lambda p, x: (p["w"], x[:, :3])[1], {"w": "not used"}),
    "not used, but multiplied by a constant": (lambda p, x: (jnp.ones((2, 4)) @ p["w"], x[:, :3])[1], {"w": ""}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_kernel_is_shown_with_the_reason(name):
    before, expected = OTHERS[name]
    params = leaves_of(before)
    network = lambda p, x: head(p, before(p, x))  # noqa: E731
    layers = scored(network, params, inputs())
    assert roles(layers) == [("u", "c")]
    for path, words in expected.items():
        assert words in layers.others[path]
    require_gradients(network, params, inputs())


@pytest.mark.parametrize("rule", [clipped, thrice])
def test_a_kernel_that_went_through_a_rule_of_its_own_is_not_scored(rule):
    network = lambda p, x: head(p, x @ rule(p["w"]) + p["b"])  # noqa: E731
    params = leaves_of(lambda p, x: x @ p["w"] + p["b"])
    layers = networks.layers(network, params, inputs())
    assert "w" in layers.others or next(layer for layer in layers if layer.kernel == "w").reason
    turned = lambda p, x: head(p, x @ rule(p["w"].T).T + p["b"])  # noqa: E731
    layers = networks.layers(turned, params, inputs())
    assert "w" in layers.others or next(layer for layer in layers if layer.kernel == "w").reason
    everything = lambda p, x: (lambda p: head(p, x @ p["w"] + p["b"]))(jax.tree.map(rule, p))  # noqa: E731
    with pytest.raises(ValueError, match=r"no kernel to prune|can't be scored"):
        scored(everything, params, inputs())


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.complex64])
def test_a_kernel_of_other_numbers_is_refused(dtype):
    params = {"w": jnp.ones(W, dtype), "u": array(*U), "c": array(*C)}
    network = lambda p, x: head(p, jnp.abs(x @ p["w"]).astype(x.dtype))  # noqa: E731
    with pytest.raises(ValueError, match="kernel 'w' can't be scored"):
        scored(network, params, inputs())


def test_layer_norm_and_linen():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            hidden = nn.Dense(3, name="z", param_dtype=x.dtype)(x)
            hidden = nn.LayerNorm(param_dtype=x.dtype)(hidden)
            return nn.Dense(2, name="a", param_dtype=x.dtype)(hidden)

    params = Block().init(jax.random.key(0), inputs())["params"]
    layers = scored(networks.from_linen(Block()), params, inputs())
    assert roles(layers) == [("z/kernel", "z/bias"), ("a/kernel", "a/bias")]
    assert set(layers.others) == {"LayerNorm_0/scale", "LayerNorm_0/bias"}
    assert layers[1].follows is None
    with pytest.raises(ValueError, match="'a/kernel' does not read just the neurons of 'z/kernel'"):
        graph.chain(layers)


# What is followed unit by unit.

BETWEEN = {
    "tanh": (jnp.tanh, True),
    "a derivative of its own": (thrice, True),
    "a number": (lambda h: 2 * h + 1, True),
    "twice the units": (lambda h: jnp.tanh(h) * h, True),
    "reshaped": (lambda h: h.reshape(-1, 2, 3).reshape(-1, 6), True),
    "transposed and back": (lambda h: jnp.tanh(h.T).T, True),
    "in another order": (lambda h: h[:, ::-1], False),
    "looked up": (lambda h: h[:, jnp.array([1, 0, 2, 3, 4, 5])], False),
    "axes exchanged": (lambda h: h.reshape(-1, 2, 3).transpose(0, 2, 1).reshape(-1, 6), False),
    "sorted": (lambda h: jnp.sort(h, 1), False),
    "softmax": (jax.nn.softmax, False),
    "a cumulative sum": (lambda h: jnp.cumsum(h, 1), False),
    "numbers of each unit": (lambda h: h * jnp.arange(6.0), False),
    "a sum of units": (lambda h: h + h[:, ::-1], False),
    "rolled": (lambda h: jnp.roll(h, 1, 1), False),
    "outer": (lambda h: (h[:, :, None] * h[:, None, :]).sum(1), False),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_a_layer_follows_another_if_it_reads_its_units_one_by_one(name):
    between, expected = BETWEEN[name]
    params = {"w": array(4, 6), "b": array(6), "u": array(6, 2)}
    network = lambda p, x: between(x @ p["w"] + p["b"]) @ p["u"]  # noqa: E731
    first, second = scored(network, params, inputs())
    assert (first.follows, second.follows) == (None, "w" if expected else None)
    require_gradients(network, params, inputs())


def test_units_that_are_used_elsewhere_are_not_followed():
    def network(params, x):
        hidden = jnp.tanh(x @ params["w"] + params["b"])
        return jnp.concatenate([hidden @ params["u"], hidden], 1)

    params = {"w": array(4, 6), "b": array(6), "u": array(6, 2)}
    assert [layer.follows for layer in scored(network, params, inputs())] == [None, None]


# Layers that see several rows of a sample.


@pytest.mark.parametrize(
    ("conv", "shape", "positions"),
    [
        (nn.Conv(3, (2,)), (N, 6, 2), 6),
        (nn.Conv(3, (2, 2), strides=2), (N, 4, 4, 2), 4),
        (nn.Conv(4, (2, 2), feature_group_count=2), (N, 4, 4, 2), 16),
        (nn.Conv(3, (1, 1), padding="VALID"), (N, 1, 1, 2), 1),
        (nn.ConvTranspose(3, (2, 2), strides=(2, 2)), (N, 4, 4, 2), 64),
    ],
)
def test_convolutions_are_shown_with_their_positions(conv, shape, positions):
    x = array(*shape)
    params = {"c": conv.init(jax.random.key(0), x)["params"], "u": array(conv.features, 2)}
    network = lambda p, x: jnp.tanh(conv.apply({"params": p["c"]}, x)).mean(tuple(range(1, x.ndim - 1))) @ p["u"]  # noqa: E731
    first, second = networks.layers(network, params, x)
    assert (first.kernel, first.bias, first.positions) == ("c/kernel", "c/bias", positions)
    assert (second.kernel, second.reason) == ("u", "")
    assert (first.reason, first.outer) == ("", False)
    assert first.weights == params["c"]["kernel"].size
    assert roles(scored(network, params, x)) == [("c/kernel", "c/bias"), ("u", None)]
    assert roles(scored(network, params, x, exclude="c/*")) == [("u", None)]


def test_recurrent_layers_are_shown():
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="head")(nn.RNN(nn.LSTMCell(3, param_dtype=x.dtype), name="lstm")(x)[:, -1])

    x = array(N, 6, 4)
    params = Recurrent().init(jax.random.key(0), x)["params"]
    network = networks.from_linen(Recurrent())
    layers = networks.layers(network, params, x)
    assert {layer.kernel for layer in layers} == {path for path in _trees.by_path(params) if path.endswith("kernel")}
    assert all((layer.reason, layer.positions) == ("", 6) for layer in layers if "LSTM" in layer.kernel)
    assert not any(layer.outer for layer in layers if "LSTM" in layer.kernel)
    assert roles(scored(network, params, x, exclude="LSTMCell_0/*")) == [("head/kernel", "head/bias")]


def test_stacked_layers_of_linen_are_shown():
    params = zoo.Stack().init(jax.random.key(0), inputs())["params"]
    first, second = networks.layers(networks.from_linen(zoo.Stack()), params, inputs())
    assert (first.kernel, first.shape, first.axes) == ("dense/kernel", (3, 4, 4), ("stack", "in", "out"))
    assert (first.reason, first.outer, first.positions) == ("", False, 1)
    assert roles([first, second]) == [("dense/kernel", "dense/bias"), ("head/kernel", "head/bias")]


# Patterns, and the table.


def test_excluded_leaves_are_left_alone():
    network, params, _ = CONTAINERS["dict"]()
    layers = networks.layers(network, params, inputs(), exclude="z/*")
    assert roles(layers) == [("a/w", "a/b")]
    assert layers.others == {"z/w": "is excluded", "z/b": "is excluded"}
    assert roles(networks.layers(network, params, inputs(), exclude=["*/w"][:0])) == [("z/w", "z/b"), ("a/w", "a/b")]
    assert roles(networks.layers(network, params, inputs(), exclude=("a/b",))) == [("z/w", "z/b"), ("a/w", None)]


def test_a_pattern_that_matches_nothing_lists_the_paths():
    network, params, _ = CONTAINERS["dict"]()
    with pytest.raises(ValueError, match=r"'nothing\*' matches no leaf.*a/b, a/w, z/b, z/w"):
        networks.layers(network, params, inputs(), exclude=("z/*", "nothing*"))


def test_a_path_with_the_signs_of_patterns_is_taken_as_it_is():
    network, params, _ = CONTAINERS["a flat dict of odd names"]()
    assert roles(networks.layers(network, params, inputs(), exclude="*")) == [("[a] b", "é.kernel")]
    assert roles(networks.layers(network, params, inputs(), exclude="[a] b")) == [("*", "")]


@pytest.mark.parametrize("excluded", ["w", "v"])
@pytest.mark.parametrize("name", ["sums of products", "a bias, then another product"])
def test_excluding_one_kernel_leaves_the_others_as_they_are(name, excluded):
    before, _ = SCORED[name]
    params = leaves_of(before)
    layers = scored(lambda p, x: head(p, before(p, x)), params, inputs(), exclude=excluded)
    assert dict(roles(layers)) == {path: "c" if path == "u" else "b" for path in ("w", "v", "u") if path != excluded}


def test_the_table():
    network = lambda p, x: head(p, jnp.stack([x, x], 1) @ p["w"] * p["<scale>"])[:, 0]  # noqa: E731
    params = {"w": array(*W), "<scale>": array(3), "u": array(*U), "c": array(*C)}
    layers = networks.layers(network, params, inputs())
    header, line, first, second, last = str(layers).splitlines()
    assert header.split() == ["kernel", "shape", "axes", "bias", "positions", "weights", "pruned"]
    assert set(line) == {"─"}
    assert first.split()[:8] == ["w", "4", "×", "3", "in,", "out", "none", "2"]
    assert first.split()[-3:] == ["2", "12", "yes"]
    assert second.split()[:7] == ["u", "3", "×", "2", "in,", "out", "c"]
    assert last.split(maxsplit=1) == ["<scale>", "no: multiplies entry by entry"]
    assert repr(layers) == str(layers)
    html = layers._repr_html_()
    assert html.count("<tr>") == 4
    assert "&lt;scale>" in html
    assert "<scale>" not in html


def test_a_network_without_kernels():
    with pytest.raises(ValueError, match=r"no kernel to prune.*'s' multiplies entry by entry"):
        networks.layers(lambda p, x: x * p["s"], {"s": array(4)}, inputs())
    with pytest.raises(ValueError, match="do not depend on its inputs"):
        networks.layers(lambda p, x: jnp.zeros((len(x), 2)), {"s": array(4)}, inputs())
