"""Matrix products are computed in full, whatever the setting and the device's own choice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

from ecjax import prune, repair, score, surgeon
from tests import examples

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
FULL = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def products(jaxpr):
    """The precision and the dtype of every matrix product in a jaxpr, and in those inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"], equation.outvars[0].aval.dtype
        for inner in core.jaxprs_in_params(equation.params):
            yield from products(inner)


def labels(inputs):
    return jnp.arange(len(inputs)) % 3


FUNCTIONS = {
    "elimination_compensation": score.elimination_compensation,
    "by_definition": score.elimination_compensation_by_definition,
    "nonlinear": score.nonlinear_elimination_compensation,
    "optimal_brain_damage": score.optimal_brain_damage,
    "neurons": score.neuron_elimination_compensation,
    "gradient_magnitude": lambda network, params, x: score.gradient_magnitude(
        network, params, x, targets=labels(x), loss=cross_entropy
    ),
    "loss_gradients": lambda network, params, x: surgeon.loss_gradients(network, params, x, labels(x), cross_entropy),
    "biases": lambda network, params, x: repair.Biases(metric="fisher", iterations=1)(
        network, params, prune.one_shot(params, score.magnitude(network, params, x), 0.5).masks, x, labels(x)
    ),
    "staged": lambda network, params, x: prune.staged(
        network, params, x, 0.5, stages=1, repair=repair.Survivors(iterations=1)
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_product_is_in_full(name):
    example = examples.jitted_before()
    with jax.default_matmul_precision("bfloat16"):
        traced = jax.make_jaxpr(lambda params, x: FUNCTIONS[name](example.network, params, x))(*example[1:])
    assert {precision for precision, _ in products(traced.jaxpr)} == {FULL}


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["bfloat16", "tensorfloat32", "float32"])
def test_the_setting_changes_nothing(setting):
    example = examples.mlp()
    expected = score.elimination_compensation(*example, metric="fisher")
    with jax.default_matmul_precision(setting):
        found = score.elimination_compensation(*example, metric="fisher")
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_float32_scores_keep_the_digits_of_float32():
    example = examples.mlp(samples=500)
    found = score.elimination_compensation(*example)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), example[1:])
        expected = score.elimination_compensation(example.network, *double)
    # TF32 rounds each factor to one part in 2,000.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-5, 1e-5 * np.abs(b).max()), found, expected)


def test_layers_in_bfloat16_stay_in_bfloat16():
    example = examples.mlp()
    params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), example[1:])
    traced = jax.make_jaxpr(lambda params, x: score.elimination_compensation(example.network, params, x))(params, x)
    of_dtype = {dtype for _, dtype in products(traced.jaxpr)}
    assert of_dtype == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}  # the network's own, and the moments
