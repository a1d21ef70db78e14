"""Parquet and Arrow files, whole and broken."""

from __future__ import annotations

import datetime
import random
import sys
from pathlib import Path
from typing import Any

import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from engine.errors import InvalidRequest  # noqa: E402
from recipes.data import arrow_rows as readers  # noqa: E402
from recipes.data.arrow_rows import arrow_rows, parquet_rows  # noqa: E402

NESTED = [
    {"prompt": [{"role": "user", "content": "1+1="}], "extra": {"index": 0, "tags": ["a", None]}},
    {"prompt": [{"role": "user", "content": "2+2="}], "extra": None},
]


def write(path: Path, table: Any, kind: str) -> Path:
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=2)
        return path
    make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def reader(kind: str) -> Any:
    return parquet_rows if kind == "parquet" else arrow_rows


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_rows_are_numbered_over_groups_and_batches(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BATCH_ROWS", 3)
    day = datetime.date(2026, 1, 1)
    table = pa.table({"q": [f"q{i}" for i in range(7)], "n": range(7), "day": [day] * 7})
    path = write(tmp_path / "t", table, kind)
    rows = list(reader(kind)(path, field="task"))
    assert [row.columns["q"] for row in rows] == [f"q{i}" for i in range(7)]
    assert rows[6].columns == {"q": "q6", "n": 6, "day": day}
    assert [str(row.place) for row in rows] == [f"{path} row {n}" for n in range(1, 8)]


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_nested_columns_are_plain_objects(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "t", pa.Table.from_pylist(NESTED), kind)
    assert [row.columns for row in reader(kind)(path, field="task")] == NESTED


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_file_that_is_cut_off(tmp_path: Path, kind: str, part: float) -> None:
    table = pa.table({"q": [f"question {i}" for i in range(2000)]})
    path = write(tmp_path / "t", table, kind)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(InvalidRequest, match=r"t: cannot be read: .*write it again") as caught:
        list(reader(kind)(path, field="task"))
    assert caught.value.field == "task"


def test_text_that_is_no_utf8_has_a_row(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"b\xe9d"], pa.binary()).cast(pa.binary()).view(pa.string())
    path = write(tmp_path / "t", pa.table({"q": raw}), "stream")
    with pytest.raises(InvalidRequest, match=r"t row 2: cannot be read: .*UTF8"):
        list(arrow_rows(path, field="task"))


def test_nanoseconds_are_cut_to_what_python_knows(tmp_path: Path) -> None:
    columns = {
        "at": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns")),
        "took": pa.array([1_500], pa.duration("ns")),
    }
    row = next(arrow_rows(write(tmp_path / "t", pa.table(columns), "stream"), field="task"))
    assert row.columns["at"].microsecond == 123456
    assert row.columns["took"] == datetime.timedelta(microseconds=1)


@pytest.mark.parametrize("kind", ["parquet", "stream"])
def test_bytes_that_were_changed_are_an_error_or_other_rows(tmp_path: Path, kind: str) -> None:
    """Offsets that lead out of the file would else end the process."""
    table = pa.table({"q": [f"q{i}" for i in range(50)], "tags": [["a", "b"]] * 50})
    path = write(tmp_path / "t", table, kind)
    whole, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(3):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(bytes(data))
        try:
            list(reader(kind)(path, field="task"))
        except InvalidRequest:
            refused += 1
    assert refused


def test_a_name_that_is_there_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["q", "q"])
    for kind in ("parquet", "stream"):
        path = write(tmp_path / kind, table, kind)
        with pytest.raises(InvalidRequest, match="the column 'q' twice"):
            list(reader(kind)(path, field="task"))


@pytest.mark.parametrize("kind", ["parquet", "stream"])
def test_a_missing_file_and_a_missing_library(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequest, match="task: no file at"):
        list(reader(kind)(tmp_path / "none", field="task"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InvalidRequest, match=r"pyarrow package: pip install -e '\.\[data\]'"):
        list(reader(kind)(tmp_path / "none", field="task"))
