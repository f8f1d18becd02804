"""What billions of weights would take on many devices, from the compiler: ``python -m experiments.scale``.

Decoder-only transformers of today's style, with up to 6.7 billion parameters of 16 bits, are laid out on 8 and on 64
simulated devices, and a gradient, EC scores with one probe, the choice of what goes, and one step of the repair of all
survivors are compiled for shapes alone: nothing of this size is computed. It shows the bytes that each device holds and
moves. It takes a quarter of an hour on two cores; it writes results.csv, config.json and scale.png, and prints a table.
It does not show how fast devices exchange what they must, nor the numerics of networks of this size.
"""

import functools
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import pandas as pd
from jax.sharding import NamedSharding, PartitionSpec

from ecjax import devices, graph, metrics, networks, prune, repair, score
from experiments import flags, report, results, sweep

CALLS = ("gradient", "EC, 1 probe", "selection", "repair, 1 step")


class Sizes(NamedTuple):
    """Of a transformer with rotary positions, grouped queries, SwiGLU and RMSNorm."""

    layers: int
    width: int
    heads: int
    groups: int  # of heads that share keys and values
    hidden: int
    words: int = 32_000


SIZES = {
    "5M": Sizes(4, 256, 8, 4, 704, 4096),
    "0.1B": Sizes(12, 768, 12, 4, 2048),
    "1.3B": Sizes(24, 2048, 16, 8, 5504),
    "6.7B": Sizes(32, 4096, 32, 32, 11008),
}


@dataclass(frozen=True)
class Config:
    """Compile scores, selection and repair of large transformers for many devices, and show what each device holds."""

    sizes: tuple[Literal["5M", "0.1B", "1.3B", "6.7B"], ...] = ("0.1B", "1.3B", "6.7B")  # By their parameters.
    devices: tuple[int, ...] = (8, 64)  # How many are simulated.
    layouts: tuple[Literal["neurons", "all"], ...] = ("neurons", "all")
    """Params spread by neurons over the mesh's axis "model", or fully: over "data" as well."""
    positions: int = 1024  # Of a sequence; each device along "data" has one sequence at a time.
    products: int = 10  # Products with the curvature in the step of the repair.
    output: Path = Path("results/scale")  # Folder for the results.


def initial(sizes: Sizes) -> dict[str, Any]:
    """The shape of each leaf, and over which axes of the mesh its axes are spread."""
    layers, width, heads, groups, hidden, words = sizes
    each, by = width // heads, PartitionSpec
    return {
        "words": ((words, width), by("model", "data")),
        "blocks": {
            "norms": ((layers, 2, width), by()),
            "query": ((layers, width, heads, each), by(None, "data", "model")),
            "key": ((layers, width, groups, each), by(None, "data", "model")),
            "value": ((layers, width, groups, each), by(None, "data", "model")),
            "out": ((layers, heads, each, width), by(None, "model", None, "data")),
            "gate": ((layers, width, hidden), by(None, "data", "model")),
            "up": ((layers, width, hidden), by(None, "data", "model")),
            "down": ((layers, hidden, width), by(None, "model", "data")),
        },
        "norm": ((width,), by()),
        "head": ((width, words), by("data", "model")),
    }


def normed(stream: jax.Array, scale: jax.Array) -> jax.Array:
    """RMSNorm."""
    whole = stream.astype(jnp.float32)
    return (whole * jax.lax.rsqrt((whole**2).mean(-1, keepdims=True) + 1e-6)).astype(stream.dtype) * scale


def rotated(heads: jax.Array) -> jax.Array:
    """Pairs of features turned by angles that grow with the position."""
    positions, size = heads.shape[1], heads.shape[-1]
    angles = jnp.arange(positions)[:, None] * 10_000.0 ** (-jnp.arange(0, size, 2) / size)
    cosine, sine = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(heads.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cosine - second * sine, first * sine + second * cosine], -1).astype(heads.dtype)


