from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecjax import networks, prune, score, surgeon
from tests import examples

pytestmark = pytest.mark.usefixtures("float64")


def by_columns(kernel, rows, sparsity=None, pattern=None, block=128, damping=0.01, samples=None):
    """The authors' algorithm in NumPy, input by input; every move is made at once, on all that comes after."""
    kernel = np.array(kernel, np.float64)
    ins, outs = kernel.shape
    hessian = 2 * rows.T @ rows / (samples or len(rows))
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    kernel[dead] = 0
    hessian += damping * np.diag(hessian).mean() * np.eye(ins)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    kept = np.ones(kernel.shape, bool)
    for i in range(ins):
        if pattern is None and i % block == 0:
            end = min(i + block, ins)
            count = round(sparsity * end * outs) - round(sparsity * i * outs)
            cost = kernel[i:end] ** 2 / np.diag(upper)[i:end, None] ** 2
            kept[i:end].flat[np.argsort(cost, axis=None, kind="stable")[:count]] = False
        if pattern is not None and i % pattern[1] == 0:
            cost = kernel[i : i + pattern[1]] ** 2 / np.diag(upper)[i : i + pattern[1], None] ** 2
            goes = np.argsort(cost, axis=0, kind="stable")[: max(len(cost) - pattern[0], 0)]
            np.put_along_axis(kept[i : i + pattern[1]], goes, False, 0)
        error = np.where(kept[i], 0, kernel[i]) / upper[i, i]
        kernel[i:] -= upper[i, i:, None] * error
        kernel[i] = np.where(kept[i], kernel[i], 0)
    return kernel, kept


def problem(ins=12, outs=7, samples=40, seed=0):
    """Correlated inputs, and a kernel."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(samples, ins)) @ generator.normal(size=(ins, ins)) + 0.5
    return jnp.asarray(x), jnp.asarray(generator.normal(size=(ins, outs)))


def product(kernel, x):
    return x @ kernel


@given(
    seed=st.integers(0, 99),
    sparsity=st.floats(0, 1),
    block=st.sampled_from([1, 5, 12, 128]),
    damping=st.sampled_from([0.01, 1.0]),
)
def test_masks_and_weights_are_those_of_the_algorithm_input_by_input(seed, sparsity, block, damping):
    x, kernel = problem(seed=seed)
    found = surgeon.sparse_gpt(product, kernel, x, sparsity, block=block, damping=damping)
    expected, kept = by_columns(kernel, np.asarray(x), sparsity, block=block, damping=damping)
    np.testing.assert_array_equal(found.masks, kept)
    np.testing.assert_allclose(found.params, expected, atol=1e-9)
    assert (~kept).sum() == round(sparsity * kernel.size)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (3, 5), (1, 20)])
@pytest.mark.parametrize("block", [1, 5, 128])
def test_patterns_are_chosen_group_by_group(pattern, block):
    x, kernel = problem(ins=11)
    found = surgeon.sparse_gpt(product, kernel, x, scope=pattern, block=block)
    expected, kept = by_columns(kernel, np.asarray(x), pattern=pattern)
    np.testing.assert_array_equal(found.masks, kept)
    np.testing.assert_allclose(found.params, expected, atol=1e-9)
    for start in range(0, 11, pattern[1]):
        assert (kept[start : start + pattern[1]].sum(0) <= pattern[0]).all()


def test_in_single_precision_it_is_nearly_the_same():
    x, kernel = (array.astype(jnp.float32) for array in problem(ins=60, samples=200))
    found = surgeon.sparse_gpt(product, kernel, x, 0.6, block=16)
    expected, kept = by_columns(kernel, np.asarray(x, np.float64), 0.6, block=16)
    assert found.params.dtype == jnp.float32
    assert (np.asarray(found.masks) == kept).mean() > 0.99
    error = [np.linalg.norm(x @ (weights - kernel)) for weights in (found.params, expected)]
    np.testing.assert_allclose(*error, rtol=1e-3)


def test_the_removal_of_one_input_is_optimal_brain_surgeon():
    """With all before it settled, which the first input has none of: the constrained minimum of the quadratic."""
    x, kernel = problem()
    hessian = 2 * np.asarray(x).T @ np.asarray(x) / len(x)
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(12)
    inverse = np.linalg.inv(hessian)
    only = kernel.at[0].mul(1e-6)  # so that these are what goes
    found = surgeon.sparse_gpt(product, only, x, 1 / 12)
    expected = only - inverse[:, :1] / inverse[0, 0] * only[0]
    np.testing.assert_array_equal(found.masks, np.arange(12)[:, None] > np.zeros(7))
    np.testing.assert_allclose(found.params, expected.at[0].set(0), atol=1e-12)
    assert (found.params[1:] != only[1:]).all()


def features(seed):
    """What a layer sees in a network, correlated features of a mean of their own; and a kernel."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(48, 48)) / np.sqrt(48)
    x = np.maximum(generator.normal(size=(400, 48)) @ mixing + 0.3 * generator.normal(size=48), 0)
    return jnp.asarray(x), jnp.asarray(generator.normal(size=(48, 8)))


