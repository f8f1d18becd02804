import functools
import itertools
import os
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from flax import nnx
from flax.core import FrozenDict, freeze
from hypothesis import given
from hypothesis import strategies as st

from ecjax import _trees, compact, networks
from tests import examples

ACTIVATIONS = {
    "relu": nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": nn.sigmoid,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "leaky_relu": nn.leaky_relu,
}


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def thinned(leaf, sparsity, seed):
    """A matrix with exactly that fraction of its weights removed, anywhere."""
    gone = np.random.default_rng(seed).permutation(leaf.size)[: round(sparsity * leaf.size)]
    return jnp.asarray(np.asarray(leaf).reshape(-1)).at[gone].set(0).reshape(leaf.shape)


def pruned_params(params, sparsity, seed=0):
    """The params with weights removed anywhere from all matrices."""
    arrays = {path: leaf for path, leaf in _trees.by_path(params).items() if getattr(leaf, "ndim", 0) == 2}
    return _trees.replace(
        params, {path: thinned(leaf, sparsity, seed + i) for i, (path, leaf) in enumerate(arrays.items())}
    )


def pruned_mlp(activation=nn.relu, sparsity=0.8, seed=0, widths=(9, 8, 3), **options):
    example = examples.mlp(widths=widths, activation=activation, seed=seed, **options)
    return example._replace(params=pruned_params(example.params, sparsity, seed))


def kernels(params):
    return [params[name]["kernel"] for name in sorted(params, key=lambda name: int(name.split("_")[1]))]


def widths(params):
    return tuple(kernel.shape[1] for kernel in kernels(params))


def matrices(*sizes, seed=0, dtype=None):
    """Kernels and biases of layers of these sizes, with normal entries."""
    generator = np.random.default_rng(seed)
    return [
        (jnp.asarray(generator.normal(size=shape), dtype), jnp.asarray(generator.normal(size=shape[1]), dtype))
        for shape in itertools.pairwise(sizes)
    ]


def without(kernel, *, into=(), of=()):
    """A kernel without the weights into some neurons, and of some inputs."""
    return kernel.at[:, np.array(into, int)].set(0).at[np.array(of, int)].set(0)


def assert_same_function(network, params, inputs, expected_shapes=None, atol=1e-5):
    """Compacts, and compares with the network; returns the smaller params."""
    smaller, small = compact.compact(network, params, inputs)
    np.testing.assert_allclose(smaller(small, inputs), network(params, inputs), rtol=atol, atol=atol)
    if expected_shapes is not None:
        found = {path: leaf.shape for path, leaf in _trees.by_path(small).items() if _trees.is_array(leaf)}
        assert found == expected_shapes
    return small


# The two faults of a reading by names: other layers than those that run, and another activation than the network's.


@pytest.mark.parametrize(
    "names", [("encoder", "decoder"), ("input", "hidden", "output"), ("c", "b", "a"), ("z10", "z9")]
)
def test_layers_are_taken_in_the_order_they_run_in(names):
    """Equal widths: read by sorted names, every one of these fits in another order, too."""
    layers = matrices(*[4] * (len(names) + 1))
    for index in range(len(names) - 1):
        layers[index] = (without(layers[index][0], into=[index]), layers[index][1])
        layers[index + 1] = (without(layers[index + 1][0], of=[3]), layers[index + 1][1])
    last = len(names) - 1
    layers[last] = (without(layers[last][0], into=[1]), layers[last][1])  # an output that is constant stays
    params = {name: {"kernel": kernel, "bias": bias} for name, (kernel, bias) in zip(names, layers, strict=True)}

    def network(params, x):
        for name in names[:-1]:
            x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
        return x @ params[names[-1]]["kernel"] + params[names[-1]]["bias"]

    inputs = examples.inputs(features=4)
    small = assert_same_function(network, params, inputs)
    for first, second in itertools.pairwise(names):
        assert small[first]["kernel"].shape[1] == small[first]["bias"].shape[0] == small[second]["kernel"].shape[0] == 2
    assert small[names[-1]]["kernel"].shape[1] == 4
    sparse = compact.to_sparse(network, params, inputs)
    expected = network(params, inputs)
    np.testing.assert_allclose(compact.forward(sparse, inputs, jnp.tanh), expected, rtol=2e-5, atol=1e-5)
    smaller = compact.compact(network, params, inputs)
    report = compact.report(network, params, *smaller, inputs, activation=jnp.tanh, repeats=1)
    assert report[1].parameters < 0.8 * 20 * len(names)