def block(stream: jax.Array, params: networks.Params) -> tuple[jax.Array, None]:
    """Attention and a gated hidden layer, each added to the stream."""
    normal, product = normed(stream, params["norms"][0]), functools.partial(jnp.einsum, "btd,dhk->bthk")
    query, key, value = (product(normal, params[name]) for name in ("query", "key", "value"))
    mixed = jax.nn.dot_product_attention(rotated(query), rotated(key), value, is_causal=True)
    stream += jnp.einsum("bthk,hkd->btd", mixed, params["out"])
    normal = normed(stream, params["norms"][1])
    return stream + (jax.nn.silu(normal @ params["gate"]) * (normal @ params["up"])) @ params["down"], None


def network(params: networks.Params, words: jax.Array) -> jax.Array:
    """The logits of the next word, of shape (samples, positions, words)."""
    stream, _ = jax.lax.scan(jax.checkpoint(block), params["words"][words], params["blocks"])
    return (normed(stream, params["norm"]) @ params["head"]).astype(jnp.float32)


def calls(sizes: Sizes, layout: str, mesh: jax.sharding.Mesh, config: Config) -> dict[str, tuple[Callable, tuple]]:
    """By name: what is compiled, and the shapes that it takes, with where they lie."""

    def shaped(shape, dtype, spec=PartitionSpec()) -> jax.ShapeDtypeStruct:  # noqa: B008 it never changes
        kept = PartitionSpec(*(None if axis == "data" and layout == "neurons" else axis for axis in spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, kept))

    is_leaf = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    params = jax.tree.map(lambda leaf: shaped(leaf[0], jnp.bfloat16, leaf[1]), initial(sizes), is_leaf=is_leaf)
    samples, everywhere = PartitionSpec("data"), NamedSharding(mesh, PartitionSpec())
    shape = mesh.shape["data"], config.positions
    words = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, samples))
    targets = jax.ShapeDtypeStruct((*shape, sizes.words), jnp.float32, sharding=NamedSharding(mesh, samples))
    key = jax.ShapeDtypeStruct((), jax.eval_shape(jax.random.key, 0).dtype, sharding=everywhere)
    layers, of_each = networks.layers(network, params, words), networks.by_path(params)
    paths = {layer.kernel for layer in layers}

    def kernels(dtype) -> networks.Kernels:
        leaves, tree = jax.tree.flatten(params)
        like = [shaped(leaf.shape, dtype, leaf.sharding.spec) for leaf in leaves]
        kept = [leaf if path in paths else None for path, leaf in zip(of_each, like, strict=True)]
        return jax.tree.unflatten(tree, kept)

    def gradient(params, words):
        return jax.grad(lambda params: sweep.cross_entropy(network(params, words), words).mean())(params)

    def scores(params, words, key):
        options = {"metric": "fisher", "probes": 1, "key": key, "batch_size": 1}
        return score.elimination_compensation(network, params, words, **options)

    def selection(importance):
        return prune.one_shot(importance, score.Scores(importance, None, layers), 0.9).masks

    def step(params, masks, words, targets):
        sizes = {"products": config.products, "curvature_samples": shape[0], "batch_size": 1}
        how = repair.Survivors(iterations=1, metric=metrics.Fisher(), **sizes)
        return how(network, params, masks, words, targets)

    found = (gradient, (params, words)), (scores, (params, words, key))
    found += (selection, (kernels(jnp.float32),)), (step, (params, kernels(bool), words, targets))
    return dict(zip(CALLS, found, strict=True))


def compiled(call: Callable, shapes: tuple, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """What a device holds and moves, in bytes, and the operations of all of them; NaN where a loop is of any length."""
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = jax.jit(call).trace(*shapes)
        program = traced.lower().compile()
    memory, moved = program.memory_analysis(), list(collectives(program.as_text()))
    flops = graph.flops.of_jaxpr(traced.jaxpr)
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "moved": sum(size * times for size, times in moved),
        "largest": max((size for size, _ in moved), default=0),
        "flops": math.nan if flops.unknown else flops.products,
        "seconds": time.perf_counter() - start,
    }


