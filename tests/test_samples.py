"""Whether a network takes samples together: found in its operations, or by comparing values where these are unknown."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.interpreters import batching, mlir

from ecjax import _door, networks, score
from tests import examples

N, WIDTH = 5, 3


def params(seed=0, width=WIDTH):
    generator = np.random.default_rng(seed)
    shapes = {"first": {"w": (4, width), "b": (width,)}, "second": {"w": (width, 2), "b": (2,)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(generator.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def inputs(samples=N):
    return jnp.asarray(np.random.default_rng(1).normal(size=(samples, 4)), jnp.float32)


def around(between):
    """A network of two layers, with something between them."""

    def network(params, x):
        hidden = between(x @ params["first"]["w"] + params["first"]["b"])
        return jnp.tanh(hidden) @ params["second"]["w"] + params["second"]["b"]

    return network


def read(between, samples=N, width=WIDTH):
    return _door.layers(around(between), params(width=width), inputs(samples))


def read_in_jit(between, samples=N):
    network = around(between)

    def read_and_return(params, x):
        _door.layers(network, params, x)
        return x

    return jax.jit(read_and_return)(params(), inputs(samples))


def under_an_axis_name(function):
    return lambda h: jax.vmap(function, axis_name="batch")(h)


MIXED = {
    "softmax over samples": (lambda h: jax.nn.softmax(h, 0), "reduce_max"),
    "cumsum over samples": (lambda h: jnp.cumsum(h, 0), "cumsum"),
    "sort over samples": (lambda h: jnp.sort(h, 0), "sort"),
    "products of samples": (lambda h: (h @ h.T) @ h, "dot_general"),
    "a contrastive softmax": (lambda h: jax.nn.softmax(h @ h.T) @ h, "dot_general"),
    "the covariance": (lambda h: h @ (h.T @ h), "dot_general"),
    "an einsum": (lambda h: jnp.einsum("ni,mi->nm", h, h) @ h, "dot_general"),
    "the mean": (lambda h: h - h.mean(0), "reduce_sum"),
    "the mean, kept": (lambda h: h - h.mean(0, keepdims=True), "reduce_sum"),
    "the variance of all": (lambda h: h * h.var(), "reduce_sum"),
    "the largest": (lambda h: h / h.max(), "reduce_max"),
    "the norm of all": (lambda h: h / jnp.linalg.norm(h), "reduce_sum"),
    "the order reversed": (lambda h: h[::-1], "rev"),
    "the argmax": (lambda h: h + jnp.argmax(h, 0), "argmax"),
    "fft over samples": (lambda h: jnp.fft.fft(h, axis=0).real, "fft"),
    "pooling over samples": (lambda h: nn.max_pool(h.T[:, :, None], (2,), (1,), "SAME")[:, :, 0].T, "reduce_window"),
    "qr": (lambda h: jnp.linalg.qr(h)[0], "qr"),
    "triangles": (lambda h: jnp.tril(jnp.ones((len(h), len(h)))) @ h, "dot_general"),
    "pmean": (under_an_axis_name(lambda h: h - jax.lax.pmean(h, "batch")), ""),
    "psum": (under_an_axis_name(lambda h: h / jax.lax.psum(h, "batch")), ""),
    "all_gather": (under_an_axis_name(lambda h: h - jax.lax.all_gather(h, "batch")[0]), ""),
    "ppermute": (
        under_an_axis_name(lambda h: jax.lax.pshuffle(h, "batch", np.arange(jax.lax.axis_size("batch"))[::-1])),
        "",
    ),
    "rolled": (lambda h: h + jnp.roll(h, 1, 0), ""),
    "shifted": (lambda h: h + jnp.pad(h, ((1, 0), (0, 0)))[:-1], ""),
    "differences": (lambda h: jnp.diff(h, axis=0, prepend=0), ""),
    "another order": (lambda h: h[np.arange(len(h))[::-1]], ""),
    "the first sample": (lambda h: h - h[:1], ""),
    "the first sample, squeezed": (lambda h: h - h[0], ""),
    "one sample written over": (lambda h: h.at[0].set(0), ""),
    "a segment sum": (lambda h: jax.ops.segment_sum(h, jnp.zeros(len(h), int), len(h)), ""),
    "a convolution over samples": (
        lambda h: jax.lax.conv_general_dilated(h.T[:, None], jnp.ones((1, 1, 3)), (1,), "SAME")[:, 0].T,
        "",
    ),
    "stacked and torn apart": (lambda h: jnp.stack([h, h]).reshape(-1, 2, WIDTH).sum(1), ""),
    "tiled": (lambda h: jnp.tile(h, (2, 1))[1 : len(h) + 1], ""),
    "an associative scan": (lambda h: jax.lax.associative_scan(jnp.add, h, axis=0), ""),
    "a scan with a carry": (lambda h: jax.lax.scan(lambda c, one: (c + one, c), jnp.zeros(WIDTH), h)[1], ""),
    "a reshape that tears samples apart": (lambda h: jnp.cumsum(h.reshape(WIDTH, -1), 1).reshape(h.shape), ""),
    "a loop until all are small": (
        lambda h: jax.lax.while_loop(lambda h: (h**2).sum() > 1, lambda h: h / 2, h),
        "reduce_sum",
    ),
    "a branch on any": (lambda h: jax.lax.cond((h > 0).any(), jnp.tanh, jnp.sin, h), "reduce_or"),
    "a callback": (
        lambda h: jax.pure_callback(lambda h: h - h.mean(0), jax.ShapeDtypeStruct(h.shape, h.dtype), h),
        "pure_callback",
    ),
    "the median": (lambda h: h - jnp.median(h, 0), ""),
    "the median of all": (lambda h: h - jnp.median(h), ""),
}


@pytest.mark.parametrize("name", MIXED)
def test_operations_that_take_samples_together_are_refused(name):
    between, operation = MIXED[name]
    with pytest.raises(ValueError, match=rf"mixes samples, (probably )?in .*{operation}"):
        read(between)
    with pytest.raises(ValueError, match=r"mixes samples|may mix samples"):
        read_in_jit(between)


def each(function):
    return lambda h: jax.vmap(function)(h)


APART = {
    "softmax": lambda h: jax.nn.softmax(h, 1),
    "cumsum": lambda h: jnp.cumsum(h, 1),
    "sort": lambda h: jnp.sort(h, 1),
    "argsort": lambda h: jnp.take_along_axis(h, jnp.argsort(h, 1), 1),
    "top_k": lambda h: jax.lax.top_k(h, WIDTH)[0],
    "median": lambda h: h - jnp.median(h, 1, keepdims=True),
    "reversed": lambda h: h[:, ::-1],
    "rolled": lambda h: jnp.roll(h, 1, 1),
    "fft": lambda h: jnp.fft.irfft(jnp.fft.rfft(h, axis=1), WIDTH, axis=1),
    "layer norm": lambda h: (h - h.mean(1, keepdims=True)) / (0.1 + h.std(1, keepdims=True)),
    "one hot": lambda h: h * jax.nn.one_hot(h.argmax(1), WIDTH),
    "pooling": lambda h: nn.max_pool(h[:, :, None], (2,), (1,), "SAME")[:, :, 0],
    "outer products": lambda h: jnp.einsum("ni,nj,nj->ni", h, h, h),
    "attention": lambda h: jnp.einsum("nij,nj->ni", jax.nn.softmax(h[:, :, None] * h[:, None], 2), h),
    "transposed": lambda h: jnp.tanh(h.T).T,
    "raveled": lambda h: jnp.tanh(h.ravel()).reshape(h.shape),
    "merged with positions": lambda h: jnp.tanh(jnp.stack([h, h], 1).reshape(-1, WIDTH)).reshape(-1, 2, WIDTH)[:, 0],
    "merged with positions outside": lambda h: jnp.tanh(jnp.stack([h, h]).reshape(-1, WIDTH)).reshape(2, -1, WIDTH)[0],
    "stacked": lambda h: jnp.stack([h, -h], 2).max(2),
    "tiled": lambda h: jnp.tile(h, (1, 2))[:, WIDTH:],
    "named": lambda h: checkpoint_name(jnp.tanh(h), "hidden"),
    "split and joined": lambda h: jnp.concatenate(jnp.split(h, [1], 1)[::-1], 1),
    "padded": lambda h: jnp.pad(h, ((0, 0), (1, 1)))[:, 1:-1],
    "looked up": lambda h: h[:, jnp.array([2, 0, 1])],
    "written over": lambda h: h.at[:, 0].set(0).at[:, jnp.array([1, 2])].add(1.0),
    "vmap over moved axes": lambda h: jax.vmap(jnp.sort, in_axes=1, out_axes=1)(h.T).T,
    "vmap": each(jnp.sort),
    "nested vmap": each(jax.vmap(jnp.tanh)),
    "a branch for each sample": each(lambda h: jax.lax.cond(h[0] > 0, jnp.tanh, jnp.sin, h)),
    "a loop for each sample": each(lambda h: jax.lax.while_loop(lambda h: (h**2).sum() > 1, lambda h: h / 2, h)),
    "a linear system for each sample": each(lambda h: jnp.linalg.solve(jnp.eye(WIDTH) * 9 + jnp.outer(h, h), h)),
    "a linear system": lambda h: jnp.linalg.solve(jnp.eye(WIDTH) * 2, h.T).T,
    "eigenvalues": each(lambda h: jnp.linalg.eigvalsh(jnp.outer(h, h))),
    "a loop over features": lambda h: jax.lax.scan(lambda c, one: (c + one, c + one), 0 * h[:, 0], h.T)[1].T,
    "a fixed number of steps": lambda h: jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h), h),
    "the number of samples": lambda h: h / len(h),
    "the number of the sample": under_an_axis_name(lambda h: h * jax.lax.axis_index("batch")),
    "no change in the order": lambda h: h[jnp.arange(len(h))],
    "a callback": lambda h: jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(h.shape, h.dtype), h),
    "jit": jax.jit(lambda h: jnp.sort(h, 1)),
    "checkpoint": jax.checkpoint(lambda h: jnp.sort(h, 1)),
    "a derivative inside": each(jax.grad(lambda h: jnp.sum(jnp.tanh(h) ** 3))),
}


@pytest.mark.parametrize("name", APART)
def test_operations_on_each_sample_alone_are_fine(name):
    assert [layer.kernel for layer in read(APART[name])] == ["first/w", "second/w"]


@pytest.mark.parametrize("name", ["softmax", "sort", "vmap over moved axes", "merged with positions", "attention"])
@pytest.mark.parametrize("samples", [1, 2, 3, 4])
def test_axes_as_long_as_the_samples_are_told_apart(name, samples):
    assert len(read(APART[name], samples)) == 2


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_mixing_is_found_whatever_the_number_of_samples(samples):
    with pytest.raises(ValueError, match="mixes samples"):
        read(lambda h: h - h.mean(0), samples)


def test_square_values_keep_their_samples():
    with pytest.raises(ValueError, match="mixes samples"):
        read(lambda h: h.T, samples=WIDTH)
    with pytest.raises(ValueError, match=r"mixes samples|one array of shape \(samples, outputs\)"):
        _door.layers(lambda w, x: (x @ w).T, jnp.ones((4, N)), inputs())


def test_what_does_not_reach_the_outputs_mixes_nothing(capsys):
    def network(params, x):
        jax.debug.print("the mean is {}", x.mean())
        _ = x - x.mean(0)
        return around(jnp.tanh)(params, x)

    assert len(_door.layers(network, params(), inputs())) == 2
    assert len(_door.layers(jax.jit(network), params(), inputs())) == 2
    del capsys


def test_a_map_over_samples_mixes_nothing():
    network = around(jnp.tanh)
    mapped = lambda params, x: jax.lax.map(jnp.sin, network(params, x))  # noqa: E731
    assert len(_door.layers(mapped, params(), inputs())) == 2
    within = lambda params, x: jax.lax.map(lambda one: network(params, one[None])[0], x)  # noqa: E731
    assert [layer.positions for layer in _door.layers(within, params(), inputs())] == [1, 1]


# Operations that are not known.

doubled = core.Primitive("doubled")
doubled.def_impl(lambda h: 2 * h)
doubled.def_abstract_eval(lambda h: h)
mlir.register_lowering(doubled, mlir.lower_fun(lambda h: 2 * h, multiple_results=False))
batching.defvectorized(doubled)

centred = core.Primitive("centred")
centred.def_impl(lambda h: h - h.mean(0))
centred.def_abstract_eval(lambda h: h)
mlir.register_lowering(centred, mlir.lower_fun(lambda h: h - h.mean(0), multiple_results=False))


def test_an_unknown_operation_is_judged_by_values():
    assert len(read(doubled.bind)) == 2
    with pytest.raises(ValueError, match="mixes samples, probably in 'centred'"):
        read(centred.bind)
    assert len(read(centred.bind, samples=1)) == 2  # one sample has no other to be mixed with


@pytest.mark.parametrize("operation", [doubled, centred])
def test_an_unknown_operation_is_refused_under_jit(operation):
    with pytest.raises(ValueError, match=rf"holds '{operation.name}'.*outside of jit"):
        read_in_jit(operation.bind)


def test_samples_that_an_unknown_operation_moves_are_not_guessed():
    moved = lambda h: jax.pure_callback(lambda h: h[None], jax.ShapeDtypeStruct((1, *h.shape), h.dtype), h)[0]  # noqa: E731
    with pytest.raises(ValueError, match=r"'second/w' can't be scored.*samples can't be followed"):
        read(moved)


# Modules.


class Normalised(nn.Module):
    training: bool

    @nn.compact
    def __call__(self, x):
        hidden = nn.BatchNorm(use_running_average=not self.training)(nn.Dense(WIDTH)(x))
        return nn.Dense(2)(jnp.tanh(hidden))


@pytest.mark.parametrize("jitted", [False, True])
def test_batch_statistics_belong_in_evaluation_mode(jitted):
    variables = Normalised(training=False).init(jax.random.key(0), inputs())

    def of_mode(training):
        module = Normalised(training)

        def network(params, x):
            return module.apply(
                {"params": params, "batch_stats": variables["batch_stats"]}, x, mutable=["batch_stats"]
            )[0]

        return jax.jit(network) if jitted else network

    layers = _door.layers(of_mode(training=False), variables["params"], inputs())
    assert [(layer.kernel, layer.bias) for layer in layers] == [
        ("Dense_0/kernel", "Dense_0/bias"),
        ("Dense_1/kernel", "Dense_1/bias"),
    ]
    assert set(layers.others) == {"BatchNorm_0/scale", "BatchNorm_0/bias"}
    with pytest.raises(ValueError, match=r"mixes samples, in 'reduce_sum'.*evaluation mode"):
        _door.layers(of_mode(training=True), variables["params"], inputs())
    with pytest.raises(ValueError, match=r"mixes samples, in 'reduce_sum'.*evaluation mode"):
        score.elimination_compensation(of_mode(training=True), variables["params"], inputs())


# At the door.


def test_inputs_that_the_network_does_not_take():
    network = around(jnp.tanh)
    with pytest.raises(ValueError, match=r"shape \(5, 3\) and dtype float32.*dot_general") as caught:
        networks.layers(network, params(), inputs()[:, :3])
    assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(ValueError, match="one array of shape"):
        _door.layers(network, params(), jnp.asarray(1.0))
    with pytest.raises(ValueError, match=r"\(samples, outputs\).*returns.*\(2,\)"):
        networks.layers(network, params(), inputs()[0])
    embedded = lambda p, x: p["table"][x] @ p["w"]  # noqa: E731
    with pytest.raises(ValueError, match="dtype float32") as caught:
        networks.layers(embedded, {"table": jnp.ones((3, 4)), "w": jnp.ones((4, 2))}, inputs()[:, 0])
    assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(ValueError, match="params") as caught:
        networks.layers(network, params()["first"], inputs())
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (lambda y: (y, y), r"\(\(5, 2\), \(5, 2\)\)"),
        (lambda y: {"logits": y}, r"\{'logits': \(5, 2\)\}"),
        (lambda y: y[:, 0], r"\(5,\)"),
        (lambda y: y.T, r"\(2, 5\)"),
        (lambda y: y[:3], r"\(3, 2\)"),
        (lambda y: y.sum(), r"\(\)"),
        (lambda y: None, "None"),
    ],
)
def test_outputs_of_another_shape(outputs, words):
    network = lambda params, x: outputs(around(jnp.tanh)(params, x))  # noqa: E731
    with pytest.raises(
        ValueError, match=rf"one array of shape \(samples, outputs\), here \(5, K\), or .* it returns.*{words}"
    ):
        networks.layers(network, params(), inputs())


def test_outputs_that_can_not_be_differentiated():
    network = lambda params, x: around(jnp.tanh)(params, x).argmax(-1, keepdims=True)  # noqa: E731
    with pytest.raises(ValueError, match="logits, not classes"):
        networks.layers(network, params(), inputs())


def test_shapes_are_enough():
    shapes = jax.eval_shape(lambda: (params(), inputs()))
    layers = networks.layers(around(jnp.tanh), *shapes)
    assert layers == networks.layers(around(jnp.tanh), params(), inputs())
    assert layers == networks.layers(jax.jit(around(jnp.tanh)), params(), inputs())


@pytest.mark.parametrize("name", examples.DENSE_EXAMPLES)
def test_the_examples_do_not_mix(name):
    example = examples.DENSE_EXAMPLES[name]()
    assert all(not layer.reason for layer in networks.layers(*example))
    assert _door.layers(*example) == networks.layers(*example)


def test_dropout_that_is_left_on_is_refused():
    module = nn.Sequential([nn.Dense(8), nn.Dropout(0.5, deterministic=False), nn.Dense(3)])
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)))
    params = module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, inputs)["params"]

    def network(params, x):
        return module.apply({"params": params}, x, rngs={"dropout": jax.random.key(2)})

    with pytest.raises(ValueError, match=r"mixes samples, probably in 'random_bits'.*Dropout belongs in evaluation"):
        score.elimination_compensation(network, params, inputs)
    of_features = jax.random.normal(jax.random.key(3), (3, 4))  # numbers drawn once for all samples are fine
    fixed = lambda params, x: nn.Dense(8).apply({"params": params["layers_0"]}, x)[:, :3] @ of_features  # noqa: E731
    score.elimination_compensation(fixed, params, inputs)