@pytest.mark.parametrize("other", ["relu", "gelu", "sigmoid", "silu"])
def test_a_file_refuses_a_network_of_another_activation(tmp_path, other):
    example = pruned_mlp(jnp.tanh)
    compact.save(tmp_path / "net", example.params, network=example.network, inputs=example.inputs)
    saved = compact.load(tmp_path / "net", example.network)
    np.testing.assert_array_equal(
        example.network(saved.params, example.inputs), example.network(example.params, example.inputs)
    )
    wrong = networks.from_linen(networks.MLP(saved.widths, ACTIVATIONS[other]))
    with pytest.raises(ValueError, match=r"net: the params were saved from another network \(of another activation"):
        compact.load(tmp_path / "net", wrong)
    with pytest.raises(ValueError, match="the params were saved from another network"):
        saved.require(wrong)
    assert saved.require(example.network) is example.network


@pytest.mark.slow
@pytest.mark.usefixtures("double")
@given(name=st.sampled_from(sorted(ACTIVATIONS)), sparsity=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_function_stays_and_the_arrays_shrink(name, sparsity, seed):
    example = pruned_mlp(ACTIVATIONS[name], sparsity, seed)
    network, smaller = compact.compact(example.network, example.params, example.inputs)
    outputs = network(smaller, example.inputs)
    np.testing.assert_allclose(outputs, example.network(example.params, example.inputs), rtol=1e-12, atol=1e-12)
    for layer, following in itertools.pairwise(kernels(smaller)):  # nothing is left to fold
        assert (np.asarray(layer) != 0).any(0).all()
        assert (np.asarray(following) != 0).any(1).all()
    again = compact.fold(network, smaller, example.inputs)
    jax.tree.map(np.testing.assert_array_equal, smaller, again)
    if sparsity > 0.95:
        assert sum(map(np.size, kernels(smaller))) < 0.2 * (45 + 72 + 24)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_network_reduced_to_its_output_biases(name):
    example = pruned_mlp(ACTIVATIONS[name], 1.0)
    small = assert_same_function(example.network, example.params, example.inputs, atol=1e-12)
    assert widths(small) == (0, 0, 3)


@pytest.mark.usefixtures("double")
def test_one_pruned_layer_in_the_middle():
    example = examples.mlp(widths=(9, 8, 3), activation=nn.sigmoid)
    middle = example.params["Dense_1"] | {"kernel": jnp.zeros((9, 8))}
    small = assert_same_function(example.network, example.params | {"Dense_1": middle}, example.inputs, atol=1e-12)
    assert widths(small) == (0, 0, 3)


@pytest.mark.slow
def test_wide_layers_that_lose_almost_all():
    example = pruned_mlp(nn.relu, 0.98, widths=(300, 100, 10), features=784, samples=8)
    small = assert_same_function(example.network, example.params, example.inputs, atol=1e-4)
    assert widths(small)[0] < 290
    assert widths(small)[1] < 100
    example = pruned_mlp(nn.relu, 0.5, widths=(300, 100, 10), features=784, samples=8)
    small = assert_same_function(example.network, example.params, example.inputs, atol=1e-4)
    assert widths(small) == (300, 100, 10)
    jax.tree.map(np.testing.assert_array_equal, small, example.params)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_without_biases_only_what_is_nothing_goes(name):
    module = networks.MLP((9, 8, 3), ACTIVATIONS[name], use_bias=False)
    inputs = examples.inputs()
    params = jax.tree.map(jnp.asarray, module.init(jax.random.key(0), inputs)["params"])
    small = assert_same_function(networks.from_linen(module), pruned_params(params, 0.9), inputs, atol=1e-12)
    if name != "sigmoid":
        assert widths(small) != (9, 8, 3)


@pytest.mark.usefixtures("double")
def test_a_constant_that_no_bias_takes_stays_until_one_does():
    """The second layer has no bias for the constants of the first, so they stay; the third one has."""
    (first, bias), (second, _), (third, last) = matrices(5, 4, 4, 3)
    first, second = without(first, into=[0]), without(second, into=[1])
    second = second.at[1:, 2].set(0)  # reads the constant alone: a constant, too

    def network(params, x):
        hidden = nn.sigmoid(x @ params[0] + params[1])
        return nn.sigmoid(hidden @ params[2]) @ params[3] + params[4]

    inputs = examples.inputs()
    small = assert_same_function(network, [first, bias, second, third, last], inputs, atol=1e-12)
    assert [leaf.shape for leaf in small] == [(5, 4), (4,), (4, 2), (2, 3), (3,)]


# Layouts, containers, activations, dtypes.


def out_in(params, x):
    hidden = jnp.tanh(x @ params["first"]["weight"].T + params["first"]["shift"])
    return jnp.tanh(hidden @ params["second"]["weight"].T) @ params["third"]["weight"].T + params["third"]["shift"]


def of_one(params, x):
    hidden = jnp.tanh(params["first"]["weight"] @ x + params["first"]["shift"])
    return params["third"]["weight"] @ jnp.tanh(params["second"]["weight"] @ hidden) + params["third"]["shift"]


def by_einsum(params, x):
    hidden = jnp.tanh(jnp.einsum("oi,ni->no", params["first"]["weight"], x) + params["first"]["shift"])
    hidden = jnp.tanh(jnp.einsum("ni,oi->no", hidden, params["second"]["weight"]))
    return jnp.einsum("ni,oi->no", hidden, params["third"]["weight"]) + params["third"]["shift"][None]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "network",
    [out_in, jax.vmap(of_one, (None, 0)), by_einsum, jax.jit(out_in), jax.checkpoint(out_in)],
    ids=["out_in", "vmap", "einsum", "jit", "checkpoint"],
)
def test_kernels_of_shape_out_in(network):
    (first, bias), (second, _), (third, last) = matrices(5, 6, 6, 3)
    second = without(second, of=[0, 1], into=[5])  # tanh(0) is 0, so nothing needs to be folded
    params = {
        "first": {"weight": first.T, "shift": bias},
        "second": {"weight": second.T},
        "third": {"weight": third.T, "shift": last},
    }
    shapes = {"first/shift": (4,), "first/weight": (4, 5), "second/weight": (5, 4)}
    shapes |= {"third/shift": (3,), "third/weight": (3, 5)}
    assert_same_function(network, params, examples.inputs(), shapes, atol=1e-12)