def collectives(text: str) -> Iterator[tuple[int, int]]:
    """The bytes that a device gets from others in each exchange of a program, and how often; in loops as they turn."""
    bodies = dict(re.findall(r"^(?:ENTRY )?(%[\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    turns = dict.fromkeys(bodies, 1)
    for name, body in bodies.items():
        for inside, rest in re.findall(r" while\(.*?body=(%[\w.\-]+)(.*)", body):
            count = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
            turns[inside] = (name, int(count.group(1)) if count else 1)

    def times(name: str) -> int:
        outer = turns[name]
        return outer if isinstance(outer, int) else outer[1] * times(outer[0])

    sizes = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for name, body in bodies.items():
        for shapes in re.findall(rf" = (.*?) (?:{kinds})(?:-start)?\(", body):
            arrays = re.findall(rf"({'|'.join(sizes)})\[([\d,]*)\]", shapes)
            bytes_of = [sizes[kind] * math.prod(map(int, filter(None, shape.split(",")))) for kind, shape in arrays]
            yield max(bytes_of, default=0), times(name)


def main(config: Config) -> None:
    """Compiles everything, from the smallest network to the largest."""
    flags.require(config)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(config.devices))
    with results.opened(config.output, config) as rows, report.progress() as bar:
        planned = [(n, size, layout) for n in config.devices for size in config.sizes for layout in config.layouts]
        step = bar.add_task("", total=len(planned) * len(CALLS), completed=rows.count())
        for count, size, layout in planned:
            mesh = devices.mesh(max(2, math.isqrt(count)), jax.devices()[:count])
            for name, (call, shapes) in calls(SIZES[size], layout, mesh, config).items():
                keys = {"devices": count, "size": size, "layout": layout, "call": name}
                if not rows.count(**keys):
                    bar.update(step, description=f"{size} on {count} devices, spread by {layout}: {name}")
                    rows.add(keys | compiled(call, shapes, mesh))
                    bar.advance(step)
    frame, of_call = rows.frame(), ["devices", "size", "layout"]
    gradients = frame[frame["call"] == CALLS[0]].set_index(of_call)["flops"].rename("of_gradient")
    frame = frame.join(gradients, on=of_call)
    shown = frame.assign(**{"of a gradient": frame["flops"] / frame["of_gradient"]})
    for name in (sizes := ["arguments", "temporary", "output", "moved"]):
        shown[f"{name} (MB)"] = frame[name] / 1e6
    names = [*of_call, "call", *(f"{name} (MB)" for name in sizes), "of a gradient", "seconds"]
    formats = dict(zip(names, ["{}"] * 4 + ["{:,.0f}"] * 4 + ["{:.2f}", "{:.0f}"], strict=True))
    figure(frame, config.output / "scale.png")
    note = f"results.csv, config.json and scale.png are in {config.output}/"
    report.console().print(report.plain("of each device, by the compiler", shown, formats), note)


def figure(frame: pd.DataFrame, path: Path) -> None:
    """The bytes of a device for each call, a panel for each size and number of devices."""
    groups = list(frame.groupby(["devices", "size"], sort=False))
    canvas, axes = plt.subplots(1, len(groups), figsize=(11, 4), layout="constrained", squeeze=False)
    for axis, ((count, size), chosen) in zip(axes.flat, groups, strict=True):
        table = chosen.assign(call=chosen["call"] + "\n" + chosen["layout"]).set_index("call")
        parts = table[["arguments", "temporary", "output"]] / 1e9
        parts.plot.barh(stacked=True, ax=axis, color=report.COLOURS[4:7], legend=False)
        axis.set(title=f"{size}, {count} devices", xlabel="GB a device", ylabel="")
        axis.invert_yaxis()
        axis.tick_params("y", labelsize="x-small", labelleft=axis is axes[0, 0])
    report.save(canvas, path, ncols=3)


if __name__ == "__main__":
    results.command(Config, main, __doc__)
