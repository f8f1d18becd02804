"""Pruned networks on disk: each as one safetensors file, and what it saves as ``report.csv``."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from rich.table import Column, Table

from ecjax import compact
from ecjax.networks import Params
from experiments import results


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
    """Collects pruned networks in a folder; each and its rows of the report are written at once."""

    def __init__(self, path: Path, activation: str, task: Any, config: Any, **facts: Any):
        """Goes on where an earlier start with the same configuration was (see ``results.claim``)."""
        results.claim(path, config, **facts)
        self.path, self.activation, self.rows = path, activation, results.Rows(path / "report.csv")
        self.network, self.inputs = task.network, jnp.asarray(task.data.train_inputs[:256])

    def has(self, method: str, sparsity: float, seed: int) -> bool:
        """Whether a network is saved, and reported if it is the first."""
        last = {"method": method, "sparsity": sparsity, "name": "sparse", "runtime": "NumPy"}
        return self._place(method, sparsity, seed).exists() and (seed > 0 or self.rows.has(**last))

    def add(self, params: Params, method: str, sparsity: float, seed: int) -> None:
        """Saves a network, and measures it if it is the first of its method and sparsity."""
        jax_form, numpy_form = ACTIVATIONS[self.activation]
        smaller, small = compact.compact(self.network, params, self.inputs)
        compact.save(self._place(method, sparsity, seed), small, network=smaller, inputs=self.inputs)
        if seed or self.has(method, sparsity, seed):
            return
        for form in compact.report(self.network, params, self.inputs, jax_form, numpy_activation=numpy_form):
            row = {"method": method, "sparsity": sparsity, "seed": seed} | form._asdict()
            times = {f"microseconds_batch_{batch}": 1e6 * seconds for batch, seconds in row.pop("seconds").items()}
            if not self.rows.has(method=method, sparsity=sparsity, name=form.name, runtime=form.runtime):
                self.rows.add(row | times)

    def _place(self, method: str, sparsity: float, seed: int) -> Path:
        return self.path / f"{method.replace(' ', '-').replace(',', '')}-{sparsity:g}-{seed}.safetensors"

    def finish(self) -> Table:
        """The report of the highest sparsity as a table."""
        frame = self.rows.frame().query("sparsity == sparsity.max()")
        title = f"sparsity {frame['sparsity'].iloc[0]:g}; every network and report.csv are in {self.path}/"
        numbers = ("parameters", "non-zeros", "bytes", "multiply-adds", "µs, batch 1", "µs, 256")
        table = Table("method", "form", *(Column(name, justify="right") for name in numbers), title=title)
        names = ["parameters", "nonzeros", "bytes", "multiply_adds", "microseconds_batch_1", "microseconds_batch_256"]
        for method, form, runtime, *values in frame[["method", "name", "runtime", *names]].itertuples(index=False):
            cells = (f"{value:,.0f}" for value in values)
            table.add_row(method, f"{form}, {runtime}", *cells, end_section=(form, runtime) == ("sparse", "NumPy"))
        return table
