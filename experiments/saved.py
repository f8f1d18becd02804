"""Pruned networks on disk: each as one safetensors file, and what it saves as ``report.csv``."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from rich.table import Table

from ecjax import compact
from ecjax.networks import Params


def _numpy_gelu(z: np.ndarray) -> np.ndarray:
    """Flax's default, the approximation by tanh."""
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


# By name: for JAX, and for NumPy alone.
ACTIVATIONS = {
    "relu": (nn.relu, lambda z: np.maximum(z, 0)),
    "tanh": (jnp.tanh, np.tanh),
    "gelu": (nn.gelu, _numpy_gelu),
}


class Folder:
    """Collects pruned networks in a folder; the report is written after each, so nothing is lost."""

    def __init__(self, path: Path, activation: str):
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.activation, self.rows = path, activation, []

    def add(self, method: str, sparsity: float, params: Params, first_seed: int = 0) -> None:
        """Saves the networks stacked along the leading axis of ``params``, and measures the first of them."""
        jax_form, numpy_form = ACTIVATIONS[self.activation]
        for offset in range(len(jax.tree.leaves(params)[0])):
            one = jax.tree.map(lambda leaf, offset=offset: np.asarray(leaf[offset]), params)
            seed = first_seed + offset
            name = f"{method.replace(' ', '-').replace(',', '')}-{sparsity:g}-{seed}.safetensors"
            compact.save(self.path / name, compact.compact(one, jax_form), self.activation)
            if seed:
                continue
            for form in compact.report(one, jax_form, numpy_activation=numpy_form):
                times = {f"microseconds_batch_{batch}": 1e6 * seconds for batch, seconds in form.seconds.items()}
                facts = {name: value for name, value in form._asdict().items() if name != "seconds"}
                self.rows.append({"method": method, "sparsity": sparsity, "seed": seed, **facts, **times})
        pd.DataFrame(self.rows).to_csv(self.path / "report.csv", index=False)

    def finish(self) -> Table:
        """The report of the highest sparsity as a table."""
        frame = pd.DataFrame(self.rows)
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