class Dense(NamedTuple):
    weight: jax.Array
    offset: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=["name"])
class Holder:
    def __init__(self, layers, name):
        self.layers, self.name = layers, name


def of_pairs(pairs, x):
    for weight, offset in pairs[:-1]:
        x = nn.gelu(x @ weight + offset)
    weight, offset = pairs[-1]
    return x @ weight + offset


CONTAINERS = {
    "list of tuples": (list, of_pairs),
    "tuple of tuples": (tuple, of_pairs),
    "named tuples": (lambda pairs: [Dense(*pair) for pair in pairs], of_pairs),
    "frozen": (
        lambda pairs: freeze({f"layer{i}": {"w": w, "b": b} for i, (w, b) in enumerate(pairs)}),
        lambda params, x: of_pairs([(layer["w"], layer["b"]) for _, layer in sorted(params.items())], x),
    ),
    "dataclass": (lambda pairs: Holder(pairs, "mlp"), lambda params, x: of_pairs(params.layers, x)),
}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_stay(kind):
    contained, network = CONTAINERS[kind]
    pairs = matrices(5, 6, 4, 2)
    pairs[0] = (without(pairs[0][0], into=[1, 4]), pairs[0][1])
    params = contained(pairs)
    small = assert_same_function(network, params, examples.inputs(), atol=1e-12)
    assert jax.tree.structure(small) == jax.tree.structure(params)
    assert type(small) is type(params)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(small)) == sorted([(5, 4), (4,), (4, 4), (4,), (4, 2), (2,)])
    if kind == "frozen":
        assert isinstance(small, FrozenDict)


@pytest.mark.parametrize("activation", [jnp.tanh, nn.relu, nn.gelu])
def test_an_equinox_mlp_as_it_is(activation, tmp_path):
    mlp = eqx.nn.MLP(5, 3, width_size=7, depth=2, activation=activation, key=jax.random.key(0))
    weight = mlp.layers[0].weight.at[jnp.array([0, 2])].set(0)
    mlp = eqx.tree_at(lambda tree: tree.layers[0].weight, mlp, weight)
    network, inputs = lambda mlp, x: jax.vmap(mlp)(x), examples.inputs()
    small = assert_same_function(network, mlp, inputs)
    assert isinstance(small, eqx.nn.MLP)
    assert small.activation is mlp.activation
    assert [layer.weight.shape for layer in small.layers] == [(5, 5), (7, 5), (3, 7)]
    compact.save(tmp_path / "net", small, network=network, inputs=inputs)
    saved = compact.load(tmp_path / "net", network, like=mlp)
    assert saved.widths == (5, 7, 3)
    np.testing.assert_array_equal(network(saved.params, inputs), network(small, inputs))
    with pytest.raises(ValueError, match="in nested dicts unless"):
        compact.load(tmp_path / "net", network)
    with pytest.raises(ValueError, match="are not those of like: only like holds 'extra'"):
        compact.load(tmp_path / "net", network, like={"extra": inputs})


