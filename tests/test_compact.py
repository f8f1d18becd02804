import itertools
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from ecjax import compact, networks, prune, score
from tests import examples

ACTIVATIONS = {"relu": nn.relu, "tanh": jnp.tanh, "sigmoid": nn.sigmoid, "gelu": nn.gelu}


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def pruned_mlp(activation=nn.relu, sparsity=0.8, seed=0, widths=(9, 8, 3)):
    example = examples.mlp(widths=widths, activation=activation, seed=seed)
    masks = prune.one_shot(example.params, score.random(example.params, jax.random.key(seed)), sparsity).masks
    return example._replace(params=prune.apply_masks(example.params, masks))


def run(params, activation, inputs):
    biased = any(path.endswith("bias") for path in networks.by_path(params))
    return networks.pure(networks.MLP(compact.widths(params), activation, use_bias=biased))(params, inputs)


@pytest.mark.usefixtures("double")
@given(name=st.sampled_from(sorted(ACTIVATIONS)), sparsity=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_function_stays_and_the_arrays_shrink(name, sparsity, seed):
    example = pruned_mlp(ACTIVATIONS[name], sparsity, seed)
    smaller = compact.compact(example.params, ACTIVATIONS[name])
    outputs = run(smaller, ACTIVATIONS[name], example.inputs)
    np.testing.assert_allclose(outputs, example.network(example.params, example.inputs), rtol=1e-12, atol=1e-12)
    kernels = [networks.by_path(smaller)[path] for path in networks.layers(smaller)]
    for layer, following in itertools.pairwise(kernels):  # nothing is left to fold
        assert (np.asarray(layer) != 0).any(0).all()
        assert (np.asarray(following) != 0).any(1).all()
    again = compact.compact(smaller, ACTIVATIONS[name])
    jax.tree.map(np.testing.assert_array_equal, smaller, again)
    if sparsity > 0.95:
        assert sum(map(np.size, kernels)) < 0.2 * (45 + 72 + 24)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_network_reduced_to_its_output_biases(name):
    example = pruned_mlp(ACTIVATIONS[name], 1.0)
    smaller = compact.compact(example.params, ACTIVATIONS[name])
    assert compact.widths(smaller) == (0, 0, 3)
    outputs = run(smaller, ACTIVATIONS[name], example.inputs)
    np.testing.assert_allclose(outputs, example.network(example.params, example.inputs), atol=1e-12)


@pytest.mark.usefixtures("double")
def test_one_pruned_layer_in_the_middle():
    example = examples.mlp(widths=(9, 8, 3), activation=nn.sigmoid)
    middle = example.params["Dense_1"] | {"kernel": jnp.zeros((9, 8))}
    params = example.params | {"Dense_1": middle}
    smaller = compact.compact(params, nn.sigmoid)
    assert compact.widths(smaller) == (0, 0, 3)
    outputs = run(smaller, nn.sigmoid, example.inputs)
    np.testing.assert_allclose(outputs, example.network(params, example.inputs), atol=1e-12)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_without_biases_only_what_is_nothing_goes(name):
    module = networks.MLP((9, 8, 3), ACTIVATIONS[name], use_bias=False)
    inputs = examples.inputs()
    params = jax.tree.map(jnp.asarray, module.init(jax.random.key(0), inputs)["params"])
    masks = prune.one_shot(params, score.random(params, jax.random.key(1)), 0.9).masks
    params = prune.apply_masks(params, masks)
    smaller = compact.compact(params, ACTIVATIONS[name])
    outputs = run(smaller, ACTIVATIONS[name], inputs)
    np.testing.assert_allclose(outputs, networks.pure(module)(params, inputs), atol=1e-12)
    if name != "sigmoid":
        assert compact.widths(smaller) != (9, 8, 3)


def test_unread_inputs_are_reported_and_dropped_on_request():
    example = examples.mlp()
    kernel = example.params["Dense_0"]["kernel"].at[jnp.array([0, 3])].set(0)
    params = example.params | {"Dense_0": example.params["Dense_0"] | {"kernel": kernel}}
    np.testing.assert_array_equal(compact.inputs_read(params), [False, True, True, False, True])
    smaller, index = compact.drop_inputs(params)
    np.testing.assert_array_equal(index, [1, 2, 4])
    assert smaller["Dense_0"]["kernel"].shape == (3, 7)
    outputs = example.network(smaller, example.inputs[:, index])
    np.testing.assert_allclose(outputs, example.network(params, example.inputs), rtol=1e-5, atol=1e-6)


def test_layers_are_counted_not_spelt():
    example = examples.mlp(widths=(4,) * 11 + (2,))
    assert networks.layers(example.params)[-2:] == ["Dense_10/kernel", "Dense_11/kernel"]
    with pytest.raises(ValueError, match="kernels and biases alone: they hold LayerNorm_0/bias"):
        compact.compact(examples.residual().params, nn.relu)
    with pytest.raises(ValueError, match="not the params of an MLP, each layer reading the one before"):
        networks.layers({"a": {"kernel": jnp.zeros((3, 4))}, "b": {"kernel": jnp.zeros((5, 2))}})
    with pytest.raises(ValueError, match="not the params of an MLP"):
        compact.compact({"scale": jnp.zeros(3)}, nn.relu)


@pytest.mark.parametrize("sparsity", [0.0, 0.7, 1.0])
def test_sparse_forms_answer_the_same(sparsity):
    example = pruned_mlp(jnp.tanh, sparsity)
    expected = example.network(example.params, example.inputs)
    bcsr = compact.to_sparse(example.params)
    np.testing.assert_allclose(compact.forward(bcsr, example.inputs, jnp.tanh), expected, rtol=2e-5, atol=1e-5)
    csr = compact.to_sparse(example.params, "csr")
    assert isinstance(csr["Dense_0"]["kernel"], scipy.sparse.csr_array)
    assert csr["Dense_0"]["kernel"].nnz == int(jnp.count_nonzero(example.params["Dense_0"]["kernel"]))
    found = compact.forward(csr, np.asarray(example.inputs), np.tanh)
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


def test_a_sparse_network_is_jitted():
    example = pruned_mlp(jnp.tanh)
    call = jax.jit(lambda params, x: compact.forward(params, x, jnp.tanh))
    found = call(compact.to_sparse(compact.compact(example.params, jnp.tanh)), example.inputs)
    np.testing.assert_allclose(found, example.network(example.params, example.inputs), rtol=2e-5, atol=1e-5)
    with pytest.raises(ValueError, match="kind is 'coo'; it must be one of 'bcsr', 'csr'"):
        compact.to_sparse(example.params, "coo")


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.95, 1.0])
def test_a_file_holds_every_bit(tmp_path, dtype, sparsity):
    example = pruned_mlp(sparsity=sparsity)
    params = jax.tree.map(lambda leaf: np.asarray(leaf.astype(dtype)), example.params)
    params["Dense_0"]["kernel"] = params["Dense_0"]["kernel"].copy()
    params["Dense_0"]["kernel"][:4, 0] = [-0.0, np.nan, np.inf, 1e-40]
    size = compact.save(tmp_path / "net.safetensors", params, "relu")
    assert size == (tmp_path / "net.safetensors").stat().st_size
    found = compact.load(tmp_path / "net.safetensors")
    assert (found.activation, found.widths) == ("relu", (9, 8, 3))
    for path, leaf in networks.by_path(found.params).items():
        expected = networks.by_path(params)[path]
        assert leaf.dtype == expected.dtype
        assert leaf.shape == expected.shape
        assert leaf.tobytes() == expected.tobytes()


