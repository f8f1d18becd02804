import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from ecjax import prune

PARAMS = {
    "first": {"kernel": jnp.asarray([[1.0, 0, 2], [0, 0, 3]]), "bias": jnp.ones(3)},
    "second": {"kernel": jnp.asarray([[4.0], [0], [5]], jnp.bfloat16)},
}
MASKS = jax.tree.map(lambda leaf: leaf != 0, PARAMS)
MASKS["first"]["bias"] = None


def test_rows_are_those_of_numpy_and_scipy():
    found = prune.summary(PARAMS, MASKS)
    assert [row.kernel for row in found.rows] == ["first/kernel", "second/kernel"]
    for row, kernel in zip(found.rows, (PARAMS["first"]["kernel"], PARAMS["second"]["kernel"]), strict=True):
        kernel = np.asarray(kernel)
        assert (row.shape, row.weights, row.bytes) == (kernel.shape, kernel.size, kernel.nbytes)
        assert row.kept == np.count_nonzero(kernel)
        csr = scipy.sparse.csr_array(kernel.T.astype(np.float32))
        assert row.sparse_bytes == row.kept * kernel.dtype.itemsize + csr.indices.nbytes + csr.indptr.nbytes
    assert found.total.sparsity == prune.sparsity(MASKS) == 4 / 9
    assert (found.total.weights, found.total.kept) == (9, 5)
    assert (found.total.bytes, found.others.bytes) == (6 * 4 + 3 * 2, 3 * 4)


def test_the_table():
    assert repr(prune.summary(PARAMS, MASKS)) == (
        "kernel                 shape  weights  kept  sparsity  bytes  bytes as CSR\n"
        "──────────────────────────────────────────────────────────────────────────\n"
        "first/kernel           2 × 3  6        3     0.500     24     40\n"
        "second/kernel          3 × 1  3        2     0.333     6      20\n"
        "kernels with a mask           9        5     0.444     30     60\n"
        "arrays without a mask         3        3     0.000     12     12"
    )


def test_the_table_in_jupyter():
    html = prune.summary(PARAMS, MASKS)._repr_html_()
    assert html.startswith("<table><tr><th>kernel</th>")
    assert html.count("<tr>") == 5


def test_a_single_array_has_no_other_leaves():
    kernel = jnp.asarray([[1.0, 0]])
    found = prune.summary(kernel, kernel != 0)
    assert [row.kernel for row in found.rows] == ["(params)"]
    assert "without a mask" not in repr(found)


def test_a_module_with_leaves_that_are_no_arrays():
    module = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    pruned = eqx.tree_at(lambda m: m.layers[0].weight, module, jnp.zeros((4, 2)))
    masks = jax.tree.map(lambda _: None, module)
    masks = eqx.tree_at(lambda m: m.layers[0].weight, masks, jnp.zeros((4, 2), bool), is_leaf=lambda leaf: leaf is None)
    found = prune.summary(pruned, masks)
    assert (found.total.kept, found.total.sparsity, found.others.weights) == (0, 1.0, 4 + 12 + 3)


@pytest.mark.parametrize("shape", [(), (0, 3), (3,), (2, 2, 3, 4)])
def test_kernels_of_any_shape(shape):
    found = prune.summary({"kernel": np.zeros(shape, np.float16)}, {"kernel": np.zeros(shape, bool)})
    assert found.total.weights == np.prod(shape)
    assert found.total.sparsity == (1.0 if np.prod(shape) else 0.0)
    assert found.total.sparse_bytes == 4 * (shape[-1] + 1 if shape else 2)


def test_shapes_alone():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert prune.summary(shapes, MASKS) == prune.summary(PARAMS, MASKS)


def test_what_is_refused():
    dense = jax.tree.map(jnp.ones_like, PARAMS)
    with pytest.raises(ValueError, match=r"3 weights of 'first/kernel' that its mask removes are not 0.*apply_masks"):
        prune.summary(dense, MASKS)
    with pytest.raises(ValueError, match="masks are boolean"):
        prune.summary(PARAMS, jax.tree.map(lambda mask: mask * 1.0, MASKS))
    with pytest.raises(ValueError, match="can't be seen under jit"):
        jax.jit(lambda masks: prune.summary(PARAMS, masks).total.kept)(MASKS)