def test_a_flax_nnx_module(tmp_path):
    class Perceptron(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)])
            self.decoder = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            for layer in self.layers:
                x = nnx.gelu(layer(x))
            return self.decoder(x)

    module, inputs = Perceptron(nnx.Rngs(0)), examples.inputs()
    network, params = networks.from_nnx(module)
    params = examples.with_random_biases(params)
    first = params["layers"][0]
    params["layers"][0] = first | {"kernel": without(first["kernel"], into=[2, 3])}
    small = assert_same_function(network, params, inputs)
    assert small["layers"][0]["kernel"].shape == (5, 4)
    compact.save(tmp_path / "net", small, network=network, inputs=inputs)
    saved = compact.load(tmp_path / "net", network)
    assert saved.widths == (4, 4, 2)
    for found in (small, saved.params):
        np.testing.assert_allclose(
            networks.to_nnx(module, found)(inputs), network(params, inputs), rtol=1e-4, atol=1e-6
        )


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("slope_of", ["layer", "network"])
def test_a_slope_is_one_number_and_stays(slope_of):
    pairs = matrices(5, 6, 4, 2)
    pairs[1] = (without(pairs[1][0], into=[0, 1], of=[5]), pairs[1][1])
    params = {"pairs": pairs, "slope": jnp.array(0.3), "slopes": [jnp.array([0.1]), jnp.array([[0.2]])]}

    def network(params, x):
        slopes = params["slopes"] if slope_of == "layer" else [params["slope"]] * 2
        for (weight, offset), slope in zip(params["pairs"][:-1], slopes, strict=True):
            z = x @ weight + offset
            x = jnp.where(z > 0, z, slope * z)
        return x @ params["pairs"][-1][0] + params["pairs"][-1][1]

    small = assert_same_function(network, params, examples.inputs(), atol=1e-12)
    assert [weight.shape for weight, _ in small["pairs"]] == [(5, 5), (5, 2), (2, 2)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_narrow_dtypes_are_kept(dtype, sparsity):
    example = pruned_mlp(nn.silu, sparsity)
    params, inputs = jax.tree.map(lambda leaf: leaf.astype(dtype), (example.params, example.inputs))
    network, small = compact.compact(example.network, params, inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(small)} == {jnp.dtype(dtype)}
    exact = example.network(jax.tree.map(lambda leaf: leaf.astype(np.float32), params), inputs.astype(np.float32))
    np.testing.assert_allclose(
        np.asarray(network(small, inputs), np.float32), exact, rtol=0, atol=8 * float(jnp.finfo(dtype).eps) * 2
    )


def test_layers_that_compute_in_a_narrower_dtype():
    module = networks.MLP((9, 8, 3), nn.silu, dtype=jnp.bfloat16)
    example = pruned_mlp(nn.silu, 0.9)
    network, small = compact.compact(networks.from_linen(module), example.params, example.inputs)
    assert network.module.dtype == jnp.bfloat16
    assert small["Dense_0"]["kernel"].dtype == np.float32
    assert widths(small) != (9, 8, 3)


def test_numpy_params_keep_double_precision():
    example = pruned_mlp(jnp.tanh)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) + 0.0, example.params)
    _, small = compact.compact(example.network, params, example.inputs)
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float64 for leaf in jax.tree.leaves(small))


@pytest.mark.usefixtures("double")
def test_what_surrounds_the_layers_stays():
    """Scaled inputs, and outputs that go through a softmax and back to the inputs."""
    pairs = matrices(5, 6, 5)
    pairs[0] = (without(pairs[0][0], into=[1, 2]), pairs[0][1])
    network = lambda params, x: jax.nn.softmax(of_pairs(params, (x - x.min(-1, keepdims=True)) / 3)) * x  # noqa: E731
    inputs = examples.inputs()
    small = assert_same_function(network, pairs, inputs, atol=1e-12)
    assert small[0][0].shape == (5, 4)
    with pytest.raises(ValueError, match="whose first layer reads something else than the inputs"):
        compact.to_sparse(network, pairs, inputs)
    with pytest.raises(ValueError, match="whose outputs are not those of its last layer"):
        compact.to_sparse(lambda params, x: jax.nn.softmax(of_pairs(params, x)), pairs, inputs)