def change(x, kernel, pruned):
    """By how much the products change."""
    return float(((x @ (pruned - kernel)) ** 2).sum())


@given(seed=st.integers(0, 99), sparsity=st.sampled_from([0.2, 0.5, 0.8]))
def test_the_move_is_most_of_what_least_squares_could_do(seed, sparsity):
    """Given the masks, no weights change the products less than those of least squares."""
    x, kernel = features(seed)
    found = surgeon.sparse_gpt(product, kernel, x, sparsity, damping=1e-6)
    best = np.zeros(kernel.shape)
    for neuron in range(kernel.shape[1]):
        kept = np.asarray(found.masks[:, neuron])
        best[kept, neuron] = np.linalg.lstsq(np.asarray(x)[:, kept], x @ kernel[:, neuron], rcond=None)[0]
    only_removed = jnp.where(found.masks, kernel, 0)
    least, moved, without = (change(x, kernel, weights) for weights in (best, found.params, only_removed))
    assert least <= moved * (1 + 1e-9)
    assert moved - least < 0.7 * (without - least)


@given(seed=st.integers(0, 99), sparsity=st.sampled_from([0.3, 0.5, 0.8, (2, 4)]))
def test_the_products_change_less_than_by_magnitude_or_wanda(seed, sparsity):
    x, kernel = features(seed)
    how = {"scope": sparsity} if isinstance(sparsity, tuple) else {"sparsity": sparsity}
    found = change(x, kernel, surgeon.sparse_gpt(product, kernel, x, **how).params)
    for criterion, margin in ((score.magnitude, 0.95), (score.wanda, 1.1 if sparsity == 0.8 else 1)):  # of all seeds
        scores = criterion(product, kernel, x)
        assert found < margin * change(x, kernel, prune.one_shot(kernel, scores, **how).params)


def test_layer_after_layer_on_what_the_pruned_layers_before_give():
    network, params, x = examples.mlp()
    found = surgeon.sparse_gpt(network, params, x, 0.5, block=4, batch_size=10)
    rows = np.asarray(x)
    for name in ("Dense_0", "Dense_1", "Dense_2"):
        expected, kept = by_columns(params[name]["kernel"], rows, 0.5, block=4)
        np.testing.assert_array_equal(found.masks[name]["kernel"], kept)
        np.testing.assert_allclose(found.params[name]["kernel"], expected, atol=1e-9)
        np.testing.assert_array_equal(found.params[name]["bias"], params[name]["bias"])
        rows = np.asarray(nn.gelu(rows @ expected + params[name]["bias"]))


class Case(NamedTuple):
    """A network of one kernel, that kernel, and its rows and matrices as its definition gives them."""

    network: networks.Network
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    rows: str  # einops-like: of inputs, to members, rows and inputs
    matrices: str


def einsum(how):
    return lambda kernel, x: jnp.einsum(how, x, kernel)


