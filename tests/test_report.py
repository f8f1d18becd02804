"""What a report says of a network and its smaller one."""

import io

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from ecjax import _trees, compact, graph, networks
from tests import examples
from tests.architectures import ARCHITECTURES
from tests.test_compact import kernels, pruned_mlp
from tests.test_exports import without_half


def reported(network, params, inputs, **options):
    return compact.report(network, params, *compact.compact(network, params, inputs), inputs, repeats=1, **options)


@pytest.mark.slow
def test_every_form_of_a_multilayer_perceptron_is_counted_and_timed():
    example = pruned_mlp(jnp.tanh, 0.7, widths=(20, 20, 3))
    forms = reported(*example, activation=jnp.tanh, numpy_activation=np.tanh)
    assert [(form.runtime, form.name) for form in forms] == [
        (runtime, name) for runtime in ("JAX", "NumPy") for name in ("dense", "compacted", "sparse")
    ]
    dense, compacted, sparse = forms[:3]
    assert dense.parameters == 5 * 20 + 20 * 20 + 20 * 3 + 43
    assert dense.flops == graph.Flops(2 * 560, 2 * (20 + 20) + 3)
    assert dense.bytes == 4 * dense.parameters
    kept = compact.fold(*example)
    assert compacted.parameters == sum(leaf.size for leaf in jax.tree.leaves(kept)) < dense.parameters
    assert compacted.flops.products == 2 * sum(kernel.size for kernel in kernels(kept))
    assert sparse.parameters == sparse.nonzeros == compacted.nonzeros
    assert sparse.flops.products == 2 * sum(int(jnp.count_nonzero(kernel)) for kernel in kernels(kept))
    for form in forms:
        assert set(form.seconds) == {1, 256}
        assert all(seconds > 0 for seconds in form.seconds.values())
    assert forms.difference < 1e-5 < forms.greatest


@pytest.mark.slow
def test_the_sparse_forms_need_the_network_s_own_activation():
    example = pruned_mlp(jnp.tanh, 0.7)
    assert [form.name for form in reported(*example)] == ["dense", "compacted"]
    with pytest.raises(ValueError, match=r"^activation is not the network's: .* it answers otherwise, by up to"):
        reported(*example, activation=nn.relu)
    with pytest.raises(ValueError, match=r"^numpy_activation is not the network's"):
        reported(*example, activation=jnp.tanh, numpy_activation=np.sin)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "activation"), [("relu", nn.relu), ("tanh", jnp.tanh), ("gelu", nn.gelu)])
def test_an_activation_by_name_is_that_of_jax_and_of_numpy(name, activation):
    forms = reported(*pruned_mlp(activation, 0.7), activation=name, batches=(1,))
    assert [form.runtime for form in forms] == ["JAX"] * 3 + ["NumPy"] * 3


def test_another_name_of_an_activation():
    with pytest.raises(ValueError, match=r"^activation is 'swish'; it must be one of 'relu', 'tanh', 'gelu', or a "):
        reported(*pruned_mlp(jnp.tanh, 0.7), activation="swish")


def test_an_equinox_mlp_of_narrow_numbers():
    mlp = eqx.nn.MLP(5, 3, width_size=7, depth=2, activation=jnp.tanh, dtype=jnp.bfloat16, key=jax.random.key(0))
    network, inputs = lambda mlp, x: jax.vmap(mlp)(x), examples.inputs().astype(jnp.bfloat16)
    forms = reported(network, mlp, inputs, numpy_activation=np.tanh, batches=(1,))
    assert [form.parameters for form in forms[:4]] == [122] * 4
    assert [form.runtime for form in forms] == ["JAX"] * 2 + ["NumPy"] * 3


KINDS = ["scanned attention", "grouped convolutions", "looped"]


@pytest.mark.parametrize("name", [*KINDS, pytest.param("gated transformer", marks=pytest.mark.slow)])
def test_networks_of_any_kind(name):
    """A scanned transformer, a convnet, a loop whose operations are not known, and a transformer of tokens."""
    network, params, inputs = ARCHITECTURES[name]().example
    smaller, small, _ = without_half(network, params, inputs)
    report = compact.report(network, params, smaller, small, inputs, batches=(1, 3), repeats=2)
    dense, compacted = report
    one = jax.ShapeDtypeStruct((1, *inputs.shape[1:]), inputs.dtype)
    assert dense.flops == graph.count_flops(network, params, one)
    assert compacted.flops.products < 0.8 * dense.flops.products
    assert compacted.parameters == sum(leaf.size for leaf in jax.tree.leaves(small)) < dense.parameters
    assert report.difference > 0  # what went had not been zero
    assert ("FLOPs are the least there are: while may take more." in str(report)) == (name == "looped")