def test_neurons_along_several_axes_stay():
    """Heads by features: no single axis holds the neurons, so none of this layer goes."""
    (first, bias), (second, last) = matrices(5, 6, 2)
    first = without(first, into=[1, 2])
    params = {"w": first.reshape(5, 2, 3), "b": bias.reshape(2, 3), "v": second, "c": last}

    def network(params, x):
        hidden = jnp.tanh(jnp.einsum("ni,ihd->nhd", x, params["w"]) + params["b"])
        return hidden.reshape(-1, 6) @ params["v"] + params["c"]

    small = assert_same_function(network, params, examples.inputs())
    jax.tree.map(np.testing.assert_array_equal, small, params)


def test_layers_of_one_neuron():
    pairs = matrices(3, 1, 1, 2)
    pairs[0] = (pairs[0][0] * 0, pairs[0][1])
    small = assert_same_function(of_pairs, pairs, examples.inputs(features=3))
    assert [weight.shape for weight, _ in small] == [(3, 0), (0, 0), (0, 2)]
    pairs = matrices(3, 1, 2)
    pairs[0] = (pairs[0][0] * 0, pairs[0][1])
    small = assert_same_function(of_pairs, pairs, examples.inputs(features=3))
    assert [weight.shape for weight, _ in small] == [(3, 0), (0, 2)]


# What is refused.


def test_networks_that_are_no_chain_of_layers_have_no_sparse_form():
    for example, match in (
        (examples.residual(), "this takes a multilayer perceptron.*'block/kernel' does not read just the neurons"),
        (examples.convolution(), "multilayer perceptron.*; 'conv/kernel' sees more"),
    ):
        with pytest.raises(ValueError, match=match):
            compact.to_sparse(*example)

    def skips(params, x):
        first = jnp.tanh(x @ params["a"])
        return (jnp.tanh(first @ params["b"]) + first) @ params["c"]

    params = {"a": jnp.ones((5, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="'b' does not read just the neurons of 'a'"):
        compact.to_sparse(skips, params, examples.inputs())
    normed = lambda params, x: nn.standardize(x @ params["a"]) @ params["b"]  # noqa: E731
    with pytest.raises(ValueError, match="'b' does not read just the neurons of 'a'"):
        compact.to_sparse(normed, params, examples.inputs())
    twice = lambda params, x: jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["b"]  # noqa: E731
    with pytest.raises(ValueError, match="'b' sees more, or is used more than once"):
        compact.to_sparse(twice, params, examples.inputs())


def test_what_is_no_network_of_samples_is_refused():
    params = {"a": jnp.ones((5, 4)), "c": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="the network has no kernel to prune"):
        compact.fold(lambda params, x: x * params, jnp.ones(5), examples.inputs())
    mixed = lambda params, x: (x - x.mean(0)) @ params["a"] @ params["c"]  # noqa: E731
    with pytest.raises(ValueError, match="mixes samples"):
        compact.fold(mixed, params, examples.inputs())


def test_modules_of_fixed_widths_are_evaluated_with_fewer_units():
    class Fixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="outer")(nn.relu(nn.Dense(6, name="inner")(x)))

    example = examples.of_module(Fixed(), examples.inputs())
    inner = example.params["inner"]
    params = example.params | {"inner": inner | {"kernel": without(inner["kernel"], into=[0, 5])}}
    smaller, small = compact.compact(example.network, params, example.inputs)
    assert small["inner"]["kernel"].shape == (5, 4)
    expected = example.network(params, example.inputs)
    np.testing.assert_allclose(smaller(small, example.inputs), expected, rtol=1e-5, atol=1e-6)
    outputs = of_pairs_of(small, ["inner", "outer"], example.inputs)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def of_pairs_of(params, names, x):
    for name in names[:-1]:
        x = nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params[names[-1]]["kernel"] + params[names[-1]]["bias"]


def test_a_network_that_looks_at_its_widths_keeps_to_the_old_ones():
    def network(params, x):
        hidden = jnp.tanh(x @ params["a"]) / params["a"].shape[1]
        return hidden @ params["b"]

    (first, _), (second, _) = matrices(5, 4, 2)
    params = {"a": without(first, into=[1]), "b": second}
    small = assert_same_function(network, params, examples.inputs())
    assert small["a"].shape == (5, 3)


def test_constants_that_overflow_are_refused():
    params = {
        "Dense_0": {"kernel": jnp.zeros((3, 4)), "bias": jnp.full(4, 1e20)},
        "Dense_1": {"kernel": jnp.full((4, 2), 1e20), "bias": jnp.zeros(2)},
    }
    with pytest.raises(ValueError, match="folded biases 'Dense_1/bias': NaN or infinity"):
        compact.compact(networks.from_linen(networks.MLP((4, 2))), params, jnp.ones((5, 3)))


def test_values_are_needed():
    example = pruned_mlp()
    with pytest.raises(ValueError, match="call this outside of jit"):
        jax.jit(lambda params: compact.fold(example.network, params, example.inputs))(example.params)
    with pytest.raises(ValueError, match="hold no samples"):
        compact.fold(example.network, example.params, example.inputs[:0])
    with pytest.raises(ValueError, match="does not take inputs of shape"):
        compact.fold(example.network, example.params, example.inputs[:, :3])


@pytest.mark.usefixtures("double")
def test_one_sample_is_enough():
    example = pruned_mlp(nn.sigmoid, 0.9)
    one = compact.fold(example.network, example.params, example.inputs[:1])
    all_of_them = compact.fold(example.network, example.params, example.inputs)
    assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, all_of_them)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13), one, all_of_them)