def heads(kernel, x):
    return jnp.einsum("nti,iho->ntho", x, kernel).reshape(*x.shape[:2], 6)


CASES = {
    "transposed": Case(einsum("ni,oi->no"), (3, 5), (8, 5), "ni->1ni", "oi->1io"),
    "positions": Case(einsum("nti,io->nto"), (5, 3), (8, 4, 5), "nti->1nti", "io->1io"),
    "heads": Case(heads, (5, 2, 3), (8, 4, 5), "nti->1nti", "iho->1iho"),
    "from heads": Case(einsum("nthi,hio->nto"), (2, 3, 4), (8, 4, 2, 3), "nthi->1nthi", "hio->1hio"),
    "mixed order": Case(einsum("nith,oih->nto"), (4, 3, 2), (8, 3, 5, 2), "nith->1nthi", "oih->1hio"),
    "experts": Case(einsum("nei,eio->neo"), (3, 5, 4), (8, 3, 5), "nei->eni", "eio->eio"),
    "one sample": Case(einsum("nti,io->nto"), (5, 3), (1, 9, 5), "nti->1nti", "io->1io"),
}


def arranged(array, how):
    """An array with axes in another order; "1" is a new one."""
    before, after = how.split("->")
    moved = np.einsum(f"{before}->{after.replace('1', '')}", np.asarray(array))
    return moved[None] if after.startswith("1") else moved


@pytest.mark.parametrize("name", CASES)
def test_every_layout_of_a_dense_kernel(name):
    case = CASES[name]
    generator = np.random.default_rng(0)
    kernel, x = (jnp.asarray(generator.normal(size=shape)) for shape in (case.shape, case.inputs))
    layout = networks.layers(case.network, kernel, x)[0].layout
    members, ins, outs = layout.sizes
    found = surgeon.sparse_gpt(case.network, kernel, x, 0.5, batch_size=3)
    rows = arranged(x, case.rows).reshape(members, -1, ins)
    matrices, moved, masks = (
        arranged(leaf, case.matrices).reshape(members, ins, outs) for leaf in (kernel, found.params, found.masks)
    )
    for member in range(members):
        expected, kept = by_columns(matrices[member], rows[member], 0.5, samples=len(x))
        np.testing.assert_array_equal(masks[member], kept)
        np.testing.assert_allclose(moved[member], expected, atol=1e-9)


def test_dead_inputs_are_set_to_zero_as_the_authors_do():
    x, kernel = problem()
    x = x.at[:, [3, 7]].set(0)
    found = surgeon.sparse_gpt(product, kernel, x, 0.1)
    expected, kept = by_columns(kernel, np.asarray(x), 0.1)
    np.testing.assert_array_equal(found.masks, kept)
    np.testing.assert_allclose(found.params, expected, atol=1e-9)
    assert (found.params[jnp.array([3, 7])] == 0).all()
    nothing = surgeon.sparse_gpt(product, kernel, jnp.zeros((4, 12)), 0.5)
    assert (nothing.params == 0).all()


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_the_ends(sparsity):
    x, kernel = problem()
    found = surgeon.sparse_gpt(product, kernel, x, sparsity)
    np.testing.assert_array_equal(found.params, kernel * (1 - sparsity))
    assert prune.sparsity(found.masks) == sparsity


def test_other_sparsities_compile_nothing_and_a_traced_one_is_the_same(compilations):
    network, params, x = examples.mlp()
    found = surgeon.sparse_gpt(network, params, x, 0.5)
    before = compilations()
    surgeon.sparse_gpt(network, params, x, 0.7)
    assert compilations() == before
    traced = jax.jit(lambda params, sparsity: surgeon.sparse_gpt(network, params, x, sparsity))(params, 0.5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), traced, found)


def test_what_is_excluded_keeps_every_bit():
    network, params, x = examples.mlp()
    found = surgeon.sparse_gpt(network, params, x, 0.5, exclude="Dense_1/*")
    jax.tree.map(np.testing.assert_array_equal, found.params["Dense_1"], params["Dense_1"])
    assert found.masks["Dense_1"]["kernel"] is None


