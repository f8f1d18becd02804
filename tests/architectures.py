"""Networks of many architectures, each with how many units its free groups have: written down by hand."""

from collections.abc import Callable
from typing import Any, NamedTuple

import einops
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ecjax import networks
from tests import zoo
from tests.examples import Example
from tests.zoo import N, array


class Architecture(NamedTuple):
    """A network, the lengths of its free groups in any order, and parts of the reasons of its pinned ones."""

    example: Example
    free: tuple[int, ...]
    reasons: tuple[str, ...] = ()


def _filled(params, seed=0):
    """Random numbers in every leaf that is one or zero when it is made."""
    generator = np.random.default_rng(seed)

    def changed(leaf):
        if not eqx.is_inexact_array(leaf) or (leaf.ndim > 1 and float(jnp.abs(leaf).min()) > 0):
            return leaf
        return jnp.asarray(leaf + 0.3 * generator.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(changed, params)


def linen(module, x, free, reasons=(), **call):
    variables = module.init(jax.random.key(0), x, **call)
    others = _filled({name: values for name, values in variables.items() if name != "params"})
    others = jax.tree.map(lambda leaf: jnp.abs(leaf).astype(x.dtype), others)
    network = networks.from_linen(module, variables=others, **call)
    return Architecture(Example(network, _filled(variables["params"]), x), free, reasons)


def plain(network, params, x, free, reasons=()):
    return Architecture(Example(network, params, x), free, reasons)


def of_zoo(name, free, reasons=()):
    return Architecture(zoo.ZOO[name]().example, free, reasons)


def equinox(module, x, free, reasons=()):
    return plain(lambda module, x: jax.vmap(module)(x), _filled(module), x, free, reasons)


def mlp():
    return linen(
        networks.MLP((7, 6, 3)), array(N, 4), (7, 6), ("is an axis of the inputs", "is an axis of the outputs")
    )


class Residual(nn.Module):
    """Strided convolutions with batch statistics, and a shortcut that is a convolution."""

    @nn.compact
    def __call__(self, x, train):
        norm = lambda x, name: nn.BatchNorm(use_running_average=not train, name=name)(x)  # noqa: E731
        x = nn.relu(norm(nn.Conv(6, (3, 3), name="stem")(x), "stem_norm"))
        for number, (width, inner) in enumerate([(6, 5), (8, 7)]):
            y = nn.relu(norm(nn.Conv(inner, (3, 3), number + 1, name=f"in{number}")(x), f"norm{number}"))
            y = norm(nn.Conv(width, (3, 3), name=f"out{number}")(y), f"last{number}")
            shortcut = nn.Conv(width, (1, 1), 2, name=f"short{number}")(x) if number else x
            x = nn.relu(shortcut + y)
        return nn.Dense(3, name="head")(nn.avg_pool(x, (2, 2), (2, 2)).mean((1, 2)))


class Grouped(nnx.Module):
    """Grouped and depthwise convolutions, pooling, and a flatten into a dense layer."""

    def __init__(self, rngs):
        self.plain = nnx.Conv(2, 8, (3, 3), rngs=rngs)
        self.grouped = nnx.Conv(8, 12, (3, 3), feature_group_count=4, strides=2, rngs=rngs)
        self.depthwise = nnx.Conv(12, 24, (3, 3), feature_group_count=12, kernel_dilation=2, rngs=rngs)
        self.norm = nnx.BatchNorm(24, rngs=rngs)
        self.dense = nnx.Linear(24, 5, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.plain(x)), (2, 2), (1, 1), "SAME")
        x = self.norm(nnx.gelu(self.depthwise(nnx.silu(self.grouped(x)))))
        x = nnx.avg_pool(x, (3, 3))
        return self.head(nnx.relu(self.dense(x.reshape(x.shape[0], -1))))


def grouped():
    module = Grouped(nnx.Rngs(0))
    module.eval()
    network, params = networks.from_nnx(module)
    # 8 channels are 4 groups of 2; 12 are 4 · 3; each makes 2 more: 4 · 3 · 2
    return plain(network, _filled(params), array(N, 6, 6, 2), (4, 2, 3, 2, 5))