# Inputs that nothing reads.


def test_unread_inputs_are_reported_and_dropped_on_request():
    example = examples.mlp()
    kernel = without(example.params["Dense_0"]["kernel"], of=[0, 3])
    params = example.params | {"Dense_0": example.params["Dense_0"] | {"kernel": kernel}}
    read = compact.inputs_read(example.network, params, example.inputs)
    np.testing.assert_array_equal(read, [False, True, True, False, True])
    smaller, index = compact.drop_inputs(example.network, params, example.inputs)
    np.testing.assert_array_equal(index, [1, 2, 4])
    assert smaller["Dense_0"]["kernel"].shape == (3, 7)
    outputs = example.network(smaller, example.inputs[:, index])
    np.testing.assert_allclose(outputs, example.network(params, example.inputs), rtol=1e-5, atol=1e-6)
    same, index = compact.drop_inputs(example.network, example.params, example.inputs)
    assert same is example.params
    assert index.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", ["float32", "int32", "uint8"])
def test_features_may_be_scaled_one_by_one(dtype):
    kernel = without(matrices(5, 3)[0][0], of=[1])
    inputs = jnp.asarray(np.random.default_rng(0).integers(0, 256, (20, 5)).astype(dtype))
    network = lambda params, x: jnp.log1p(x / 255) @ params.T  # noqa: E731
    smaller, index = compact.drop_inputs(network, kernel.T, inputs)
    assert (smaller.shape, index.tolist()) == ((3, 4), [0, 2, 3, 4])


def test_features_that_are_mixed_or_read_elsewhere_are_refused():
    kernel, inputs = without(matrices(5, 5)[0][0], of=[1]), examples.inputs()
    for change in (lambda x: x[:, ::-1], lambda x: jnp.cumsum(x, 1), lambda x: x / x.sum(1, keepdims=True)):
        with pytest.raises(ValueError, match="the first layer '' does not read the features"):
            compact.inputs_read(lambda params, x, change=change: change(x) @ params, kernel, inputs)
    with pytest.raises(ValueError, match="the network reads features that its first layer does not"):
        compact.inputs_read(lambda params, x: x @ params + x, kernel, inputs)
    with pytest.raises(ValueError, match="does not read the features"):
        compact.inputs_read(lambda params, x: x.reshape(len(x), 6) @ params, jnp.eye(6), jnp.ones((4, 2, 3)))
    scale = jnp.arange(5.0)
    read = compact.inputs_read(lambda params, x: (x - scale) @ params, kernel, inputs)
    assert read.tolist() == [True, False, True, True, True]
    with pytest.raises(ValueError, match=r"does not take inputs of shape \(4, 4\)"):
        compact.drop_inputs(lambda params, x: (x - scale) @ params, kernel, inputs)


