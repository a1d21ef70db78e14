"""Rows of a file of comma- or tab-separated values with a header (RFC 4180); all are texts."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from engine.errors import InvalidRequest
from recipes.data.rows import Place, Row, at
from rollout.offline import decode_text, open_text

_BOM = "\ufeff"


def csv_rows(path: Path, *, field: str) -> Iterator[Row]:
    """The records of a file, plain or gzip, in order; `.tsv` in its name makes the separator a tab.
    A record may run over several lines in quotes, and stands where it begins.

    Raises InvalidRequest naming `field`, file and line for a record with more or fewer fields than
    the header, a name that the header has twice, broken quotes, and text that is not UTF-8.
    """
    with open_text(path, field=field, of="comma-separated values") as file:
        header: list[str] | None = None
        for place, cells in _records(path, file, field):
            if header is None:
                header = _checked_header(place, cells, field)
                continue
            if len(cells) != len(header):
                raise at(
                    place,
                    f"has {len(cells)} fields and the header {len(header)}; put fields with "
                    "separators or line ends into double quotes",
                    field=field,
                )
            yield Row(place=place, columns=dict(zip(header, cells, strict=True)))


def _records(path: Path, file: BinaryIO, field: str) -> Iterator[tuple[Place, list[str]]]:
    """The records that are not blank."""
    separator = "\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes) else ","
    reader = csv.reader(_decoded(path, file, field), delimiter=separator, strict=True)
    while True:
        place = Place(path, reader.line_num + 1, "line")
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise at(
                place,
                f"is no record of separated values ({error}); close its quotes, double those "
                "inside a field, and give long texts as jsonl or parquet",
                field=field,
            ) from error
        if cells:
            yield place, cells


def _decoded(path: Path, file: BinaryIO, field: str) -> Iterator[str]:
    for number, raw in enumerate(file, start=1):
        try:
            text = decode_text(raw)
        except InvalidRequest as error:
            raise at(Place(path, number, "line"), error.message, field=field) from error
        yield text.removeprefix(_BOM) if number == 1 else text


def _checked_header(place: Place, names: Sequence[str], field: str) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise at(place, f"the header has {twice[0]!r} twice; rename one", field=field)
    return list(names)
