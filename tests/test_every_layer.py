"""Scores of every kind of layer, against the gradients of each sample and each row of the metric in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecjax import devices, metrics, moments, networks, prune, repair, score, surgeon, train
from tests import zoo

pytestmark = pytest.mark.usefixtures("float64")
MADE = functools.cache(lambda name: zoo.ZOO[name]())
QUICK = ("positions", "convolutions in one axis", "attention by hand", "used twice", "a scanned stack")
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in zoo.ZOO]
METRIC = dict.fromkeys(("outputs at positions", "tied embedding", "places as classes"), "fisher")


def gradients(network, params, inputs, metric, weights=None):
    """R ∂y/∂θ of every sample, by path: (samples, rows, *shape)."""

    def of_sample(x, weight):
        outputs = network(params, x[None])
        slopes = jax.jacrev(lambda params: network(params, x[None]))(params)
        rows = jnp.eye(outputs.size).reshape(-1, *outputs.shape)
        if weight is not None:
            rows = rows * jnp.sqrt(weight).reshape(1, 1, *weight.shape, *(1,) * (outputs.ndim - 1 - weight.ndim))
        factor = jax.vmap(lambda row: metrics.named(metric).factor(outputs, row))(rows).reshape(outputs.size, -1)
        flat = lambda slope: slope.reshape(outputs.size, *slope.shape[outputs.ndim :])  # noqa: E731
        return {path: jnp.tensordot(factor, flat(slope), 1) for path, slope in networks.by_path(slopes).items()}

    each = [of_sample(x, None if weights is None else weights[n]) for n, x in enumerate(inputs)]
    return jax.tree.map(lambda *slopes: np.stack(slopes), *each)


def expected(found, metric="euclidean", weights=None):
    """By kernel: importance, shift and optimal brain damage, from the definition."""
    (network, params, inputs), leaves = found.example, networks.by_path(found.example.params)
    slopes, result = gradients(network, params, inputs, metric, weights), {}
    for kernel, bias in found.biases.items():
        a, weight = slopes[kernel], np.asarray(leaves[kernel])
        damage = weight**2 * (a**2).sum((0, 1)) / len(inputs)
        mean = np.zeros_like(weight)
        if bias is not None and bias not in found.ignored:
            stack = int(kernel in found.stacked)
            between = (1,) * (weight.ndim - leaves[bias].ndim)
            b = slopes[bias].reshape(*slopes[bias].shape[: 2 + stack], *between, *slopes[bias].shape[2 + stack :])
            total = (b**2).sum((0, 1))
            mean = (a * b).sum((0, 1)) / np.where(total > 0, total, 1)
            a = a - mean * b
        result[kernel] = weight**2 * (a**2).sum((0, 1)) / len(inputs), weight * mean, damage
    return result


def close(found, wanted, rtol=1e-9):
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=max(rtol * scale, 1e-15))


@pytest.mark.parametrize("name", EVERY)
def test_scores_are_those_of_the_gradients(name):
    found, metric = MADE(name), METRIC.get(name, "euclidean")
    scores = score.elimination_compensation(*found.example, metric=metric)
    damages = networks.by_path(score.optimal_brain_damage(*found.example, metric=metric).importance)
    importances, shifts = networks.by_path(scores.importance), networks.by_path(scores.bias_shift)
    wanted = expected(found, metric)
    assert importances.keys() == wanted.keys()
    for kernel, (importance, shift, damage) in wanted.items():
        close(importances[kernel], importance)
        close(shifts[kernel], shift)
        close(damages[kernel], damage)
        if found.biases[kernel] in found.ignored:
            assert not shifts[kernel].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, "outputs at positions"])
def test_the_definition_agrees(name):
    found, metric = MADE(name), METRIC.get(name, "euclidean")
    options = {"metric": metric, "weights_at_once": 16}
    scores = score.elimination_compensation(*found.example, metric=metric)
    literal = score.elimination_compensation_by_definition(*found.example, **options)
    exact = score.nonlinear_elimination_compensation(*found.example, **options)
    jax.tree.map(functools.partial(close, rtol=1e-7), scores.importance, literal.importance)
    jax.tree.map(functools.partial(close, rtol=1e-6), scores.bias_shift, literal.bias_shift)
    for kernel, bias in found.biases.items():
        moved = networks.by_path(exact.bias_shift)[kernel]
        assert np.isfinite(moved).all()
        assert bias is not None or not moved.any()


@pytest.mark.slow
@pytest.mark.parametrize("of", ["samples", "positions"])
def test_weights_say_how_much_samples_and_positions_count(of):
    found = MADE("outputs at positions")
    shape = (zoo.N,) if of == "samples" else (zoo.N, 4)
    weights = jnp.asarray(np.random.default_rng(0).integers(0, 3, shape).astype(float))
    scores = score.elimination_compensation(*found.example, metric="fisher", weights=weights)
    for kernel, (importance, shift, _) in expected(found, "fisher", weights).items():
        close(networks.by_path(scores.importance)[kernel], importance)
        close(networks.by_path(scores.bias_shift)[kernel], shift)
    literal = score.elimination_compensation_by_definition(*found.example, metric="fisher", weights=weights)
    jax.tree.map(functools.partial(close, rtol=1e-7), scores.importance, literal.importance)


@pytest.mark.slow
def test_padding_of_weight_zero_does_not_count():
    network, params, inputs = MADE("outputs at positions").example
    weights = jnp.ones((zoo.N, 4)).at[:, 3].set(0)
    padded = score.elimination_compensation(network, params, inputs, metric="fisher", weights=weights)
    without = score.elimination_compensation(network, params, inputs[:, :3], metric="fisher")
    jax.tree.map(close, padded.importance, without.importance)
    masks = prune.one_shot(params, padded, 0.5).masks
    moved = [
        repair.Survivors(iterations=1, metric="fisher")(network, params, masks, x, network(params, x), weights=weights)
        for x in (inputs, inputs.at[:, 3].set(7))
    ]
    jax.tree.map(close, *moved)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (jnp.ones(4), r"weights of shape \(4,\) must be numbers of shape \(5,\), or \(5, 4\)"),
        (jnp.ones((5, 4, 3)), r"weights of shape \(5, 4, 3\) must be"),
        (-jnp.ones(5), "weights must be at least 0 and finite"),
        (jnp.zeros(5), "not all of them 0"),
    ],
)
def test_weights_that_do_not_fit(weights, message):
    with pytest.raises(ValueError, match=message):
        score.elimination_compensation(*MADE("outputs at positions").example, weights=weights)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
@pytest.mark.parametrize("sharp", [pytest.param(1.0, marks=pytest.mark.slow), 30.0])
def test_key_biases_stay_where_they_are(dtype, sharp):
    module, x = zoo.Attention(sharp=sharp), zoo.array(zoo.N, 4, 6).astype(dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), zoo.linen(module, zoo.array(zoo.N, 4, 6)).example.params)
    scores = score.elimination_compensation(networks.from_linen(module), params, x)
    assert not networks.by_path(scores.bias_shift)["mix/key/kernel"].any()
    assert networks.by_path(scores.bias_shift)["mix/query/kernel"].any()
    damage = score.optimal_brain_damage(networks.from_linen(module), params, x)
    key = "mix/key/kernel"
    np.testing.assert_array_equal(networks.by_path(scores.importance)[key], networks.by_path(damage.importance)[key])


@pytest.mark.slow
def test_only_the_keys_of_a_fused_projection_stay():
    params = {"qkv": zoo.array(4, 18) / 2, "b": zoo.array(18), "o": zoo.array(6, 3)}

    def network(params, x):
        joined = (x @ params["qkv"] + params["b"]).reshape(*x.shape[:2], 2, 9)
        q, k, v = jnp.split(joined, 3, -1)
        shares = jax.nn.softmax(jnp.einsum("nthf,nshf->nhts", q, k))
        return jnp.einsum("nhts,nshf->nthf", shares, v).reshape(*x.shape[:2], 6) @ params["o"]

    shifts = score.elimination_compensation(network, params, zoo.array(zoo.N, 5, 4)).bias_shift["qkv"]
    keys = np.arange(18) % 9 // 3 == 1
    assert not np.asarray(shifts)[:, keys].any()
    assert np.asarray(shifts)[:, ~keys].all()


@pytest.mark.slow
def test_many_rows_need_probes():
    network, params, inputs = MADE("tied embedding").example
    tokens = jnp.tile(inputs, (1, 8))
    params = params | {"places": jnp.tile(params["places"], (8, 1))}
    with pytest.raises(ValueError, match=r"\(48, 7\) are 336 rows .*give probes=1, key=jax.random.key\(0\)"):
        score.elimination_compensation(network, params, tokens, metric="fisher")
    with pytest.raises(ValueError, match=r"give key=, such as jax.random.key\(0\)"):
        prune.staged(network, params, tokens, 0.5, stages=1, repair=None)
    options = {"stages": 1, "repair": None, "key": jax.random.key(0)}
    assert prune.sparsity(prune.staged(network, params, tokens, 0.5, **options).masks) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.slow
def test_probes_converge_to_all_rows():
    network, params, inputs = MADE("outputs at positions").example
    exact = score.elimination_compensation(network, params, inputs, metric="fisher").importance
    errors = []
    for probes in (4, 400):
        found = score.elimination_compensation(
            network, params, inputs, metric="fisher", probes=probes, key=jax.random.key(0)
        ).importance
        gaps = jax.tree.map(lambda a, b: np.abs(a - b).sum() / np.abs(b).sum(), found, exact)
        errors.append(max(jax.tree.leaves(gaps)))
    assert errors[1] < 0.15
    assert errors[1] < errors[0] / 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal attention", "convolutions", "scanned attention"])
def test_batches_and_parts_are_one_array(name):
    network, params, inputs = MADE(name).example
    whole = score.elimination_compensation(network, params, inputs)
    seen = moments.of_batches(network, params, [inputs[:2], inputs[2:]])
    parts = [moments.of_inputs(network, params, part, batch_size=2) for part in (inputs[:1], inputs[1:])]
    for taken in (seen, moments.merge(*parts)):
        jax.tree.map(close, score.elimination_compensation_from_moments(params, taken), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convolutions", "tied embedding", "scanned attention", "experts", "gated recurrence"])
def test_wanda_is_weights_times_the_norms_of_what_they_multiply(name):
    """The squares of what an entry multiplies are the gradient of the products with squared inputs."""
    found = MADE(name)
    network, params, inputs = found.example
    scores = score.wanda(network, params, inputs, batch_size=2)
    assert networks.by_path(scores.importance).keys() == found.biases.keys()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(scores.importance))


def test_wanda_by_its_definition():
    network, params, inputs = MADE("positions").example
    importance = score.wanda(network, params, inputs, batch_size=3).importance
    hidden = jnp.tanh(inputs @ params["first"]["kernel"] + params["first"]["bias"])
    for name, given in (("first", inputs), ("head", hidden)):
        norms = np.sqrt((np.asarray(given) ** 2).sum((0, 1)))
        close(importance[name]["kernel"], np.abs(params[name]["kernel"]) * norms[:, None])


def test_wanda_of_a_convolution_by_its_patches():
    conv = nn.Conv(3, (2, 2), strides=2)
    x, params = zoo.array(zoo.N, 5, 5, 2), {"kernel": zoo.array(2, 2, 2, 3)}
    network = lambda p, x: conv.apply({"params": p | {"bias": jnp.zeros(3)}}, x).mean((1, 2))  # noqa: E731
    padded = np.pad(np.asarray(x), ((0, 0), (0, 1), (0, 1), (0, 0)))
    patches = padded.reshape(zoo.N, 3, 2, 3, 2, 2).transpose(0, 1, 3, 2, 4, 5)
    norms = np.sqrt((patches**2).sum((0, 1, 2)))
    close(score.wanda(network, params, x).importance["kernel"], np.abs(params["kernel"]) * norms[..., None])


@pytest.mark.slow
def test_memory_is_that_of_the_gradient_and_what_is_rematerialised_stays_so():
    """XLA's account of 24 scanned layers: no (samples, weights), and nothing kept that the network computes again."""
    blocks = zoo.Blocks(heads=4, length=24)
    inputs = jax.ShapeDtypeStruct((64, 32, 64), jnp.float32)
    network = networks.from_linen(blocks)
    params = jax.eval_shape(lambda: blocks.init(jax.random.key(0), jnp.zeros(inputs.shape, inputs.dtype))["params"])

    def scored(params, inputs):
        probed = {"probes": 1, "key": jax.random.key(0), "batch_size": inputs.shape[0]}
        return score.elimination_compensation(network, params, inputs, **probed).importance

    slopes = jax.grad(lambda params, inputs: (network(params, inputs) ** 2).sum())
    taken, of_gradient = (
        jax.jit(call).lower(params, inputs).compile().memory_analysis().temp_size_in_bytes for call in (scored, slopes)
    )
    assert "remat" in str(jax.make_jaxpr(scored)(params, inputs))
    assert taken < 1.5 * of_gradient


