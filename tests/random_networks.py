"""Random networks with what is true of them: which leaves are kernels, which bias stands beside each, what to refuse.

The truth comes from how a network was put together, never from a reading of it.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax import Array

from tests import random_parts
from tests.random_parts import Kernel, Part, choice, columns


class Case(NamedTuple):
    """A network, and what is true of it.

    Attributes:
        network: pure function of params and inputs.
        params: in containers of any kind.
        inputs: samples along the first axis.
        metric: to score with.
        kernels: by path; those that can be scored.
        refused: the paths of the leaves for which the network has to be refused, one of which must be named.
        description: what it is made of, in words.
    """

    network: Callable
    params: Any
    inputs: Array
    metric: str
    kernels: dict[str, Kernel]
    refused: frozenset[str]
    description: str


def draw(seed: int) -> Case:
    """The random network of this number."""
    random = np.random.default_rng(seed)
    samples, width = int(random.integers(3, 8)), int(random.integers(1, 7))
    inputs = jnp.asarray(random.normal(size=(samples, width)) + 0.3)
    kind = random.random()
    if kind < 0.04:
        return _single_array(random, inputs)
    if kind < 0.12:
        return _equinox_mlp(random, inputs)
    return _of_parts(random, inputs)


def _of_parts(random, inputs: Array) -> Case:
    width = inputs.shape[1]
    depth = choice(random, (2, 2, 2, 2, 3, 3, 3, 4, 4, 5, 6))
    same = random.random() < 0.4
    hidden = [int(random.integers(1, 7))] * depth if same else [int(random.integers(1, 7)) for _ in range(depth)]
    refused_at = int(random.integers(depth)) if random.random() < 0.2 else None
    parts, skips = [], []
    for number, after in enumerate(hidden):
        last = number == depth - 1
        if number == refused_at:
            parts.append(choice(random, random_parts.REFUSED)(random, width, after))
        else:
            kinds = random_parts.LAYERS if not last or any(part.kernels for part in parts) else (random_parts.dense,)
            parts.append(choice(random, kinds)(random, width, after, inputs.shape[1]))
        skips.append(width == after and random.random() < 0.5)
        if not last and random.random() < 0.3 and after > 1:
            parts.append(random_parts.norm(random, after))
            skips.append(False)
        if not last and random.random() < 0.9:
            parts.append(choice(random, random_parts.ACTIVATIONS)(random, after))
            skips.append(False)
            if random.random() < 0.3:
                parts.append(choice(random, random_parts.OTHERS)(random, after))
                skips.append(False)
        width = after
    parts = [_wrapped(random, part) for part in parts]
    params, unpack, paths, static, contained = _in_containers(random, [part.leaves for part in parts])

    def network(params, inputs):
        units = inputs
        for part, leaves, skip in zip(parts, unpack(params), skips, strict=True):
            after = part.apply(leaves, units, inputs)
            units = units + after if skip else after
        return units

    wrapper, around = choice(random, NETWORK_WRAPPERS[:1] if static else NETWORK_WRAPPERS)
    metric = "fisher" if width > 1 and random.random() < 0.5 else "euclidean"
    kernels = {
        paths[number, role]: Kernel(paths.get((number, kernel.bias)), kernel.beside)
        for number, part in enumerate(parts)
        for role, kernel in part.kernels.items()
    }
    refused = frozenset(paths[number, role] for number, part in enumerate(parts) for role in part.refused)
    joined = "; ".join(
        part.what + (" with a skip connection" if skip else "") for part, skip in zip(parts, skips, strict=True)
    )
    return Case(
        around(network), params, inputs, metric, kernels, refused, f"{contained}; {wrapper}; {inputs.shape}: {joined}"
    )


def _single_array(random, inputs: Array) -> Case:
    outputs = int(random.integers(1, 5))
    kernel = jnp.asarray(random.normal(size=(inputs.shape[1], outputs)))
    truth = {"": Kernel(None, np.zeros(kernel.shape, int))}
    return Case(lambda w, x: jnp.tanh(x @ w), kernel, inputs, "euclidean", truth, frozenset(), "a single array")


def _equinox_mlp(random, inputs: Array) -> Case:
    width, depth, biased = int(random.integers(1, 7)), int(random.integers(1, 4)), bool(random.random() < 0.7)
    outputs = int(random.integers(2, 5))
    mlp = eqx.nn.MLP(
        inputs.shape[1], outputs, width, depth, jax.nn.silu, use_bias=biased, use_final_bias=True, key=jax.random.key(3)
    )
    filled = lambda leaf: jnp.asarray(random.normal(size=leaf.shape)) if eqx.is_array(leaf) else leaf  # noqa: E731
    mlp = jax.tree.map(filled, mlp)
    truth = {
        f"layers/{i}/weight": Kernel(None if layer.bias is None else f"layers/{i}/bias", columns(*layer.weight.shape).T)
        for i, layer in enumerate(mlp.layers)
    }
    network = lambda mlp, x: jax.vmap(mlp)(x)  # noqa: E731
    return Case(network, mlp, inputs, "fisher", truth, frozenset(), f"eqx.nn.MLP, {depth + 1} layers")


def _one_by_one(apply: Callable) -> Callable:
    return jax.vmap(lambda leaves, h, x: apply(leaves, h[None], x[None])[0], in_axes=(None, 0, 0))


def _samples_last(apply: Callable) -> Callable:
    """The samples on the last axis, and back."""

    def moved(leaves, h, x):
        return jax.vmap(lambda h, x: apply(leaves, h[None], x[None])[0], in_axes=(1, 0), out_axes=-1)(h.T, x).T

    return moved


PART_WRAPPERS = (
    ("", lambda apply: apply),
    ("", lambda apply: apply),
    ("", lambda apply: apply),
    ("jit", jax.jit),
    ("jit in jit", lambda apply: jax.jit(lambda *given: jax.jit(apply)(*given))),
    ("checkpoint", jax.checkpoint),
    ("jit of checkpoint", lambda apply: jax.jit(jax.checkpoint(apply))),
    ("named_call", lambda apply: jax.named_call(apply, name="part")),
    ("vmap", _one_by_one),
    ("vmap of jit", lambda apply: _one_by_one(jax.jit(apply))),
    ("vmap over the last axis", _samples_last),
)

NETWORK_WRAPPERS = (
    ("as it is", lambda network: network),
    ("jitted", jax.jit),
    ("checkpointed", jax.checkpoint),
    ("vmapped", lambda network: jax.vmap(lambda params, x: network(params, x[None])[0], in_axes=(None, 0))),
)


def _wrapped(random, part: Part) -> Part:
    name, wrapper = choice(random, PART_WRAPPERS)
    return part._replace(apply=wrapper(part.apply), what=f"{name} of {part.what}" if name else part.what)


_LAYER_NAMES = (
    "hidden",
    "encoder",
    "decoder",
    "input",
    "output",
    "a",
    "z",
    "Dense_10",
    "Dense_9",
    "b1",
    "kernel",
    "bias",
    "scale",
    "norm",
    "head",
    "stem",
    "y2",
    "x3",
)
_LEAF_NAMES = (
    ("kernel", "bias", "scale", "w4", "w5", "w6", "w7"),
    ("bias", "kernel", "w3", "weight", "w5", "w6", "w7"),
    ("scale", "kernel", "bias", "w", "w5", "w6", "w7"),
    ("w", "b", "g", "w4", "w5", "w6", "w7"),
    ("z", "y", "x", "w", "v", "w6", "w7"),
    ("b", "w", "kernel", "bias", "scale", "w6", "w7"),
)


def _container(random, names: Sequence[str], values: Sequence) -> tuple[Any, Callable[[Any], list], str]:
    """A container of any kind, how to take the values out of it in their order, and its name."""
    kind = choice(random, ("dict", "dict", "FrozenDict", "list", "tuple", "NamedTuple", "dataclass", "eqx.Module"))
    if kind in ("dict", "FrozenDict"):
        made = dict(zip(names, values, strict=True))
        return FrozenDict(made) if kind == "FrozenDict" else made, lambda held: [held[name] for name in names], kind
    if kind in ("list", "tuple"):
        order = [int(i) for i in random.permutation(len(values))]
        made = [values[i] for i in order]
        back = sorted(range(len(order)), key=order.__getitem__)
        return made if kind == "list" else tuple(made), lambda held: [held[i] for i in back], kind
    fields = [str(name) for name in random.permutation(list(names))]
    given = {name: values[names.index(name)] for name in fields}
    if kind == "NamedTuple":
        made = collections.namedtuple("Held", fields)(**given)
    elif kind == "dataclass":
        of = dataclasses.make_dataclass("Held", [(name, Any) for name in fields], frozen=True)
        made = jax.tree_util.register_dataclass(of, data_fields=fields, meta_fields=[])(**given)
    else:
        made = type("Held", (eqx.Module,), {"__annotations__": dict.fromkeys(fields, Any)})(**given)
    return made, lambda held: [getattr(held, name) for name in names], kind


def _in_containers(random, parts: Sequence[dict[str, np.ndarray]]):
    """The leaves of all parts in one pytree.

    Returns:
        The params, a function that gives the leaves of each part by role, the path of each ``(part, role)``, whether a
        leaf is no array, and the names of the containers.
    """
    leaves = [{role: jnp.asarray(leaf) for role, leaf in part.items()} for part in parts]
    if random.random() < 0.15:
        params, unpack, contained = _flat(random, leaves)
        static = False
    else:
        params, unpack, static, contained = _nested(random, leaves)
    places = {
        id(leaf): jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    paths = {(i, role): places[id(leaf)] for i, part in enumerate(leaves) for role, leaf in part.items()}
    return params, unpack, paths, static, contained


def _flat(random, leaves):
    """One dict, with names that say little."""
    names = {}
    for number, part in enumerate(leaves):
        for role in part:
            names[number, role] = (
                f"{choice(random, ('net.', 'a b ', '', '[x] ', 'é'))}{random.integers(10**6)}.{role[:1]}"
            )
    params = {names[number, role]: leaf for number, part in enumerate(leaves) for role, leaf in part.items()}

    def unpack(params):
        return [{role: params[names[number, role]] for role in part} for number, part in enumerate(leaves)]

    return params, unpack, "a flat dict"


def _nested(random, leaves):
    names = [str(name) for name in random.permutation(_LAYER_NAMES)[: len(leaves)]]
    if len(leaves) > len(_LAYER_NAMES):
        names = [f"part{i}" for i in random.permutation(len(leaves))]
    held, unpacks, kinds = [], [], []
    for part in leaves:
        leaf_names = choice(random, _LEAF_NAMES)[: len(part)]
        container, unpack, kind = _container(random, leaf_names, list(part.values()))
        held.append(container)
        unpacks.append(unpack)
        kinds.append(kind)
    static = bool(random.random() < 0.1)
    if random.random() < 0.15:
        held, names = [*held, jnp.asarray(3)], [*names, "steps"]
    if static:
        held, names = [*held, jnp.tanh], [*names, "function"]
    params, unpack_parts, kind = _container(random, names, held)
    deeper = bool(random.random() < 0.3)
    if deeper:
        params = {"net": (params,)}

    def unpack(params):
        parts = unpack_parts(params["net"][0] if deeper else params)
        return [
            dict(zip(part, unpack(container), strict=True))
            for part, unpack, container in zip(leaves, unpacks, parts[: len(leaves)], strict=True)
        ]

    return params, unpack, static, f"{kind} of {', '.join(dict.fromkeys(kinds))}{' in a dict' * deeper}"


def count_outcomes(outcome: Callable[[int], str], stop: int, start: int = 0) -> None:
    """Prints how many random networks ended which way, and every one of which a check failed."""
    ended = collections.Counter()
    for seed in range(start, stop):
        try:
            ended[outcome(seed)] += 1
        except Exception as error:
            ended["wrong"] += 1
            print(f"{seed}: {type(error).__name__}: {error}\n", flush=True)
        if seed % 25 == 24:
            jax.clear_caches()  # no network is seen again
            print(f"{start} to {seed}: {dict(ended)}", flush=True)
    print(f"{stop - start} random networks: {dict(ended)}")