def test_files_of_empty_layers(tmp_path):
    smaller = compact.compact(pruned_mlp(sparsity=1.0).params, nn.relu)
    compact.save(tmp_path / "net", smaller, "relu")
    assert compact.load(tmp_path / "net").widths == (0, 0, 3)


def test_sparse_layers_make_small_files(tmp_path):
    example = pruned_mlp(sparsity=0.98, widths=(300, 100, 10))
    dense = compact.save(tmp_path / "dense", examples.mlp(widths=(300, 100, 10)).params, "relu")
    assert compact.save(tmp_path / "sparse", example.params, "relu") < 0.08 * dense


def test_foreign_files_and_missing_ones(tmp_path):
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"was not written by ecjax.compact.save: its format is None"):
        compact.load(tmp_path / "foreign")
    with pytest.raises(FileNotFoundError):
        compact.load(tmp_path / "missing")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net"
    compact.save(path, pruned_mlp().params, "relu")
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        compact.save(path, pruned_mlp(seed=1).params, "relu")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["net"]


def test_params_that_are_no_nested_dicts_are_refused(tmp_path):
    params = [{"kernel": np.zeros((2, 2)), "bias": np.zeros(2)}]
    with pytest.raises(ValueError, match="only params of nested dicts"):
        compact.save(tmp_path / "net", params, "relu")


def test_a_report_counts_and_times_every_form():
    example = pruned_mlp(jnp.tanh, 0.7, widths=(20, 20, 3))
    forms = compact.report(example.params, jnp.tanh, numpy_activation=np.tanh, repeats=3)
    assert [(form.runtime, form.name) for form in forms] == [
        (runtime, name) for runtime in ("JAX", "NumPy") for name in ("dense", "compacted", "sparse")
    ]
    dense, compacted, sparse = forms[:3]
    assert dense.parameters == 5 * 20 + 20 * 20 + 20 * 3 + 43
    assert dense.multiply_adds == 560
    assert dense.bytes == 4 * dense.parameters
    kept = compact.compact(example.params, jnp.tanh)
    assert compacted.parameters == sum(leaf.size for leaf in jax.tree.leaves(kept)) < dense.parameters
    assert sparse.parameters == sparse.nonzeros == compacted.nonzeros
    assert sparse.multiply_adds == sum(int(jnp.count_nonzero(leaf)) for leaf in jax.tree.leaves(networks.kernels(kept)))
    for form in forms:
        assert set(form.seconds) == {1, 256}
        assert all(0 < seconds < 1 for seconds in form.seconds.values())