# Sparse kernels.


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.7, 1.0])
def test_sparse_forms_answer_the_same(sparsity):
    example = pruned_mlp(jnp.tanh, sparsity)
    expected = example.network(example.params, example.inputs)
    bcsr = compact.to_sparse(*example)
    np.testing.assert_allclose(compact.forward(bcsr, example.inputs, jnp.tanh), expected, rtol=2e-5, atol=1e-5)
    csr = compact.to_sparse(*example, "csr")
    kernel, bias = csr.layers[0]
    assert isinstance(kernel, scipy.sparse.csr_array)
    assert isinstance(bias, np.ndarray)
    assert kernel.nnz == int(jnp.count_nonzero(example.params["Dense_0"]["kernel"]))
    found = compact.forward(csr, np.asarray(example.inputs), np.tanh)
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


def test_a_sparse_network_is_jitted():
    example = pruned_mlp(jnp.tanh)
    call = jax.jit(lambda sparse, x: compact.forward(sparse, x, jnp.tanh))
    found = call(compact.to_sparse(*compact.compact(*example), example.inputs), example.inputs)
    np.testing.assert_allclose(found, example.network(example.params, example.inputs), rtol=2e-5, atol=1e-5)
    with pytest.raises(ValueError, match="kind is 'coo'; it must be one of 'bcsr', 'csr'"):
        compact.to_sparse(*example, "coo")


def test_sparse_kernels_of_any_layout_and_without_biases():
    (first, bias), (second, _) = matrices(5, 4, 3)
    params = {"v": second.T, "w": without(first, into=[1]).T, "b": bias[None]}
    network = lambda params, x: jnp.tanh(x @ params["w"].T + params["b"]) @ params["v"].T  # noqa: E731
    inputs = examples.inputs()
    sparse = compact.to_sparse(network, params, inputs)
    assert [(kernel.shape, None if b is None else b.shape) for kernel, b in sparse.layers] == [
        ((4, 5), (4,)),
        ((3, 4), None),
    ]
    found = compact.forward(sparse, inputs, jnp.tanh)
    np.testing.assert_allclose(found, network(params, inputs), rtol=2e-5, atol=1e-5)


# Files.


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.95, 1.0])
def test_a_file_holds_every_bit(tmp_path, dtype, sparsity):
    example = pruned_mlp(sparsity=sparsity)
    params = jax.tree.map(lambda leaf: np.asarray(leaf.astype(dtype)), example.params)
    params["Dense_0"]["kernel"] = params["Dense_0"]["kernel"].copy()
    params["Dense_0"]["kernel"][:4, 0] = [-0.0, np.nan, np.inf, 1e-40]
    size = compact.save(tmp_path / "net.safetensors", params)
    assert size == (tmp_path / "net.safetensors").stat().st_size
    found = compact.load(tmp_path / "net.safetensors")
    assert (found.examples, found.widths) == (None, None)
    assert_same_bits(found.params, params)


def assert_same_bits(found, params):
    found, expected = networks.by_path(found), networks.by_path(params)
    assert set(found) == set(expected)
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype
        assert found[path].shape == leaf.shape
        assert found[path].tobytes() == np.asarray(leaf).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_examples_travel_with_the_params(tmp_path, dtype):
    example = pruned_mlp(jnp.tanh)
    params, inputs = jax.tree.map(lambda leaf: leaf.astype(dtype), (example.params, example.inputs))
    compact.save(tmp_path / "net", params, network=example.network, inputs=inputs)
    saved = compact.load(tmp_path / "net", example.network)
    assert saved.widths == (9, 8, 3)
    assert saved.examples.inputs.shape == (4, 5)
    assert saved.examples.outputs.dtype == dtype
    np.testing.assert_array_equal(saved.examples.inputs, np.asarray(inputs[np.array([0, 7, 14, 22])]))
    wider = jax.tree.map(lambda leaf: leaf + 1, params)
    compact.save(tmp_path / "other", wider, network=example.network, inputs=inputs)
    other = compact.load(tmp_path / "other")
    with pytest.raises(ValueError, match="answers otherwise"):
        saved._replace(params=other.params).require(example.network)


def test_double_precision_is_compared_in_single_where_jax_knows_no_other(tmp_path):
    with jax.enable_x64(True):
        example = pruned_mlp(jnp.tanh)
        compact.save(tmp_path / "net", example.params, network=example.network, inputs=example.inputs)
    saved = compact.load(tmp_path / "net", example.network)
    assert saved.params["Dense_0"]["kernel"].dtype == np.float64
    with pytest.raises(ValueError, match="answers otherwise"):
        saved.require(networks.from_linen(networks.MLP(saved.widths, nn.hard_tanh)))


