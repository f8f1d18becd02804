"""Finished rows in a csv file: written at once, read back when a run goes on, and held to what the run asks for."""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

# Keys by column, and after them values by column.
Line = Mapping[str, Any]


class Rows:
    """The finished rows of a run, in memory and on disk.

    Rows come in units: what is computed together is written together, and an incomplete unit is computed again. The
    plan names all units beforehand, so reading is comparing: a line that does not start with the planned keys, or is
    not what would be written for its values, is refused.

    Units are appended and synced; the file is not replaced. So a killed run loses no unit but the one it was at, the
    file can be followed while it grows, and a last line that was cut off shows by its missing end.
    """

    def __init__(self, path: Path, plan: Sequence[Sequence[Line]], values: Mapping[str, type[int] | type[float]]):
        """Reads the file if there is one.

        Args:
            path: of the csv file.
            plan: the keys of each row of each unit, in the order in which they are computed.
            values: the columns after the keys: whole numbers, or floats, which may be missing.

        Raises:
            SystemExit: a file that is no beginning of these rows, or that cannot be written to.
        """
        self.path, self.values = path, values
        self.plan = [[dict(keys) for keys in unit] for unit in plan]
        self.columns = [*self.plan[0][0], *values]
        self._rows: list[dict[str, Any]] = []
        self._finished, self._bytes = 0, 0
        if path.exists():
            self._read()

    def count(self, **keys: Any) -> int:
        """How many finished rows have these keys."""
        return sum(_match(row, keys) for row in self._rows)

    def planned(self, **keys: Any) -> int:
        """How many rows have these keys in the end."""
        return sum(_match(row, keys) for unit in self.plan for row in unit)

    def has(self, **keys: Any) -> bool:
        """Whether rows with these keys are finished."""
        return self.count(**keys) > 0

    def frame(self) -> pd.DataFrame:
        """All finished rows."""
        return pd.DataFrame(self._rows, columns=self.columns)

    def add(self, unit: Sequence[Line]) -> None:
        """Appends the rows of the next unit, which are on disk when this returns; a finished unit stays as it is.

        Args:
            unit: the keys and values of each row; a float may be left out or None.

        Raises:
            ValueError: not the unit that is next in the plan.
            SystemExit: another process has written to the file.
            OSError: the disk is full, or fails.
        """
        keys = [{name: row[name] for name in self.plan[0][0]} for row in unit]
        if keys in self.plan[: self._finished]:
            return
        if keys not in self.plan[self._finished : self._finished + 1]:
            raise ValueError(f"these are not the rows that the plan has next: {keys}")
        rows = [
            its_keys | {name: self._value(name, row.get(name)) for name in self.values}
            for its_keys, row in zip(keys, unit, strict=True)
        ]
        header = "" if self._bytes else _encoded(self.columns)
        self._append(header + "".join(_encoded(row.values()) for row in rows))
        self._rows += rows
        self._finished += 1

    def _value(self, name: str, value: Any) -> int | float:
        kind = self.values[name]
        return float("nan") if kind is float and value in (None, "") else kind(value)

    def _append(self, lines: str) -> None:
        with self.path.open("ab") as file:
            if file.tell() != self._bytes:
                raise SystemExit(f"another process writes to {self.path}: wait for it or stop it, and start again")
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
            self._bytes = file.tell()

    def _read(self) -> None:
        """Takes over the complete units, and cuts off what comes after them."""
        try:
            with self.path.open("r+b") as file:
                lines = file.read().split(b"\n")[:-1]  # what has no line end was cut off
                self._take_over(lines)
                self._bytes = sum(len(line) + 1 for line in lines[: len(self._rows) + 1]) if self._rows else 0
                file.truncate(self._bytes)
        except OSError as error:
            raise SystemExit(f"{self.path} cannot be read and written: {error.strerror}") from error

    def _take_over(self, lines: list[bytes]) -> None:
        header = _encoded(self.columns).rstrip("\n")
        if lines and lines[0].decode(errors="replace") != header:
            raise self._refused(1, f"is not {header}")
        keys = [keys for unit in self.plan for keys in unit]
        if len(lines) > len(keys) + 1:
            raise self._refused(len(keys) + 2, f"is one row more than the {len(keys)} that were asked for")
        found = [self._parsed(number, *given) for number, given in enumerate(zip(lines[1:], keys, strict=False), 2)]
        for unit in self.plan:
            if len(self._rows) + len(unit) > len(found):
                break
            self._rows += found[len(self._rows) : len(self._rows) + len(unit)]
            self._finished += 1

    def _parsed(self, number: int, line: bytes, keys: dict[str, Any]) -> dict[str, Any]:
        text, start = line.decode(errors="replace"), _encoded(keys.values()).rstrip("\n") + ","
        if not text.startswith(start):
            raise self._refused(number, f"does not start with {start}")
        try:
            cells = zip(self.values, text.removeprefix(start).split(","), strict=True)
            row = keys | {name: self._value(name, cell) for name, cell in cells}
        except ValueError as error:
            raise self._refused(number, f"does not hold {', '.join(self.values)}") from error
        if _encoded(row.values()) != text + "\n":
            raise self._refused(number, "holds numbers as this program does not write them")
        return row

    def _refused(self, number: int, what: str) -> SystemExit:
        return SystemExit(
            f"line {number} of {self.path} {what}: the file is damaged or from elsewhere. Cut it off before that line "
            "to go on from there, or delete its folder to start afresh"
        )


def _match(row: Line, keys: Mapping[str, Any]) -> bool:
    return all(row[name] == key for name, key in keys.items())


def _encoded(cells: Iterable[Any]) -> str:
    """A line of csv; floats as their repr, which reads back exactly, and NaN as nothing."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(["" if cell != cell else cell for cell in cells])
    return text.getvalue()
