"""What pruning frees: dead neurons folded away, sparse kernels, one small file, and a report of what it all saves."""

from ecjax.compact.files import Saved, load, save
from ecjax.compact.fold import compact, drop_inputs, inputs_read, widths
from ecjax.compact.measure import Form, report
from ecjax.compact.sparse import forward, to_sparse

__all__ = [
    "Form",
    "Saved",
    "compact",
    "drop_inputs",
    "forward",
    "inputs_read",
    "load",
    "report",
    "save",
    "to_sparse",
    "widths",
]
