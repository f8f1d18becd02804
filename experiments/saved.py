"""Pruned networks on disk: each as one safetensors file, and what it saves as ``report.csv``."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from ecjax import compact
from ecjax.compact.measure import BATCHES
from ecjax.networks import Params
from experiments import runs
from experiments.rows import Rows


def _numpy_gelu(z: np.ndarray) -> np.ndarray:
    """Flax's default, the approximation by tanh."""
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


# By name: for JAX, and for NumPy alone.
ACTIVATIONS = {
    "relu": (nn.relu, lambda z: np.maximum(z, 0)),
    "tanh": (jnp.tanh, np.tanh),
    "gelu": (nn.gelu, _numpy_gelu),
}


FORMS = ("dense", "compacted", "sparse")
_FACTS = {"parameters": int, "nonzeros": int, "bytes": int, "multiply_adds": int}
_TIMES = {f"microseconds_batch_{batch}": float for batch in BATCHES}


class Folder:
    """Collects pruned networks in a folder; each and its rows of the report are written at once."""

    def __init__(
        self,
        path: Path,
        activation: str,
        methods: Iterable[str],
        sparsities: Iterable[float],
        config: Any,
        **facts: Any,
    ):
        """Goes on where an earlier start with the same configuration was (see ``runs.claim``)."""
        runs.claim(path, config, **facts)
        self.path, self.activation = path, activation
        forms = [{"name": name, "runtime": runtime} for runtime in ("JAX", "NumPy") for name in FORMS]
        plan = [
            [{"method": method, "sparsity": float(sparsity), "seed": 0} | form for form in forms]
            for method, sparsity in itertools.product(methods, sparsities)
        ]
        self.rows = Rows(path / "report.csv", plan, _FACTS | _TIMES)

    def has(self, method: str, sparsity: float, seed: int = 0) -> bool:
        """Whether a network is saved, and reported if it is the first."""
        return self._place(method, sparsity, seed).exists() and self.rows.has(method=method, sparsity=sparsity)

    def add(self, method: str, sparsity: float, params: Params, first_seed: int = 0) -> None:
        """Saves the networks stacked along the leading axis of ``params``, and measures the first of them."""
        jax_form, numpy_form = ACTIVATIONS[self.activation]
        for offset in range(len(jax.tree.leaves(params)[0])):
            one = jax.tree.map(lambda leaf, offset=offset: np.asarray(leaf[offset]), params)
            seed = first_seed + offset
            compact.save(self._place(method, sparsity, seed), compact.compact(one, jax_form), self.activation)
            if seed or self.rows.has(method=method, sparsity=sparsity):
                continue
            unit = []
            for form in compact.report(one, jax_form, numpy_activation=numpy_form):
                times = {f"microseconds_batch_{batch}": 1e6 * seconds for batch, seconds in form.seconds.items()}
                unit.append({"method": method, "sparsity": sparsity, "seed": seed} | form._asdict() | times)
            self.rows.add(unit)

    def _place(self, method: str, sparsity: float, seed: int) -> Path:
        return self.path / f"{method.replace(' ', '-').replace(',', '')}-{sparsity:g}-{seed}.safetensors"

    def finish(self) -> Table:
        """The report of the highest sparsity as a table."""
        frame = self.rows.frame()
        highest = frame[frame["sparsity"] == frame["sparsity"].max()]
        table = Table(title=f"sparsity {frame['sparsity'].max():g}; every network and report.csv are in {self.path}/")
        for column in ("method", "form", "parameters", "non-zeros", "bytes", "multiply-adds", "µs, batch 1", "µs, 256"):
            table.add_column(column, justify="left" if column in ("method", "form") else "right")
        for row in highest.itertuples():
            numbers = (row.parameters, row.nonzeros, row.bytes, row.multiply_adds)
            times = (row.microseconds_batch_1, row.microseconds_batch_256)
            last = row.runtime == "NumPy" and row.name == "sparse"
            cells = [f"{number:,}" for number in numbers] + [f"{time:.0f}" for time in times]
            table.add_row(row.method, f"{row.name}, {row.runtime}", *cells, end_section=last)
        return table
