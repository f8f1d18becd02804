"""Rows of cells as a table, in text and in HTML."""

from collections.abc import Sequence

Cells = Sequence[Sequence[str]]


def as_text(cells: Cells) -> str:
    """A table for a terminal: the header, a rule, and a line for each row."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])


def as_html(cells: Cells) -> str:
    """A table for Jupyter."""
    header, *rows = cells
    return f"<table>{_line('th', header)}{''.join(_line('td', row) for row in rows)}</table>"


def _line(tag: str, cells: Sequence[str]) -> str:
    escaped = (cell.replace("&", "&amp;").replace("<", "&lt;") for cell in cells)
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in escaped)}</tr>"