def shared(params, x):
    return jnp.tanh(x @ params["w"]) @ params["w"]


def tied(params, x):
    return jnp.take(params["table"], x, 0).mean(1) @ params["table"].T


def scanned(params, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]


def convolved(params, x):
    return jax.lax.conv(x[:, None], params["w"], (1,), "SAME")[:, 0]


def repeated(params, x):
    kernels = jnp.broadcast_to(params["w"][None], (3, 2, 4, 5))
    return jnp.einsum("nkei,keio->nkeo", x, kernels)


REFUSED = {
    "shared": (shared, {"w": (4, 4)}, (6, 4), "'w' is used 2 times"),
    "tied": (tied, {"table": (9, 4)}, None, "'table' is also looked up in"),
    "scanned": (scanned, {"w": (3, 4, 4)}, (6, 4), "'w' is used inside a scan"),
    "convolved": (convolved, {"w": (1, 1, 3)}, (6, 8), "'w' is convolved"),
    "repeated": (repeated, {"w": (2, 4, 5)}, (6, 3, 2, 4), "'w' is a stack that is repeated along an axis"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_kernels_that_are_not_dense_are_refused_by_name(name):
    network, shapes, inputs, message = REFUSED[name]
    params = {leaf: jnp.ones(shape) for leaf, shape in shapes.items()}
    x = jnp.zeros((6, 3), int) if inputs is None else jnp.ones(inputs)
    with pytest.raises(ValueError, match=rf"this takes dense kernels that are used once; {message}.*exclude="):
        surgeon.sparse_gpt(network, params, x, 0.5)


BAD = {
    "neither": ({}, "scope 'layer' needs a sparsity"),
    "both": ({"scope": (2, 4), "sparsity": 0.5}, r"scope \(2, 4\) says itself how many weights stay"),
    "sparsity": ({"sparsity": 2}, r"sparsity is 2; it must be in \[0, 1\]"),
    "scope": ({"sparsity": 0.5, "scope": "network"}, "SparseGPT chooses within each kernel: 'layer', or a pair"),
    "pattern": ({"scope": (4, 2)}, r"scope is \(4, 2\); a pattern \(N, M\) keeps N of M inputs"),
    "damping": ({"sparsity": 0.5, "damping": 0}, "damping is 0; it must be above 0"),
    "block": ({"sparsity": 0.5, "block": 0}, "block is 0; it must be a whole number of at least 1"),
    "exclude": ({"sparsity": 0.5, "exclude": "*"}, "no kernel"),
    "singular": ({"sparsity": 0.5, "damping": 1e-300}, "or raise the damping, 1e-300 may be too small"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    options, message = BAD[name]
    x = jnp.ones((6, 12))
    with pytest.raises(ValueError, match=message):
        surgeon.sparse_gpt(product, problem()[1], x, **options)


def test_each_pattern_has_its_sparsity_and_others_stay_as_they_are():
    network, params, inputs = examples.mlp()
    seen = []
    each = {"Dense_0/*": 0.75, "Dense_2/kernel": 0.5}
    pruned = surgeon.sparse_gpt(network, params, inputs, each, progress=seen.append)
    assert pruned.masks["Dense_1"]["kernel"] is None
    np.testing.assert_array_equal(pruned.params["Dense_1"]["kernel"], params["Dense_1"]["kernel"])
    assert [kernel.path for kernel in seen] == ["Dense_0/kernel", "Dense_2/kernel"]
    alone = surgeon.sparse_gpt(network, params, inputs, 0.75, exclude=("Dense_1/*", "Dense_2/*"))
    np.testing.assert_array_equal(pruned.params["Dense_0"]["kernel"], alone.params["Dense_0"]["kernel"])
    last = pruned.masks["Dense_2"]["kernel"]
    assert (~last).sum() == round(0.5 * last.size)
    with pytest.raises(ValueError, match="the pattern 'head' of the sparsity gets no kernel"):
        surgeon.sparse_gpt(network, params, inputs, {"head": 0.5})