LOSS = optax.softmax_cross_entropy_with_integer_labels


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convolutions", "tied embedding", "scanned attention"])
def test_everything_prunes(name):
    network, params, inputs = MADE(name).example
    outputs = network(params, inputs)
    labels, few = outputs.argmax(-1), {"iterations": 1, "products": 2}
    gradients_of_loss = surgeon.loss_gradients(network, params, inputs, labels, LOSS)
    scores = {
        "EC": score.elimination_compensation(network, params, inputs),
        "gradient magnitude": score.gradient_magnitude(network, params, inputs, targets=labels, loss=LOSS),
        "surgeon": surgeon.brain_surgeon_saliency_from_gradients(params, gradients_of_loss, damping=1e-2),
        "wanda": score.wanda(network, params, inputs),
    }
    weights = sum(leaf.size for leaf in jax.tree.leaves(scores["EC"].importance))
    for found in scores.values():
        masks = prune.one_shot(params, found, 0.5).masks
        assert sum(int((~mask).sum()) for mask in jax.tree.leaves(masks)) == round(0.5 * weights)
    for how in (repair.Biases(**few), repair.Survivors(**few)):
        for metric, aim in (("euclidean", None), ("fisher", labels)):
            pruned = prune.staged(network, params, inputs, 0.5, stages=2, repair=how, metric=metric, targets=aim)
            assert jax.tree.structure(pruned.params) == jax.tree.structure(params)
            for path, mask in networks.by_path(pruned.masks).items():
                assert not np.asarray(networks.by_path(pruned.params)[path])[~np.asarray(mask)].any()
    fit = {"optimizer": optax.adam(1e-2), "key": jax.random.key(0), "epochs": 1}
    tuned = train.fit(network, pruned.params, inputs, labels, LOSS, masks=pruned.masks, **fit).params
    for path, mask in networks.by_path(pruned.masks).items():
        assert not np.asarray(networks.by_path(tuned)[path])[~np.asarray(mask)].any()


