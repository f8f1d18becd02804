"""What pruning frees: smaller networks, sparse kernels, files, programs, and a report of what it all saves."""

from ecjax.compact.exports import export
from ecjax.compact.features import drop_inputs, inputs_read
from ecjax.compact.files import Examples, Saved, load, save
from ecjax.compact.fold import compact, fold
from ecjax.compact.forms import Form, Report
from ecjax.compact.measure import report
from ecjax.compact.sparse import Sparse, forward, to_sparse

__all__ = [
    "Examples",
    "Form",
    "Report",
    "Saved",
    "Sparse",
    "compact",
    "drop_inputs",
    "export",
    "fold",
    "forward",
    "inputs_read",
    "load",
    "report",
    "save",
    "to_sparse",
]