def test_a_network_needs_examples_to_be_told(tmp_path):
    example = pruned_mlp()
    compact.save(tmp_path / "net", example.params)
    with pytest.raises(ValueError, match="net: the params were saved without examples"):
        compact.load(tmp_path / "net", example.network)
    with pytest.raises(ValueError, match="give both or neither"):
        compact.save(tmp_path / "net", example.params, network=example.network)
    with pytest.raises(ValueError, match="outputs of the network: NaN or infinity"):
        compact.save(
            tmp_path / "net", example.params, network=lambda p, x: example.network(p, x) / 0, inputs=example.inputs
        )
    compact.save(tmp_path / "net", example.params, network=example.network, inputs=example.inputs)
    with pytest.raises(ValueError, match="does not take inputs of shape"):
        compact.load(tmp_path / "net", networks.from_linen(networks.MLP((9, 3))))
    with pytest.raises(ValueError, match=r"\(outputs of shape \(4,\), not \(4, 3\)\)"):
        compact.load(tmp_path / "net", lambda params, x: example.network(params, x)[:, 0])


def test_files_of_empty_layers(tmp_path):
    example = pruned_mlp(sparsity=1.0)
    network, smaller = compact.compact(*example)
    compact.save(tmp_path / "net", smaller, network=network, inputs=example.inputs)
    saved = compact.load(tmp_path / "net", network)
    assert saved.widths == (0, 0, 3)
    assert_same_bits(saved.params, smaller)


def test_sparse_layers_make_small_files(tmp_path):
    example = pruned_mlp(sparsity=0.98, widths=(300, 100, 10))
    dense = compact.save(tmp_path / "dense", examples.mlp(widths=(300, 100, 10)).params)
    assert compact.save(tmp_path / "sparse", example.params) < 0.08 * dense


def test_params_of_any_kind_come_back_as_nested_dicts(tmp_path):
    generator = np.random.default_rng(0)
    leaf = lambda *shape: generator.normal(size=shape).astype(np.float32)  # noqa: E731
    params = {
        "convolution": leaf(3, 3, 2, 4),
        "embedding": np.where(leaf(40, 6) > 1.5, 1.5, 0).astype(np.float32),
        "scale": np.float32(3.0) * np.ones(()),
        "steps": np.arange(3),
        "used": np.array([True, False]),
        "embedding.values": leaf(2),
        "values:embedding": leaf(2),
        "layers": [Dense(leaf(2, 3), leaf(3)), (leaf(1), {7: leaf(2)}, {"8": leaf(1)})],
        "activation": nn.relu,
        "nothing": None,
    }
    compact.save(tmp_path / "net", params)
    found = compact.load(tmp_path / "net").params
    assert set(found) == set(params) - {"activation", "nothing"}
    assert set(found["layers"]) == {0, 1}
    assert set(found["layers"][0]) == {"weight", "offset"}
    assert list(found["layers"][1][1]) == [7]
    assert list(found["layers"][1][2]) == ["8"]
    assert_same_bits(found, {name: leaf for name, leaf in params.items() if name != "activation"})
    again = compact.load(tmp_path / "net", like=params).params
    assert again["activation"] is nn.relu
    assert isinstance(again["layers"][0], Dense)
    compact.save(tmp_path / "one", leaf(2, 2))
    assert compact.load(tmp_path / "one").params.shape == (2, 2)


def test_params_that_can_not_be_told_by_paths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        compact.save(tmp_path / "net", {"a": {"b": np.ones(1)}, "a/b": np.ones(1)})
    with pytest.raises(ValueError, match=r"under the key \(1, 2\) can't be saved"):
        compact.save(tmp_path / "net", {(1, 2): np.ones(1)})
    with pytest.raises(ValueError, match="hold no array to save; they hold activation"):
        compact.save(tmp_path / "net", {"activation": nn.relu})
    assert not (tmp_path / "net").exists()


def test_foreign_files_and_missing_ones(tmp_path):
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"was not written by ecjax.compact.save: its format is None"):
        compact.load(tmp_path / "foreign")
    save_file({"weight": np.zeros(3)}, tmp_path / "old", {"format": "ecjax.compact", "version": "1"})
    with pytest.raises(ValueError, match=r"is of version '1'; this ecjax reads version '2'"):
        compact.load(tmp_path / "old")
    with pytest.raises(FileNotFoundError):
        compact.load(tmp_path / "missing")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net"
    compact.save(path, pruned_mlp().params)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        compact.save(path, pruned_mlp(seed=1).params)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["net"]