@pytest.mark.slow
def test_patterns_run_along_the_inputs_of_a_neuron():
    """Of an output projection (heads, features, out), of a convolution (…, channels, out), of each of a stack."""
    attention = MADE("attention").example
    masks = prune.one_shot(attention.params, score.magnitude(*attention), scope=(1, 2)).masks["mix"]
    assert (np.asarray(masks["out"]["kernel"]).reshape(-1, 2, 6).sum(1) == 1).all()
    assert (np.asarray(masks["query"]["kernel"]).reshape(3, 2, -1).sum(1) == 1).all()
    convolutions = MADE("convolutions").example
    masks = prune.one_shot(convolutions.params, score.magnitude(*convolutions), scope=(1, 2)).masks
    assert (np.asarray(masks["plain"]["kernel"]).sum(2) == 1).all()
    stack = MADE("a scanned stack").example
    masks = prune.one_shot(stack.params, score.magnitude(*stack), 0.25, scope="layer").masks["dense"]["kernel"]
    assert (~np.asarray(masks)).sum((1, 2)).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("network", "params", "message"),
    [
        (
            lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["w"] + p["c"]),
            {"w": (4, 4), "b": (4,), "c": (4,)},
            "'w' can't be scored: it is used with different biases: 'b', 'c'",
        ),
        (
            lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["w"]),
            {"w": (4, 4), "b": (4,)},
            "is used with different biases: 'b', none",
        ),
        (
            lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T,
            {"w": (4, 4)},
            "is used 2 times, not as the same matrix",
        ),
        (
            lambda p, x: jax.lax.cond(x.sum() > 0, lambda h: h @ p["w"], lambda h: h, x),
            {"w": (4, 4)},
            "mixes samples|is used inside a branch",
        ),
    ],
)
def test_what_is_refused_by_name(network, params, message):
    made = {name: zoo.array(*shape) for name, shape in params.items()}
    with pytest.raises(ValueError, match=message):
        score.elimination_compensation(network, made, zoo.array(zoo.N, 4))


