"""What billions of weights would take on many devices, from the compiler: ``python -m experiments.scale``.

Decoder-only transformers of today's style, with up to 6.7 billion parameters of 16 bits, are laid out on 8 and on 64
simulated devices, and a gradient, EC scores with one probe, the choice of what goes, and one step of the repair of all
survivors are compiled for shapes alone: nothing of this size is computed. It shows the bytes that each device holds and
moves. It takes seven minutes on one core; it writes results.csv, config.json and scale.png, and prints a table.
It does not show how fast devices exchange what they must, nor the numerics of networks of this size.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import pandas as pd
from jax.sharding import NamedSharding, PartitionSpec

from ecjax import devices, metrics, networks, prune, repair, score
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
    "0.1B": Sizes(12, 768, 16, 8, 2048),
    "1.3B": Sizes(24, 2048, 16, 8, 5504),
    "6.7B": Sizes(32, 4096, 32, 32, 11008),
}


@dataclass(frozen=True)
class Config:
    """Compile scores, selection and repair of large transformers for many devices, and show what each device holds."""

    sizes: tuple[Literal["5M", "0.1B", "1.3B", "6.7B"], ...] = ("0.1B", "1.3B", "6.7B")  # By their parameters.
    devices: tuple[int, ...] = (8, 64)  # How many are simulated.
    layouts: tuple[Literal["neurons", "all"], ...] = ("neurons", "all")  # Params over the axis "model", or both.
    positions: int = 1024  # Of a sequence; each device along "data" has one sequence at a time.
    products: int = 10  # Products with the curvature in the step of the repair.
    output: Path = Path("results/scale")  # Folder for the results.


def initial(sizes: Sizes, leaf: Callable[..., Any]) -> dict[str, Any]:
    """The params, each leaf made of its shape and of the axes of the mesh over which its axes are spread."""
    layers, width, heads, groups, hidden, words = sizes
    each = width // heads
    return {
        "words": leaf((words, width), "model", "data"),
        "blocks": {
            "norms": leaf((layers, 2, width)),
            "query": leaf((layers, width, heads, each), None, "data", "model"),
            "key": leaf((layers, width, groups, each), None, "data", "model"),
            "value": leaf((layers, width, groups, each), None, "data", "model"),
            "out": leaf((layers, heads, each, width), None, "model", None, "data"),
            "gate": leaf((layers, width, hidden), None, "data", "model"),
            "up": leaf((layers, width, hidden), None, "data", "model"),
            "down": leaf((layers, hidden, width), None, "model", "data"),
        },
        "norm": leaf((width,)),
        "head": leaf((width, words), "data", "model"),
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


def calls(sizes: Sizes, layout: str, mesh: jax.sharding.Mesh, config: Config) -> Iterator[tuple]:
    """What is compiled, in the order of ``CALLS``, each with the shapes that it takes and where they lie."""

    def shaped(shape, dtype, *axes) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    def param(shape, *axes) -> jax.ShapeDtypeStruct:
        kept = [None if axis == "data" and layout == "neurons" else axis for axis in axes]
        return shaped(shape, jnp.bfloat16, *kept)

    def kernels(dtype) -> networks.Kernels:
        paths, leaves = {layer.kernel for layer in layers}, networks.by_path(params).items()
        like = {path: leaf.update(dtype=dtype) if path in paths else None for path, leaf in leaves}
        return networks.replace(params, like)

    def scores(params, words, key):
        return score.elimination_compensation(network, params, words, metric="fisher", probes=1, key=key, batch_size=1)

    def selection(importance):
        return prune.one_shot(importance, score.Scores(importance, None, layers), 0.9).masks

    def step(params, masks, words, targets):
        options = {"products": config.products, "curvature_samples": samples, "batch_size": 1}
        how = repair.Survivors(iterations=1, metric=metrics.Fisher(), **options)
        return how(network, params, masks, words, targets)

    samples, params = mesh.shape["data"], initial(sizes, param)
    words = shaped((samples, config.positions), jnp.int32, "data")
    targets = shaped((*words.shape, sizes.words), jnp.float32, "data")
    key = shaped((), jax.eval_shape(jax.random.key, 0).dtype)
    layers = networks.layers(network, params, words)
    yield functools.partial(sweep.gradient_pass, network), params, words, words
    yield scores, params, words, key
    yield selection, kernels(jnp.float32)
    yield step, params, kernels(bool), words, targets


def main(config: Config) -> None:
    """Compiles everything, from the smallest network to the largest."""
    flags.require(config)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(config.devices))
    planned = list(itertools.product(config.devices, config.sizes, config.layouts))
    with results.opened(config.output, config) as rows, report.progress() as bar:
        step = bar.add_task("", total=len(planned) * len(CALLS), completed=rows.count())
        for count, size, layout in planned:
            mesh = devices.mesh(max(2, math.isqrt(count)), jax.devices()[:count])
            for name, call in zip(CALLS, calls(SIZES[size], layout, mesh, config), strict=True):
                keys = {"devices": count, "size": size, "layout": layout, "call": name}
                if not rows.count(**keys):
                    bar.update(step, description=f"{size} on {count} devices, spread by {layout}: {name}")
                    with jax.set_mesh(mesh):
                        found, seconds = sweep.clocked(devices.account, *call, compiled=True)
                    rows.add(keys | found._asdict() | {"seconds": seconds})
                    bar.advance(step)
    frame = rows.frame()
    figure(frame, config.output / "scale.png")
    megabytes = {f"{name} (MB)": frame[name] / 1e6 for name in ("arguments", "temporary", "output", "moved")}
    products = frame["multiply_adds"]
    frame["of a gradient"] = products / products.where(frame["call"] == CALLS[0]).ffill()
    formats = dict.fromkeys(("devices", "size", "layout", "call"), "{}") | dict.fromkeys(megabytes, "{:,.0f}")
    formats |= {"of a gradient": "{:.2f}", "seconds": "{:.0f}"}
    table = report.plain("of each device, by the compiler", frame.assign(**megabytes), formats)
    report.console().print(table, f"results.csv, config.json and scale.png are in {config.output}/")


def figure(frame: pd.DataFrame, path: Path) -> None:
    """The bytes of a device for each call, a panel for each size and number of devices."""
    groups = frame.groupby(["devices", "size"], sort=False)
    canvas, axes = plt.subplots(1, len(groups), figsize=(11, 4), layout="constrained", squeeze=False)
    for axis, ((count, size), chosen) in zip(axes.flat, groups, strict=True):
        parts = chosen.set_index(chosen["call"] + "\n" + chosen["layout"])[["arguments", "temporary", "output"]] / 1e9
        parts[::-1].plot.barh(stacked=True, ax=axis, color=report.COLOURS[4:7], legend=False)
        axis.set(title=f"{size}, {count} devices", xlabel="GB a device", ylabel="")
        axis.tick_params("y", labelsize="x-small", labelleft=axis is axes[0, 0])
    report.save(canvas, path, ncols=3)


if __name__ == "__main__":
    results.command(Config, main, __doc__)