class Gated(nnx.Module):
    """A transformer block with root-mean-square norms and gated units, as in Llama; heads share keys and values."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 10, rngs=rngs)
        self.first, self.second, self.last = (nnx.RMSNorm(10, rngs=rngs) for _ in range(3))
        self.query = nnx.LinearGeneral(10, (2, 3, 4), use_bias=False, rngs=rngs)
        self.key = nnx.LinearGeneral(10, (2, 4), use_bias=False, rngs=rngs)
        self.value = nnx.LinearGeneral(10, (2, 5), use_bias=False, rngs=rngs)
        self.out = nnx.LinearGeneral((2, 3, 5), 10, axis=(-3, -2, -1), use_bias=False, rngs=rngs)
        self.gate, self.up = (nnx.Linear(10, 7, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(7, 10, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(10, 11, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        h = self.first(x)
        scores = jnp.einsum("ntkgf,nskf->nkgts", self.query(h), self.key(h)) / 2
        scores = jnp.where(jnp.tri(tokens.shape[1], dtype=bool), scores, -1e9)
        x = x + self.out(jnp.einsum("nkgts,nskf->ntkgf", jax.nn.softmax(scores), self.value(h)))
        h = self.second(x)
        return self.head(self.last(x + self.down(nnx.silu(self.gate(h)) * self.up(h))))


def tokens(count, length=6):
    return jnp.asarray(np.random.default_rng(0).integers(0, count, (N, length)))


def gated():
    network, params = networks.from_nnx(Gated(nnx.Rngs(0)))
    return plain(network, _filled(params), tokens(11), (10, 2, 3, 4, 5, 7), ("is an axis of the outputs",))


class PostNorm(nn.Module):
    """Its norms compute the variance about the mean, which a missing channel would change."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="embed")(x)
        h = nn.Dense(6, name="out")(nn.gelu(nn.Dense(7, name="in")(x)))
        return nn.Dense(3, name="head")(nn.LayerNorm(use_fast_variance=False)(x + h))


def vision_transformer():
    """Patches by reshape, a class token that is concatenated, heads by einops from one fused kernel."""
    wide, heads, each = 8, 2, 3
    params = {
        "patch": array(2 * 2 * 2, wide, seed=1),
        "class": array(wide, seed=2),
        "places": array(5, wide, seed=3),
        "fused": array(wide, 3 * heads * each, seed=4) / 3,
        "fused_bias": array(3 * heads * each, seed=5),
        "out": array(heads * each, wide, seed=6) / 3,
        "in": array(wide, 7, seed=7) / 3,
        "down": array(7, wide, seed=8) / 3,
        "scale": array(2, wide, seed=9),
        "head": array(wide, 3, seed=10),
    }

    def norm(x, scale):
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale

    def network(params, x):
        patches = einops.rearrange(x, "n (h a) (w b) c -> n (h w) (a b c)", a=2, b=2) @ params["patch"]
        first = jnp.broadcast_to(params["class"], (x.shape[0], 1, wide))
        x = jnp.concatenate([first, patches], 1) + params["places"]
        fused = norm(x, params["scale"][0]) @ params["fused"] + params["fused_bias"]
        q, k, v = einops.rearrange(fused, "n t (three h f) -> three n h t f", three=3, h=heads)
        mixed = jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v
        x = x + einops.rearrange(mixed, "n h t f -> n t (h f)") @ params["out"]
        x = x + jax.nn.gelu(norm(x, params["scale"][1]) @ params["in"]) @ params["down"]
        return x[:, 0] @ params["head"]

    return plain(network, params, array(N, 4, 4, 2), (8, 2, 3, 7))


def split_heads():
    """Queries, keys and values by a split of one product: keys and queries lose other features than values."""
    params = {"fused": array(5, 2 * 4 + 2 * 4 + 2 * 3) / 2, "out": array(6, 5), "head": array(5, 2)}

    def network(params, x):
        q, k, v = jnp.split(x @ params["fused"], [8, 16], -1)
        q, k, v = (h.reshape(*h.shape[:2], 2, -1) for h in (q, k, v))
        mixed = jnp.einsum("nhts,nshf->nthf", jax.nn.softmax(jnp.einsum("nthf,nshf->nhts", q, k)), v)
        return (x + mixed.reshape(*x.shape[:2], 6) @ params["out"]).mean(1) @ params["head"]

    return plain(network, params, array(N, 3, 5), (2, 4, 3))


