"""Separated values: each record stands where it begins, and broken ones are named there."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from engine.errors import InvalidRequest
from recipes.data.csv_rows import csv_rows


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_records_with_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    text = '\ufeffq,a\r\n"1, ""two""\nthree",4\r\n\r\nzwölf,12\r\n'
    rows = list(csv_rows(write(tmp_path / "t.csv", text), field="task"))
    assert [row.columns for row in rows] == [
        {"q": '1, "two"\nthree', "a": "4"},
        {"q": "zwölf", "a": "12"},
    ]
    assert [str(row.place) for row in rows] == [f"{tmp_path}/t.csv:2", f"{tmp_path}/t.csv:5"]


def test_gzip_and_tabs(tmp_path: Path) -> None:
    packed = write(tmp_path / "t.tsv.gz", gzip.compress(b"q\ta\n1,2\t3\n"))
    assert [row.columns for row in csv_rows(packed, field="task")] == [{"q": "1,2", "a": "3"}]


@pytest.mark.parametrize(
    "data,told",
    [
        ("q,a\n1,2\n3\n", r"t\.csv:3: has 1 fields and the header 2"),
        ("q,a\n1,2,3\n", r"t\.csv:2: has 3 fields"),
        ("q,a,q\n1,2,3\n", r"t\.csv:1: the header has 'q' twice"),
        ('q,a\n1,2\n"3,4\n', r"t\.csv:3: is no record.*unexpected end"),
        ('q,a\n"1"x,2\n', r"t\.csv:2: is no record"),
        (b"q,a\n1,\xe9\n", r"t\.csv:2: byte 3 \(0xe9\) is not UTF-8"),
        (b"q,a\n1,\x00\n", r"t\.csv:2: holds a NUL"),
        ("q,a\n1,2\n".encode("utf-16"), r"t\.csv is UTF-16"),
        (b"PAR1....", r"t\.csv is a Parquet file; .*comma-separated"),
        (gzip.compress(b"q,a\n1,2\n" * 999, mtime=0)[:-20], "broken gzip"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(tmp_path: Path, data: str | bytes, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as caught:
        list(csv_rows(write(tmp_path / "t.csv", data), field="task"))
    assert caught.value.field == "task"


def test_a_field_too_large_for_the_reader(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "q,a\n" + "x" * 200_000 + ",1\n")
    with pytest.raises(InvalidRequest, match=r"t\.csv:2: .*larger than field limit.*parquet"):
        list(csv_rows(path, field="task"))
