"""What forms of one network take, side by side: a table."""

from collections.abc import Iterable
from typing import NamedTuple

from ecjax.graph import Flops, tables

_FASTER = 0.95  # of the dense network's time; what takes more is within what a machine's time varies by


class Form(NamedTuple):
    """One form of a network, and what it takes.

    Attributes:
        name: "dense", "compacted" or "sparse" (the compacted network's kernels as BCSR or CSR).
        runtime: "JAX", jitted, or "NumPy" (with SciPy for the sparse kernels).
        parameters: numbers in its arrays.
        nonzeros: of these.
        bytes: on disk: arrays as they are for "dense", the file of ``save`` for the others.
        flops: floating-point operations for one sample (``graph.count_flops``); for "sparse", of its products those
            with entries that are not zero.
        seconds: median time of a call, by the number of samples.

    Example:
        >>> form = compact.Form("dense", "JAX", 58, nonzeros=34, bytes=232, flops=graph.Flops(96), seconds={1: 2e-5})
        >>> form.bytes / form.parameters
        4.0
    """

    name: str
    runtime: str
    parameters: int
    nonzeros: int
    bytes: int
    flops: Flops
    seconds: dict[int, float]


class Report(tuple[Form, ...]):
    """Forms of one network: a tuple that prints as a table, in color where rich prints it, and shows as one in Jupyter.

    Attributes:
        difference: the greatest difference between the outputs of the two networks, on a few samples.
        greatest: the greatest output of the first one for these.

    Example:
        >>> forms = [
        ...     compact.Form("dense", "JAX", 2000, 200, 8000, graph.Flops(4000, 10), {1: 5e-5, 256: 8e-4}),
        ...     compact.Form("compacted", "JAX", 1000, 200, 900, graph.Flops(2000, 8), {1: 5e-5, 256: 4e-4}),
        ... ]
        >>> compact.Report(forms, difference=2e-7, greatest=3.0)
        form            parameters  not zero  bytes  FLOPs        µs, 1 sample  µs, 256 samples
        ───────────────────────────────────────────────────────────────────────────────────────
        dense, JAX      2,000       200       8,000  4,010        50            800
        compacted, JAX  1,000       200       900    2,008 (50%)  50            400 (2.0×)
        The outputs differ by up to 2e-07, where they reach 3.
        No faster than dense, by the number of samples: compacted, JAX (1).
    """

    difference: float
    greatest: float

    def __new__(cls, forms: Iterable[Form], *, difference: float = 0.0, greatest: float = 0.0):
        """Forms, and how far their outputs are apart."""
        made = super().__new__(cls, forms)
        made.difference, made.greatest = difference, greatest
        return made

    def __repr__(self) -> str:
        """The table, and what it does not show."""
        return "\n".join([tables.as_text(_cells(self)), *_notes(self)])

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """The table in Jupyter."""
        return tables.as_html(_cells(self), _notes(self))

    def __rich__(self):
        """The table where rich prints it."""
        return tables.as_rich(_cells(self), _notes(self))


def _cells(report: Report) -> list[tuple[str, ...]]:
    counts = list(report[0].seconds) if report else []
    times = [f"µs, {count} sample{'s' if count != 1 else ''}" for count in counts]
    rows = [("form", "parameters", "not zero", "bytes", "FLOPs", *times)]
    for form in report:
        dense = _dense(report, form)
        numbers = (f"{form.parameters:,}", f"{form.nonzeros:,}", f"{form.bytes:,}", _flops(form, dense))
        rows.append((f"{form.name}, {form.runtime}", *numbers, *(_time(form, dense, count) for count in counts)))
    return rows


def _dense(report: Report, form: Form) -> Form:
    """What a form is compared with: the dense network in the same runtime."""
    return next((other for other in report if (other.name, other.runtime) == ("dense", form.runtime)), form)


def _flops(form: Form, dense: Form) -> str:
    if form is dense or not dense.flops.total:
        return str(form.flops)
    return f"{form.flops} ({form.flops.total / dense.flops.total:.0%})"


def _time(form: Form, dense: Form, count: int) -> str:
    seconds = form.seconds[count]
    faster = "" if form is dense else f" ({dense.seconds[count] / seconds:.1f}×)"
    return f"{1e6 * seconds:,.0f}{faster if _is_faster(form, dense, count) else ''}"


def _is_faster(form: Form, dense: Form, count: int) -> bool:
    return form.seconds[count] < _FASTER * dense.seconds[count]


def _notes(report: Report) -> list[str]:
    notes = [f"The outputs differ by up to {report.difference:.2g}, where they reach {report.greatest:.2g}."]
    if len(report) > 1 and report[1].parameters > report[0].parameters:
        notes.append("The first network is the smaller one: was the second given in its place?")
    slow = [words for form in report for words in _slow(form, _dense(report, form))]
    if slow:
        notes.append(f"No faster than dense, by the number of samples: {'; '.join(slow)}.")
    unknown = sorted({name for form in report for name in form.flops.unknown})
    if unknown:
        notes.append(f"FLOPs are the least there are: {', '.join(unknown)} may take more.")
    return notes


def _slow(form: Form, dense: Form) -> list[str]:
    """For how many samples a form is no faster than the dense network, in words."""
    counts = [count for count in form.seconds if form is not dense and not _is_faster(form, dense, count)]
    return [f"{form.name}, {form.runtime} ({' and '.join(map(str, counts))})"] if counts else []
