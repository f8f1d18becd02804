"""What scoring costs, in plain gradient passes over the same samples: ``python -m experiments.benchmark``.

All candidates run in turn, round after round, so that a slow moment of the machine hits them alike; what is shown is
the ratio of the medians. Compilation is not counted.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import optax
import tyro
from rich.progress import track
from rich.table import Table

from ecjax import networks, score
from experiments import report


@dataclass(frozen=True)
class Config:
    """Time the criteria against a plain gradient pass over the same samples."""

    widths: tuple[int, ...] = (784, 300, 100, 10)
    """Widths of all layers, inputs first."""
    samples: int = 20_000
    """Calibration samples."""
    rounds: int = 15
    """How many times each candidate runs."""


def main(config: Config) -> None:
    """Runs the benchmark and prints the table."""
    seconds = measure(candidates(config), config.rounds)
    gradient = seconds["gradient pass"]
    layers = "-".join(map(str, config.widths))
    table = Table(title=f"MLP {layers}, {config.samples:,} samples, {jax.devices()[0].device_kind}")
    table.add_column("one call")
    table.add_column("median (ms)", justify="right")
    table.add_column("gradient passes", justify="right")
    for name, median in seconds.items():
        table.add_row(name, f"{1000 * median:.1f}", f"{median / gradient:.2f}")
    report.console().print(table)


def candidates(config: Config) -> dict[str, Callable[[], object]]:
    """What is timed, by name; each call starts from arrays and ends in arrays."""
    mlp = networks.MLP(config.widths[1:])
    network = networks.pure(mlp)
    inputs = jax.random.uniform(jax.random.key(0), (config.samples, config.widths[0]))
    labels = jax.random.randint(jax.random.key(1), (config.samples,), 0, config.widths[-1])
    params = mlp.init(jax.random.key(2), inputs[:1])["params"]

    def loss(params, inputs, labels):
        return optax.softmax_cross_entropy_with_integer_labels(network(params, inputs), labels).mean()

    forward, gradient = jax.jit(network), jax.jit(jax.grad(loss))
    key = jax.random.key(3)
    return {
        "forward pass": lambda: forward(params, inputs),
        "gradient pass": lambda: gradient(params, inputs, labels),
        "optimal brain damage": lambda: score.optimal_brain_damage(network, params, inputs),
        "EC (Euclidean)": lambda: score.elimination_compensation(network, params, inputs),
        "EC (Fisher)": lambda: score.elimination_compensation(network, params, inputs, metric="fisher"),
        "EC (Euclidean), 1 probe": lambda: score.elimination_compensation(network, params, inputs, probes=1, key=key),
    }


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call."""
    times = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in track(range(rounds), "timing", console=report.progress().console, transient=True):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(spent) for name, spent in times.items()}


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.benchmark", description=__doc__))