class Dense(nn.Module):
    """Every layer reads all before it, concatenated."""

    @nn.compact
    def __call__(self, x):
        for number in range(3):
            x = jnp.concatenate([x, nn.tanh(nn.Dense(4 + number, name=f"layer{number}")(x))], -1)
        return nn.Dense(2, name="head")(x)


class UNet(eqx.Module):
    """Down, up, and a skip that is concatenated; channels first."""

    first: eqx.nn.Conv2d
    down: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose2d
    last: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.first = eqx.nn.Conv2d(1, 4, 3, padding=1, key=keys[0])
        self.down = eqx.nn.Conv2d(4, 6, 2, stride=2, key=keys[1])
        self.up = eqx.nn.ConvTranspose2d(6, 5, 2, stride=2, key=keys[2])
        self.last = eqx.nn.Conv2d(9, 1, 3, padding=1, key=keys[3])
        self.norm = eqx.nn.GroupNorm(2, 6)

    def __call__(self, x):
        first = jax.nn.relu(self.first(x[None]))
        deep = jax.nn.silu(self.norm(self.down(first)))
        return self.last(jnp.concatenate([first, self.up(deep)]))[0]


class Excited(eqx.Module):
    """Squeeze and excitation: channels that are scaled by what their means say."""

    conv: eqx.nn.Conv2d
    squeeze: eqx.nn.Linear
    excite: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.conv = eqx.nn.Conv2d(2, 6, 3, padding=1, key=keys[0])
        self.squeeze = eqx.nn.Linear(6, 4, key=keys[1])
        self.excite = eqx.nn.Linear(4, 6, key=keys[2])
        self.head = eqx.nn.Linear(6, 3, key=keys[3])

    def __call__(self, x):
        x = jax.nn.relu(self.conv(x))
        gate = jax.nn.sigmoid(self.excite(jax.nn.relu(self.squeeze(x.mean((1, 2))))))
        return self.head((x * gate[:, None, None]).mean((1, 2)))


class Attention(eqx.Module):
    """Equinox's own attention, whose heads are a reshape of a dense layer."""

    mix: eqx.nn.MultiheadAttention
    head: eqx.nn.Linear

    def __init__(self, key):
        self.mix = eqx.nn.MultiheadAttention(2, 6, qk_size=4, vo_size=3, key=key)
        self.head = eqx.nn.Linear(6, 3, key=key)

    def __call__(self, x):
        return jax.vmap(self.head)(x + self.mix(x, x, x))


def scanned():
    """A stack of blocks over a residual stream, scanned and rematerialised."""
    params = {
        "embed": array(4, 6),
        "in": array(3, 6, 7) / 3,
        "bias": array(3, 7),
        "down": array(3, 7, 6) / 3,
        "scale": array(3, 6),
        "head": array(6, 2),
    }

    @jax.checkpoint
    def block(h, layer):
        normed = h * jax.lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-6) * layer["scale"]
        return h + jax.nn.silu(normed @ layer["in"] + layer["bias"]) @ layer["down"], None

    def network(params, x):
        layers = {name: params[name] for name in ("in", "bias", "down", "scale")}
        return jax.lax.scan(block, x @ params["embed"], layers)[0] @ params["head"]

    return plain(network, params, array(N, 4), (6, 7), ())


def low_rank():
    """Low-rank adapters beside a kernel, and gated linear units."""
    params = {"w": array(5, 8), "a": array(5, 3), "b": array(3, 8), "v": array(4, 2)}

    def network(params, x):
        return nn.glu(x @ (params["w"] + params["a"] @ params["b"])) @ params["v"]

    return plain(jax.jit(network), params, array(N, 5), (4, 3))


def autoencoder():
    """Tied weights: the decoder is the encoder, transposed."""
    params = {"w": array(5, 7), "b": array(7), "c": array(7, 4), "d": array(5)}

    def network(params, x):
        hidden = jnp.tanh(x @ params["w"] + params["b"])
        code = jax.nn.elu(hidden @ params["c"])
        return jax.nn.elu(code @ params["c"].T) @ params["w"].T + params["d"]

    return plain(network, params, array(N, 5), (7, 4))


