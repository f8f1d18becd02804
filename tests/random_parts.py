"""Pieces of random networks, each with what is true of it: its kernels, their biases, and what has to be refused."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Kernel(NamedTuple):
    """What is true of a kernel.

    Attributes:
        bias: the path of the leaf that is added to its product; None without one.
        beside: of the kernel's shape: which entry of the flattened bias stands beside each weight.
    """

    bias: str | None
    beside: np.ndarray


class Part(NamedTuple):
    """A piece of a network, from units to units.

    Attributes:
        leaves: by role.
        apply: function of the leaves, the units ``(samples, width)`` and the network's inputs.
        kernels: by role; the bias is a role too.
        refused: the roles of the leaves for which the network has to be refused.
        what: it is, in words.
    """

    leaves: dict[str, np.ndarray]
    apply: Callable[[dict[str, Array], Array, Array], Array]
    kernels: dict[str, Kernel] = {}  # noqa: RUF012
    refused: frozenset[str] = frozenset()
    what: str = ""


def columns(outputs: int, inputs: int) -> np.ndarray:
    """For a kernel ``(in, out)``: the neuron of each entry."""
    return np.broadcast_to(np.arange(outputs), (inputs, outputs))


def normal(random, *shape: int) -> np.ndarray:
    """Small numbers: where units saturate, all derivatives are rounding errors."""
    return 0.5 * random.normal(size=shape)


def choice(random, options: Sequence) -> Any:
    return options[int(random.integers(len(options)))]


WAYS = {
    "x @ W": lambda w, h: h @ w,
    "(Wᵀ @ xᵀ)ᵀ": lambda w, h: (w.T @ h.T).T,
    "einsum": lambda w, h: jnp.einsum("ni,io->no", h, w),
    "einsum on the left": lambda w, h: jnp.einsum("io,ni->on", w, h).T,
    "vmap of x @ W": lambda w, h: jax.vmap(lambda one: one @ w)(h),
    "vmap of Wᵀ @ x": lambda w, h: jax.vmap(lambda w, one: w.T @ one, (None, 0))(w, h),
    "vmap over columns": lambda w, h: jax.vmap(lambda one: jnp.dot(w.T, one), in_axes=1, out_axes=1)(h.T).T,
    "tensordot": lambda w, h: jnp.tensordot(h, w, 1),
    "a kernel for each sample": lambda w, h: (h[:, None] @ jnp.broadcast_to(w, (len(h), *w.shape)))[:, 0],
}

# How a kernel (in, out) is stored, and how the network makes it a matrix again.
STORED = {
    "(in, out)": (lambda w: w, lambda stored, shape: stored),
    "(out, in)": (lambda w: w.T, lambda stored, shape: stored.T),
    "flat": (lambda w: w.reshape(-1), lambda stored, shape: stored.reshape(shape)),
    "flat (out, in)": (lambda w: w.T.reshape(-1), lambda stored, shape: stored.reshape(shape[::-1]).T),
    "(1, out, in)": (lambda w: w.T[None], lambda stored, shape: stored.squeeze(0).T),
}

_BIASES = ("none", "(out,)", "(out,)", "(1, out)", "()")


def _bias(random, outputs: int) -> tuple[dict[str, np.ndarray], str]:
    kind = choice(random, _BIASES)
    shape = {"none": None, "(1, out)": (1, outputs), "()": () if outputs == 1 else (outputs,)}.get(kind, (outputs,))
    return ({}, "no bias") if shape is None else ({"bias": normal(random, *shape)}, f"bias {shape}")


def dense(random, inputs: int, outputs: int, _) -> Part:
    way, stored = choice(random, list(WAYS)), choice(random, list(STORED))
    store, as_matrix = STORED[stored]
    kernel, (bias, how) = normal(random, inputs, outputs), _bias(random, outputs)
    bias_first = bool(random.random() < 0.3)

    def apply(leaves, h, _):
        product = WAYS[way](as_matrix(leaves["kernel"], (inputs, outputs)), h)
        if not bias:
            return product
        return leaves["bias"] + product if bias_first else product + leaves["bias"]

    truth = Kernel("bias" if bias else None, store(columns(outputs, inputs)))
    what = f"dense {inputs} to {outputs}, {stored}, {way}, {how}"
    return Part({"kernel": store(kernel), **bias}, apply, {"kernel": truth}, what=what)


def _heads(random, inputs: int, outputs: int, _) -> Part:
    """Several output axes, and back to one."""
    heads = choice(random, [number for number in range(1, outputs + 1) if outputs % number == 0])
    shape = (inputs, heads, outputs // heads)
    neurons = np.broadcast_to(np.arange(outputs).reshape(shape[1:]), shape)
    biased, flat = bool(random.random() < 0.7), bool(random.random() < 0.3)
    leaves = {"kernel": normal(random, *shape)}
    if biased:
        leaves["bias"] = normal(random, *((outputs,) if flat else shape[1:]))

    def apply(leaves, h, _):
        product = jnp.einsum("nd,dhf->nhf", h, leaves["kernel"])
        if biased and not flat:
            product = product + leaves["bias"]
        joined = product.reshape(len(h), outputs)
        return joined + leaves["bias"] if biased and flat else joined

    truth = Kernel("bias" if biased else None, neurons)
    return Part(leaves, apply, {"kernel": truth}, what=f"{heads} heads of {shape[2]}, {'a' if biased else 'no'} bias")


def _merge(random, inputs: int, outputs: int, _) -> Part:
    """Several input axes."""
    heads = choice(random, [number for number in range(1, inputs + 1) if inputs % number == 0])
    shape = (heads, inputs // heads, outputs)
    neurons = np.broadcast_to(np.arange(outputs), shape)
    (bias, how), transposed = _bias(random, outputs), bool(random.random() < 0.5)

    def apply(leaves, h, _):
        h = h.reshape(len(h), *shape[:2])
        if transposed:
            product = jnp.einsum("nfh,hfd->nd", h.transpose(0, 2, 1), leaves["kernel"])
        else:
            product = jnp.einsum("nhf,hfd->nd", h, leaves["kernel"])
        return product + leaves["bias"] if bias else product

    truth = Kernel("bias" if bias else None, neurons)
    leaves = {"kernel": normal(random, *shape), **bias}
    return Part(leaves, apply, {"kernel": truth}, what=f"merges {heads} heads, {how}")


def _two_products(random, inputs: int, outputs: int, of_network: int) -> Part:
    leaves = {"first": normal(random, inputs, outputs), "second": normal(random, outputs, of_network)}
    (bias, how), where = _bias(random, outputs), choice(random, ("before", "between", "after", "with the second"))

    def apply(leaves, h, x):
        first, second = h @ leaves["first"], x @ leaves["second"].T
        if not bias:
            return first + second
        if where == "before":
            return leaves["bias"] + (first + second)
        if where == "between":
            return (first + leaves["bias"]) + second
        return (first + second) + leaves["bias"] if where == "after" else first + (second + leaves["bias"])

    role = "bias" if bias else None
    truth = {"first": Kernel(role, columns(outputs, inputs)), "second": Kernel(role, columns(outputs, of_network).T)}
    return Part(leaves | bias, apply, truth, what=f"h @ W + x @ Uᵀ, {how} {where}")


def _equinox_linear(random, inputs: int, outputs: int, _) -> Part:
    """A module of Equinox, called as it is; its leaves are put back into it."""
    biased = bool(random.random() < 0.7)
    made = eqx.nn.Linear(inputs, outputs, use_bias=biased, key=jax.random.key(0))
    leaves = {"kernel": normal(random, outputs, inputs)} | ({"bias": normal(random, outputs)} if biased else {})

    def apply(leaves, h, _):
        linear = eqx.tree_at(lambda linear: linear.weight, made, leaves["kernel"])
        linear = eqx.tree_at(lambda linear: linear.bias, linear, leaves["bias"]) if biased else linear
        return jax.vmap(linear)(h)

    truth = Kernel("bias" if biased else None, columns(outputs, inputs).T)
    return Part(leaves, apply, {"kernel": truth}, what=f"eqx.nn.Linear, {'a' if biased else 'no'} bias")


def _low_rank(random, inputs: int, outputs: int, _) -> Part:
    leaves = {
        "first": normal(random, inputs, 2),
        "second": normal(random, 2, outputs),
        "bias": normal(random, outputs),
    }
    apply = lambda leaves, h, x: h @ (leaves["first"] @ leaves["second"]) + leaves["bias"]  # noqa: E731
    return Part(leaves, apply, what="low rank (no kernel)")


def _scaled(random, inputs: int, outputs: int, _) -> Part:
    leaves = {"kernel": normal(random, inputs, outputs), "scale": normal(random, outputs)}
    apply = lambda leaves, h, x: h @ (leaves["kernel"] * leaves["scale"])  # noqa: E731
    refused = frozenset({"kernel", "scale"}) if inputs * outputs > 1 else frozenset()
    return Part(leaves, apply, refused=refused, what="a scaled kernel")


def _adapter(random, inputs: int, outputs: int, _) -> Part:
    """A kernel with two factors beside it: products of three kernels, of which two are added."""
    leaves = {
        "kernel": normal(random, inputs, outputs),
        "down": normal(random, inputs, 2),
        "up": normal(random, 2, outputs),
        "bias": normal(random, outputs),
    }
    truth = {
        "kernel": Kernel("bias", columns(outputs, inputs)),
        "down": Kernel(None, np.zeros((inputs, 2), int)),
        "up": Kernel("bias", columns(outputs, 2)),
    }
    apply = lambda leaves, h, x: h @ leaves["kernel"] + (h @ leaves["down"]) @ leaves["up"] + leaves["bias"]  # noqa: E731
    return Part(leaves, apply, truth, what="an adapter beside a kernel")


def _gated(random, inputs: int, outputs: int, _) -> Part:
    leaves = {"value": normal(random, inputs, outputs), "gate": normal(random, inputs, outputs)}
    leaves |= {"bias": normal(random, outputs)}
    truth = {
        "value": Kernel(None, np.zeros((inputs, outputs), int)),
        "gate": Kernel("bias", columns(outputs, inputs)),
    }

    def apply(leaves, h, _):
        return (h @ leaves["value"]) * jax.nn.sigmoid(h @ leaves["gate"] + leaves["bias"])

    return Part(leaves, apply, truth, what="a gate")


def _twice(random, inputs: int, outputs: int, _) -> Part:
    """One kernel in two products, each with the same bias, or none with any."""
    leaves = {"up": normal(random, inputs, outputs), "kernel": normal(random, outputs, outputs)}
    biased = bool(random.random() < 0.5)
    leaves |= {"bias": normal(random, outputs)} if biased else {}

    def apply(leaves, h, _):
        shift = leaves["bias"] if biased else 0
        return jnp.tanh(h @ leaves["up"] @ leaves["kernel"] + shift) @ leaves["kernel"] + shift

    truth = {
        "up": Kernel(None, np.zeros((inputs, outputs), int)),
        "kernel": Kernel("bias" if biased else None, columns(outputs, outputs)),
    }
    return Part(leaves, apply, truth, what=f"a kernel used twice, {'a' if biased else 'no'} bias")


def _scan(random, inputs: int, outputs: int, _) -> Part:
    """A stack of kernels, each with its own part of the bias, and what goes in front of it."""
    leaves = {"up": normal(random, inputs, outputs), "kernel": normal(random, 2, outputs, outputs)}
    leaves["bias"] = normal(random, 2, outputs)

    def apply(leaves, h, _):
        def turn(h, layer):
            return jnp.tanh(h @ layer[0] + layer[1]), None

        return jax.lax.scan(turn, h @ leaves["up"], (leaves["kernel"], leaves["bias"]))[0]

    beside = np.arange(2)[:, None, None] * outputs + columns(outputs, outputs)
    truth = {"up": Kernel(None, np.zeros((inputs, outputs), int)), "kernel": Kernel("bias", beside)}
    return Part(leaves, apply, truth, what="a scan over kernels")


def _recurrent(random, inputs: int, outputs: int, _) -> Part:
    """A scan that closes over its kernel: one kernel, used in every turn."""
    leaves = {"up": normal(random, inputs, outputs), "kernel": normal(random, outputs, outputs)}
    leaves["bias"] = normal(random, outputs)

    def apply(leaves, h, _):
        start = h @ leaves["up"]
        return jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ leaves["kernel"] + leaves["bias"]), start)

    truth = {
        "up": Kernel(None, np.zeros((inputs, outputs), int)),
        "kernel": Kernel("bias", columns(outputs, outputs)),
    }
    return Part(leaves, apply, truth, what="a recurrence")


def _positions(random, inputs: int, outputs: int, _) -> Part:
    """Two positions of each sample, beside each other, or merged with the samples and taken apart again."""
    (bias, how), merged = _bias(random, outputs), bool(random.random() < 0.5)
    leaves = {"kernel": normal(random, inputs, outputs), **bias}

    def apply(leaves, h, _):
        rows = jnp.stack([h, jnp.cos(h)], 1)
        rows = rows.reshape(2 * len(h), inputs) if merged else rows
        units = rows @ leaves["kernel"] + (leaves["bias"] if bias else 0)
        units = units.reshape(len(h), 2, outputs)
        return units[:, 0] + jnp.tanh(units[:, 1])

    truth = {"kernel": Kernel("bias" if bias else None, columns(outputs, inputs))}
    return Part(leaves, apply, truth, what=f"two positions{' among the samples' * merged}, {how}")


def _convolution(random, _inputs: int, outputs: int, _) -> Part:
    """The units as a signal of one channel."""
    size, strides = int(random.integers(1, 4)), (int(random.integers(1, 3)),)
    (bias, how), leaves = _bias(random, outputs), {"kernel": normal(random, size, 1, outputs)}
    truth = {"kernel": Kernel("bias" if bias else None, np.broadcast_to(np.arange(outputs), (size, 1, outputs)))}

    def apply(leaves, h, _):
        product = jax.lax.conv_general_dilated(
            h[:, :, None], leaves["kernel"], strides, "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return jnp.tanh(product + (leaves["bias"] if bias else 0)).sum(1)

    return Part(leaves | bias, apply, truth, what=f"a convolution of {size}, strides {strides}, {how}")


def _attention(random, inputs: int, outputs: int, _) -> Part:
    """Every unit is a token; softmax does not see the biases of the keys."""
    leaves = {"lift": normal(random, inputs + 1, 4)}
    for name, width in (("q", 4), ("k", 4), ("v", outputs)):
        leaves |= {name: normal(random, 4, width), f"{name}_bias": normal(random, width)}
    causal = bool(random.random() < 0.5)

    def apply(leaves, h, _):
        h = jnp.concatenate([h, jnp.ones((len(h), 1))], 1)[:, :, None] * leaves["lift"]
        q, k, v = (h @ leaves[name] + leaves[f"{name}_bias"] for name in "qkv")
        scores = jnp.einsum("ntf,nsf->nts", q, k)
        scores = jnp.where(jnp.tri(inputs + 1, dtype=bool), scores, -jnp.inf) if causal else scores
        return jnp.einsum("nts,nsf->ntf", jax.nn.softmax(scores), v).mean(1)

    truth = {"q": Kernel("q_bias", columns(4, 4)), "v": Kernel("v_bias", columns(outputs, 4))}
    truth["k"] = Kernel(None, np.zeros((4, 4), int))
    return Part(leaves, apply, truth, what=f"{'causal ' * causal}attention")


LAYERS = (
    *([dense] * 8),
    *(_heads, _heads, _merge, _two_products, _equinox_linear, _low_rank, _scaled, _adapter, _gated),
    *(_positions, _positions, _convolution, _convolution, _attention, _scan, _recurrent, _twice),
)


@jax.custom_jvp
def _own_derivative(z):
    return jnp.tanh(z)


_own_derivative.defjvp(lambda primals, tangents: (jnp.tanh(primals[0]), 0.7 * jnp.cos(primals[0]) * tangents[0]))


@jax.custom_vjp
def _own_transpose(z):
    return jnp.clip(z, -1, 1)


_own_transpose.defvjp(lambda z: (jnp.clip(z, -1, 1), z), lambda z, cotangent: (jnp.tanh(z) * cotangent,))

FUNCTIONS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "leaky relu": jax.nn.leaky_relu,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "custom_jvp": _own_derivative,
    "custom_vjp": _own_transpose,
    "rematerialised": jax.checkpoint(lambda z: jnp.sin(z) * z),
    "softmax": lambda z: jax.nn.softmax(jnp.sin(z)),
}


def _activation(random, width: int) -> Part:
    name = choice(random, list(FUNCTIONS))
    if name == "softmax" and width == 1:  # all its derivatives are zero, up to rounding
        name = "tanh"
    return Part({}, lambda leaves, h, x: FUNCTIONS[name](h), what=name)


def _prelu(random, width: int) -> Part:
    slope = normal(random, *(() if random.random() < 0.5 else (width,)))
    return Part({"slope": slope}, lambda leaves, h, x: jnp.where(h > 0, h, leaves["slope"] * h), what="prelu")


ACTIVATIONS = (_activation, _activation, _activation, _activation, _prelu)


def norm(random, width: int) -> Part:
    def apply(leaves, h, _):
        h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 0.1)
        return h * leaves["scale"] + leaves["bias"]

    return Part({"scale": normal(random, width), "bias": normal(random, width)}, apply, what="layer norm")


def _scale(random, width: int) -> Part:
    return Part({"scale": normal(random, width)}, lambda leaves, h, x: h * leaves["scale"], what="a scale")


def _shift(random, width: int) -> Part:
    return Part({"bias": normal(random, width)}, lambda leaves, h, x: h + leaves["bias"], what="a leaf added to units")


def _embedding(random, width: int) -> Part:
    def apply(leaves, h, x):
        return h + leaves["embedding"][(x[:, 0] > 0).astype(int)]

    return Part({"embedding": normal(random, 2, width)}, apply, what="an embedding")


def _unused(random, width: int) -> Part:
    return Part({"kernel": normal(random, width, width)}, lambda leaves, h, x: h, what="a leaf that is not used")


def _sorted(_, width: int) -> Part:
    return Part({}, lambda leaves, h, x: jnp.cumsum(jnp.sort(h, 1)[:, ::-1], 1), what=f"{width} units sorted")


OTHERS = (_scale, _shift, _embedding, _unused, _sorted)


def _tied(random, inputs: int, outputs: int) -> Part:
    leaves = {"kernel": normal(random, inputs, outputs), "last": normal(random, inputs, outputs)}
    apply = lambda leaves, h, x: jnp.tanh(h @ leaves["kernel"]) @ leaves["kernel"].T @ leaves["last"]  # noqa: E731
    return Part(leaves, apply, refused=frozenset({"kernel"}), what="tied weights")


@jax.custom_jvp
def _product_with_jvp(w, h):
    return h @ w


_product_with_jvp.defjvp(lambda primals, tangents: (primals[1] @ primals[0], 2 * (primals[1] @ tangents[0])))


@jax.custom_vjp
def _product_with_vjp(w, h):
    return h @ w


_product_with_vjp.defvjp(
    lambda w, h: (h @ w, (w, h)), lambda kept, cotangent: (2 * kept[1].T @ cotangent, cotangent @ kept[0].T)
)


def _custom(random, inputs: int, outputs: int) -> Part:
    rule = choice(random, (_product_with_jvp, _product_with_vjp))
    leaves = {"kernel": normal(random, inputs, outputs), "bias": normal(random, outputs)}
    apply = lambda leaves, h, x: rule(leaves["kernel"], h) + leaves["bias"]  # noqa: E731
    return Part(leaves, apply, refused=frozenset({"kernel"}), what="a kernel with a derivative of its own")


def _with_and_without(random, inputs: int, outputs: int) -> Part:
    leaves = {"kernel": normal(random, inputs, outputs), "bias": normal(random, outputs)}

    def apply(leaves, h, _):
        product = h @ leaves["kernel"]
        return jnp.tanh(product + leaves["bias"]) + product

    return Part(leaves, apply, refused=frozenset({"kernel"}), what="a product with and without its bias")


def _shared_bias(random, inputs: int, outputs: int) -> Part:
    leaves = {"up": normal(random, inputs, outputs), "kernel": normal(random, outputs, outputs)}
    leaves["bias"] = normal(random, outputs)

    def apply(leaves, h, _):
        return jnp.tanh(h @ leaves["up"] + leaves["bias"]) @ leaves["kernel"] + leaves["bias"]

    return Part(leaves, apply, refused=frozenset({"up", "kernel", "bias"}), what="a shared bias")


def _fused(random, inputs: int, outputs: int) -> Part:
    leaves = {"kernel": normal(random, inputs, 2 * outputs)}

    def apply(leaves, h, _):
        first, second = leaves["kernel"][:, :outputs], leaves["kernel"][:, outputs:]
        return (h @ first) * jnp.tanh(h @ second)

    return Part(leaves, apply, refused=frozenset({"kernel"}), what="a kernel in two slices")


REFUSED = (_tied, _custom, _with_and_without, _shared_bias, _fused)
