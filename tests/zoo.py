"""Networks of every kind of layer, each with what its kernels' biases are, written down by hand."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ecjax import networks
from tests.examples import Example

N = 5


class Zoo(NamedTuple):
    """A network, the biases of its kernels by path, and how many leading axes of a kernel tell members apart."""

    example: Example
    biases: dict[str, str | None]
    stacked: tuple[str, ...] = ()  # kernels whose first axis does
    ignored: tuple[str, ...] = ()  # biases that the outputs ignore


def array(*shape, seed=0):
    generator = np.random.default_rng([seed, *shape])
    return jnp.asarray(generator.normal(size=shape) + 0.3)


class Sequence(nn.Module):
    pooled: bool = True

    @nn.compact
    def __call__(self, x):
        outputs = nn.Dense(3, name="head")(jnp.tanh(nn.Dense(6, name="first")(x)))
        return outputs.mean(1) if self.pooled else outputs


class Mixer(nn.Module):
    """Its token mixing is transposed, and its bias is one that the layer norms after it take away."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="embed")(x)
        y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
        y = nn.Dense(x.shape[1], name="tokens_out")(nn.gelu(nn.Dense(5, name="tokens_in")(y)))
        x = x + jnp.swapaxes(y, 1, 2)
        x = x + nn.Dense(6, name="out")(nn.gelu(nn.Dense(7, name="in")(nn.LayerNorm()(x))))
        return nn.Dense(3, name="head")(nn.LayerNorm()(x).mean(1))


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="plain")(x))
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, feature_group_count=4, name="depthwise")(x))
        x = nn.Conv(5, (1, 1), use_bias=False, name="pointwise")(x)
        x = nn.relu(nn.ConvTranspose(3, (2, 2), strides=(2, 2), name="transposed")(x))
        x = nn.relu(nn.Conv(3, (2, 2), kernel_dilation=2, padding="VALID", name="dilated")(x))
        return nn.Dense(3, name="head")(jnp.tanh(nn.Dense(7, name="dense")(x.reshape(x.shape[0], -1))))


class Convolutions1D(nn.Module):
    axes: int = 1

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(3, (2,) * self.axes, name="conv")(x))
        return nn.Dense(2, name="head")(x.mean(tuple(range(1, x.ndim - 1))))


class Attention(nn.Module):
    causal: bool = False
    sharp: float = 1.0

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        x = x + nn.MultiHeadDotProductAttention(2, name="mix")(self.sharp * nn.LayerNorm()(x), mask=mask)
        return nn.Dense(3, name="head")(nn.LayerNorm()(x).mean(1))


