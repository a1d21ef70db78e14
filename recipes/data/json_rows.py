"""Rows of a file of JSON objects, one a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine.errors import InvalidRequest
from recipes.data.rows import Place, Row, at
from rollout.offline import check_line, read_lines


def json_rows(path: Path, *, field: str) -> Iterator[Row]:
    """The objects of a file, plain or gzip, in order.

    Raises InvalidRequest naming `field`, file and line for what is no object of JSON in UTF-8.
    """
    for line in read_lines(path, field=field):
        place = Place(path, line.number, "line")
        try:
            columns = check_line(line)
        except InvalidRequest as error:
            raise at(place, error.message, field=field) from error
        yield Row(place=place, columns=columns)