@pytest.mark.slow
def test_a_device_holds_less_where_neurons_are_spread():
    """XLA's account of one device: scores and a repair of a transformer whose kernels are on four."""
    blocks = zoo.Blocks(heads=8, length=4)
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8, 64)), jnp.float32)
    network = networks.from_linen(blocks)
    params = jax.tree.map(jnp.float32, blocks.init(jax.random.key(0), inputs)["params"])
    masks = prune.one_shot(params, score.magnitude(network, params, inputs), 0.5).masks
    repaired = repair.Survivors(iterations=1, products=2, curvature_samples=8, batch_size=8)
    calls = (
        lambda params, x: score.elimination_compensation(network, params, x, batch_size=4),
        lambda params, x: repaired(network, params, masks, x, jnp.zeros((16, 2))),
    )

    def bytes_of(model):
        mesh = devices.mesh(model, jax.devices("cpu"))
        with jax.set_mesh(mesh):
            placed = devices.shard_params(network, params, inputs, mesh), devices.shard_samples(inputs, mesh)
            found = [jax.jit(call).lower(*placed).compile().memory_analysis() for call in calls]
        return np.array([[account.argument_size_in_bytes, account.temp_size_in_bytes] for account in found])

    assert (bytes_of(4) < 0.75 * bytes_of(1)).all()


