"""Rows of cells as a table: in text, in HTML, and for rich."""

from collections.abc import Sequence
from typing import Any

Cells = Sequence[Sequence[str]]


def as_text(cells: Cells) -> str:
    """A table for a terminal: the header, a rule, and a line for each row."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])


def as_html(cells: Cells, notes: Sequence[str] = ()) -> str:
    """A table for Jupyter, and sentences below it."""
    header, *rows = cells
    below = "".join(f"<p>{_escaped(note)}</p>" for note in notes)
    return f"<table>{_line('th', header)}{''.join(_line('td', row) for row in rows)}</table>{below}"


def as_rich(cells: Cells, notes: Sequence[str] = ()) -> Any:
    """A table for rich, which is installed where this is called: the first column on the left, numbers on the right."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    (first, *others), *rows = cells
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(Text(first))
    for name in others:
        table.add_column(Text(name), justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    return Group(table, *map(Text, notes))


def _line(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{_escaped(cell)}</{tag}>' for cell in cells)}</tr>"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