def spectral():
    """A Fourier layer: products of complex numbers, mode by mode."""
    params = {"lift": array(1, 4), "real": array(3, 4, 4), "imaginary": array(3, 4, 4), "skip": array(4, 4)}
    params |= {"drop": array(4, 5), "head": array(5, 1)}

    def network(params, x):
        h = x[..., None] * params["lift"]
        for _ in range(2):
            modes = jnp.fft.rfft(h, axis=1)[:, :3]
            modes = jnp.einsum("nkc,kcd->nkd", modes, jax.lax.complex(params["real"], params["imaginary"]))
            h = jax.nn.gelu(jnp.fft.irfft(modes, h.shape[1], axis=1) + h @ params["skip"])
        return (jnp.tanh(h @ params["drop"]) @ params["head"])[..., 0]

    return plain(network, params, array(N, 8), (4, 5))


def recurrent():
    """LSTM cells whose gates are one concatenated kernel, over a reversed sequence."""

    class Cells(nn.Module):
        @nn.compact
        def __call__(self, x):
            cells = nn.RNN(nn.OptimizedLSTMCell(5, param_dtype=x.dtype), reverse=True, keep_order=True, name="cells")
            return nn.Dense(2, name="head")(cells(x)[:, 0])

    return linen(Cells(), array(N, 4, 3), (5,))


def looped():
    """A loop of unknown length, and a branch."""
    params = {"in": array(4, 6), "again": array(6, 6) / 4, "head": array(6, 3), "other": array(6, 3)}

    def network(params, x):
        def turn(carry):
            return carry[0] + 1, jnp.tanh(carry[1] @ params["again"])

        h = jax.lax.while_loop(lambda carry: carry[0] < 3, turn, (0, x @ params["in"]))[1]
        return jax.lax.cond(x.shape[0] > 0, lambda h: h @ params["head"], lambda h: h @ params["other"], h)

    return plain(network, params, array(N, 4), (6,))


@jax.custom_vjp
def _clipped(x):
    return jnp.clip(x, -1, 1)


_clipped.defvjp(lambda x: (_clipped(x), None), lambda _, cotangent: (cotangent,))


@jax.custom_jvp
def _stepped(x):
    return jnp.where(x > 0, x, 0.0)


_stepped.defjvp(lambda primals, tangents: (_stepped(*primals), tangents[0] * jax.nn.sigmoid(primals[0])))


def straight_through():
    """Activations with derivatives of their own."""
    params = {"a": array(4, 6), "b": array(6, 5), "c": array(5, 2)}
    network = lambda params, x: _stepped(_clipped(x @ params["a"]) @ params["b"]) @ params["c"]  # noqa: E731
    return plain(network, params, array(N, 4), (6, 5))


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "mlp": mlp,
    "residual network": lambda: linen(Residual(), array(N, 6, 6, 2), (6, 5, 8, 7), (), train=False),
    "grouped convolutions": grouped,
    "gated transformer": gated,
    "norm about the mean": lambda: linen(PostNorm(), array(N, 4, 5), (7,), ("is summed over",)),
    "vision transformer": vision_transformer,
    "split heads": split_heads,
    "dense connections": lambda: linen(Dense(), array(N, 3), (4, 5, 6)),
    "u-net": lambda: equinox(UNet(jax.random.key(0)), array(N, 6, 6), (4, 2, 5), ("is summed over",)),
    "squeeze and excitation": lambda: equinox(Excited(jax.random.key(0)), array(N, 2, 5, 5), (6, 4)),
    "equinox attention": lambda: equinox(Attention(jax.random.key(0)), array(N, 4, 6), (2, 4, 3)),
    "scanned blocks": scanned,
    "low rank": low_rank,
    "autoencoder": autoencoder,
    "spectral": spectral,
    "recurrent": recurrent,
    "looped": looped,
    "straight through": straight_through,
    "mixer": lambda: of_zoo("mixer", (5, 7), ("is summed over",)),
    "convolutions": lambda: of_zoo("convolutions", (4, 5, 3, 3, 7)),
    "convolutions in three axes": lambda: of_zoo("convolutions in three axes", (3,)),
    "causal attention": lambda: of_zoo("causal attention", (2, 3, 3), ("is an axis of the inputs",)),
    "rotary attention": lambda: of_zoo("rotary attention", (2, 2, 4)),
    "tied embedding": lambda: of_zoo("tied embedding", (8, 2, 4, 4, 12), ("is looked up",)),
    "scanned attention": lambda: of_zoo("scanned attention", (2, 3, 3)),
    "gated recurrence": lambda: of_zoo("gated recurrence", (3,)),
    "experts": lambda: of_zoo("experts", (5,), ("as softmax does",)),
}