@pytest.mark.slow
@pytest.mark.parametrize("model", [2])
@pytest.mark.parametrize("name", ["causal attention", "convolutions", "scanned attention"])
def test_eight_devices_give_what_one_gives(name, model):
    network, params, inputs = MADE(name).example
    inputs = jnp.concatenate([inputs, inputs[::-1] * 0.7, inputs[:1] * 1.3, inputs[1:2], inputs[2:3] + 1, inputs[3:]])
    inputs = jnp.concatenate([inputs, inputs[:1]])[:16]
    mesh = devices.mesh(model, jax.devices("cpu"))
    placed = devices.shard_params(network, params, inputs, mesh), devices.shard_samples(inputs, mesh)
    few = {"iterations": 1, "products": 2, "curvature_samples": 16, "batch_size": 4}

    def everything(params, inputs):
        scores = score.elimination_compensation(network, params, inputs, batch_size=4)
        drawn = score.optimal_brain_damage(network, params, inputs, metric="fisher")
        pruned = [
            prune.staged(network, params, inputs, 0.5, stages=1, repair=how).params
            for how in (repair.Biases(**few), repair.Survivors(**few))
        ]
        return jax.device_get((scores.importance, scores.bias_shift, drawn.importance, pruned))

    jax.tree.map(functools.partial(close, rtol=1e-6), everything(*placed), everything(params, inputs))
