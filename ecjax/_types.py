"""What the arguments of the library are, for signatures; ``networks`` says what they mean."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Float, Num, PyTree, Shaped

Params = PyTree
Kernels = PyTree
Inputs = Num[Array | np.ndarray, "samples *features"]
Network = Callable[[Params, Inputs], Array]
# Not checked against the samples of the inputs here: ``_checks.require_targets`` says it more clearly.
Targets = Shaped[Array | np.ndarray, "_samples *outputs"]
Weights = Float[Array | np.ndarray, "_samples *_positions"]
Loss = Callable[[Array, Array], Array]
Patterns = str | Iterable[str]
Sparsity = float | int | Float[Array, ""]
Sparsities = Sparsity | Mapping[str, Sparsity]  # of all kernels, or of those that each pattern of paths matches
Metric = Any  # a metric, or the name of one: the door says more clearly what is wrong with others
