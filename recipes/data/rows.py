"""What every reader gives: rows with a place, each a plain object of columns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from engine.errors import InvalidRequest

Unit = Literal["line", "row"]


class Place(NamedTuple):
    """Where a row stands; `str` gives it for people and editors, e.g. `sums.jsonl:3` or
    `train.parquet row 3`. number: from 1; of lines where the file is text, else of its rows."""

    path: Path
    number: int
    unit: Unit

    def __str__(self) -> str:
        return f"{self.path}:{self.number}" if self.unit == "line" else self._row()

    def _row(self) -> str:
        return f"{self.path} row {self.number}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of a data set, e.g. Row(place=..., columns={"question": "2+2?", "answer": 4}).

    columns: by name, what JSON has (text, numbers, lists, objects, null), and of Parquet and Arrow
    also dates, decimals and bytes.
    """

    place: Place
    columns: dict[str, Any]


def at(place: Place | Path, told: str, *, field: str) -> InvalidRequest:
    """The error that says what is wrong at a place; `field` is the option that names the data."""
    return InvalidRequest(f"{field}: {place}: {told}", field=field)