@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_removed_units_take_their_operations_along(name):
    """The number by hand: half of the units of a layer are half of its products and of those that read it."""
    network, params, inputs = ARCHITECTURES[name]().example
    layer = networks.layers(network, params, inputs)[0]
    before = graph.count_flops(network, params, inputs)
    groups = networks.groups(network, params, inputs)
    (index,) = [i for i, group in enumerate(groups) if group.produced == (layer.kernel,) and group.free]
    _, small = graph.without_units(network, params, groups, {index: range(groups[index].length // 2)})
    smaller, _ = graph.without_units(network, params, groups, {index: range(groups[index].length // 2)})
    after = graph.count_flops(smaller, small, inputs)
    shapes = {path: leaf.shape for path, leaf in _trees.by_path(small).items()}
    if name == "mlp":
        assert after.products == 2 * len(inputs) * sum(np.prod(shapes[f"Dense_{i}/kernel"]) for i in range(3))
    assert after.products < before.products
    assert after.others < before.others


DENSE = compact.Form("dense", "JAX", 2000, 1000, 8000, graph.Flops(4000, 10), {1: 5e-5, 256: 8e-4})
SMALLER = DENSE._replace(name="compacted", flops=graph.Flops(4000, 10, ("while",)), seconds={1: 4.9e-5, 256: 7e-4})


def test_a_report_is_honest_where_nothing_is_faster():
    text = str(compact.Report([DENSE, SMALLER], difference=1e-7, greatest=2.0))
    assert "49 " in text
    assert "700 (1.1×)" in text
    assert "No faster than dense, by the number of samples: compacted, JAX (1)." in text
    assert "at least 4,010 (100%)" in text
    neither = compact.Report([DENSE, SMALLER._replace(seconds={1: 6e-5, 256: 8e-4})])
    assert "compacted, JAX (1 and 256)." in str(neither)
    both = compact.Report([DENSE, SMALLER._replace(seconds={1: 1e-5, 256: 1e-4})])
    assert "No faster" not in str(both)


def test_a_report_says_where_the_networks_may_have_changed_places():
    asked = "The first network is the smaller one"
    assert asked not in str(compact.Report([DENSE, SMALLER]))
    assert asked in str(compact.Report([DENSE, SMALLER._replace(parameters=3000)]))


def test_a_report_is_a_table_in_text_in_html_and_for_rich():
    report = compact.Report([DENSE, SMALLER], difference=1e-7, greatest=2.0)
    lines = str(report).splitlines()
    assert lines[0].split()[:2] == ["form", "parameters"]
    assert set(lines[1]) == {"─"}
    assert repr(report) == str(report)
    html = report._repr_html_()
    assert "<td>compacted, JAX</td>" in html
    assert "<p>No faster than dense" in html
    console = rich.console.Console(width=120, record=True, file=io.StringIO())
    console.print(report)
    shown = console.export_text()
    assert "compacted, JAX" in shown
    assert "700 (1.1×)" in shown
    assert "No faster" in shown
    assert "FLOPs" in str(compact.Report([]))


def test_networks_that_can_not_stand_for_one_another_are_refused():
    example = examples.mlp(widths=(7, 3))
    wider = examples.mlp(widths=(7, 4))
    with pytest.raises(ValueError, match=r"outputs of different shapes, \(4, 3\) and \(4, 4\)"):
        compact.report(*example[:2], *wider[:2], example.inputs)
    with pytest.raises(ValueError, match="the network does not take inputs"):
        compact.report(*example[:2], *example[:2], example.inputs[:, :2])
    with pytest.raises(ValueError, match="repeats is 0"):
        compact.report(*example[:2], *example[:2], example.inputs, repeats=0)
    with pytest.raises(ValueError, match="a number of batches is 0"):
        compact.report(*example[:2], *example[:2], example.inputs, batches=(0,))
    convolved = ARCHITECTURES["grouped convolutions"]().example
    with pytest.raises(ValueError, match="this takes a multilayer perceptron"):
        compact.report(*convolved[:2], *convolved[:2], convolved.inputs, activation=nn.relu)