class Characters(nn.Module):
    """A language model whose embedding is its head."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 8, name="embed")
        x = embed(tokens) + self.param("places", nn.initializers.normal(0.5), (tokens.shape[1], 8))
        mask = nn.make_causal_mask(tokens)
        x = x + nn.MultiHeadDotProductAttention(2, name="mix")(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dense(8, name="out")(nn.gelu(nn.Dense(12, name="in")(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(5, name="shared")
        return nn.Dense(2, name="head")(jnp.tanh(shared(jnp.tanh(shared(x)))))


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.scan(
            lambda dense, h, _: (jnp.tanh(dense(h)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return nn.Dense(2, name="head")(block(nn.Dense(4, name="dense"), x, None)[0])


class Block(nn.Module):
    heads: int = 2

    @nn.compact
    def __call__(self, x, _):
        return x + nn.MultiHeadDotProductAttention(self.heads, name="mix")(nn.LayerNorm()(x)), None


class Blocks(nn.Module):
    """Scanned and rematerialised."""

    heads: int = 2
    length: int = 3

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=self.length)
        x, _ = blocks(self.heads, name="blocks")(x, None)
        return nn.Dense(2, name="head")(nn.LayerNorm()(x).mean(1))


class Recurrent(nn.Module):
    cell: Callable

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.RNN(self.cell(3, param_dtype=x.dtype), name="cell")(x)[:, -1])


def _linen(module, x, seed=0):
    params = module.init(jax.random.key(seed), x)["params"]

    def changed(path, leaf):
        name = jax.tree_util.keystr(path)
        values = 0.3 * np.random.default_rng(len(name)).normal(size=leaf.shape) if "bias" in name else leaf
        return jnp.asarray(values, jnp.zeros(()).dtype)

    return Example(networks.from_linen(module), jax.tree_util.tree_map_with_path(changed, params), x)


def _of_names(example, **changes):
    """The bias of ".../kernel" is ".../bias", if there is one."""
    paths = networks.by_path(example.params)
    kernels = [path for path in paths if path.endswith(("kernel", "embedding"))]
    biases = {path: path.removesuffix("kernel") + "bias" for path in kernels}
    return {path: bias if bias in paths else None for path, bias in biases.items()} | changes


def linen(module, x, *, stacked=(), ignored=(), **biases):
    example = _linen(module, x)
    return Zoo(example, _of_names(example, **biases), stacked, ignored)


def by_hand(network, params, x, biases, stacked=(), ignored=()):
    return Zoo(Example(network, params, x), biases, stacked, ignored)


def experts():
    params = {"w": array(3, 4, 5) / 2, "b": array(3, 5), "u": array(5, 2), "g": array(4, 3)}

    def network(params, x):
        each = jnp.tanh(jnp.einsum("nd,edf->nef", x, params["w"]) + params["b"])
        return jnp.einsum("ne,nef->nf", jax.nn.softmax(x @ params["g"]), each) @ params["u"]

    return by_hand(network, params, array(N, 4), {"w": "b", "u": None, "g": None}, ("w",))


def batched_experts(twice=False):
    """Each expert has rows of its own: one of each sample, or two."""
    params = {"w": array(3, 4, 5) / 2, "b": array(3, 1, 5), "u": array(5, 2), "c": array(2)}

    def network(params, x):
        rows = jnp.stack([jnp.roll(x, shift, -1) for shift in range(3)], 1)
        rows = jnp.stack([rows, 2 * rows], 2) if twice else rows[:, :, None]
        each = jnp.einsum("netd,edf->entf", rows, params["w"]) + params["b"][:, None]
        return jnp.tanh(each).sum((0, 2)) @ params["u"] + params["c"]

    return by_hand(network, params, array(N, 4), {"w": "b", "u": "c"}, ("w",))


def places_as_classes():
    """Logits of places: softmax ignores the bias of the last layer, though the outputs do not."""
    params = {"w": array(3, 4) / 2, "b": array(4), "v": array(4, 1), "c": array(1)}

    def network(params, x):
        return (jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] + params["c"])[..., 0]

    return by_hand(network, params, array(N, 5, 3), {"w": "b", "v": "c"}, ignored=("c",))


def merged_positions(turned=False):
    """Samples and positions lie along one axis, in either order, and a scan goes over the layers in reverse."""
    params = {"w": array(3, 4, 4) / 2, "b": array(3, 4), "u": array(4, 2)}

    def network(params, x):
        x = jnp.swapaxes(x, 0, 1) if turned else x
        turn = lambda h, layer: (jnp.tanh(h @ layer[0] + layer[1]), None)  # noqa: E731
        h, _ = jax.lax.scan(turn, x.reshape(-1, 4), (params["w"], params["b"]), reverse=True)
        h = h.reshape(x.shape)
        return (jnp.swapaxes(h, 0, 1) if turned else h).mean(1) @ params["u"]

    return by_hand(network, params, array(N, 3, 4), {"w": "b", "u": None}, ("w",))


def attention_by_hand(rotary=False):
    params = {f"{name}": array(4, 2, 4, seed=seed) / 2 for seed, name in enumerate("qkv")}
    params |= {f"{name}b": array(2, 4, seed=seed) for seed, name in enumerate("qkv")}
    params |= {"o": array(2, 4, 3) / 2, "ob": array(3)}

    def turned(h):
        angles = jnp.arange(h.shape[1])[:, None, None] * jnp.array([1.0, 0.3])
        first, second = jnp.split(h, 2, -1)
        return jnp.concatenate(
            [first * jnp.cos(angles) - second * jnp.sin(angles), first * jnp.sin(angles) + second * jnp.cos(angles)], -1
        )

    def network(params, x):
        q, k, v = (jnp.einsum("ntd,dhf->nthf", x, params[name]) + params[f"{name}b"] for name in "qkv")
        q, k = (turned(q), turned(k)) if rotary else (q, k)
        shares = jax.nn.softmax(jnp.einsum("nthf,nshf->nhts", q, k))
        mixed = jnp.einsum("nhts,nshf->nthf", shares, v)
        return (jnp.einsum("nthf,hfo->nto", mixed, params["o"]) + params["ob"])[:, 0]

    biases = {"q": "qb", "k": "kb", "v": "vb", "o": "ob"}
    return by_hand(network, params, array(N, 5, 4), biases, ignored=() if rotary else ("kb",))


ZOO = {
    "positions": lambda: linen(Sequence(), array(N, 4, 5)),
    "outputs at positions": lambda: linen(Sequence(False), array(N, 4, 5)),
    "mixer": lambda: linen(Mixer(), array(N, 4, 5), ignored=("tokens_out/bias",)),
    "convolutions": lambda: linen(Convolutions(), array(N, 6, 6, 2)),
    "convolutions in one axis": lambda: linen(Convolutions1D(), array(N, 6, 2)),
    "convolutions in three axes": lambda: linen(Convolutions1D(3), array(N, 3, 3, 3, 2)),
    "attention": lambda: linen(Attention(), array(N, 4, 6), ignored=("mix/key/bias",)),
    "causal attention": lambda: linen(Attention(True), array(N, 4, 6), ignored=("mix/key/bias",)),
    "attention by hand": attention_by_hand,
    "rotary attention": lambda: attention_by_hand(rotary=True),
    "tied embedding": lambda: linen(
        Characters(),
        jnp.asarray(np.random.default_rng(0).integers(0, 7, (N, 6))),
        ignored=("mix/key/bias",),
    ),
    "used twice": lambda: linen(Twice(), array(N, 5)),
    "a scanned stack": lambda: linen(Stack(), array(N, 4), stacked=("dense/kernel",)),
    "scanned attention": lambda: linen(
        Blocks(),
        array(N, 4, 6),
        stacked=tuple(f"blocks/mix/{name}/kernel" for name in ("query", "key", "value", "out")),
        ignored=("blocks/mix/key/bias",),
    ),
    "simple recurrence": lambda: linen(
        Recurrent(nn.SimpleCell), array(N, 4, 3), **{"SimpleCell_0/h/kernel": "SimpleCell_0/i/bias"}
    ),
    "gated recurrence": lambda: linen(
        Recurrent(nn.LSTMCell),
        array(N, 4, 3),
        **{f"LSTMCell_0/i{gate}/kernel": f"LSTMCell_0/h{gate}/bias" for gate in "ifgo"},
    ),
    "experts": experts,
    "experts with rows of their own": batched_experts,
    "experts with two rows each": lambda: batched_experts(twice=True),
    "places as classes": places_as_classes,
    "samples and positions merged": merged_positions,
    "positions and samples merged": lambda: merged_positions(turned=True),
}
