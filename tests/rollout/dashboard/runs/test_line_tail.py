"""Lines of a file that grows, is cut, is replaced, or is no file of lines at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.errors import InvalidRequest
from rollout.dashboard.runs import line_tail
from rollout.dashboard.runs.line_tail import LineTail


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lines"


def add(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_a_half_written_line_waits_for_its_end(path: Path) -> None:
    tail = LineTail(path)
    assert tail.look().lines == []
    add(path, b'{"a": 1}\n\n{"b"')
    found = tail.look()
    assert (found.lines, found.starts, found.anew) == ([b'{"a": 1}'], [0], False)
    assert tail.look().lines == []
    add(path, b": 2}\n")
    found = tail.look()
    assert (found.lines, found.starts) == ([b'{"b": 2}'], [10])
    assert tail.read_at(10) == b'{"b": 2}' and tail.read_at(0) == b'{"a": 1}'
    assert tail.read_at(19) is None


@pytest.mark.parametrize("data", [b"x\n", b"other\nlines\nand more of them\n"])
def test_a_file_that_is_replaced_or_written_anew_is_read_from_its_beginning(
    path: Path, data: bytes
) -> None:
    path.write_bytes(b"one\ntwo\n")
    tail = LineTail(path)
    assert len(tail.look().lines) == 2
    for write in (lambda: path.write_bytes(data), lambda: _rename_over(path, data)):
        write()
        found = tail.look()
        assert found.anew and found.lines == data.split(b"\n")[:-1]
        add(path, b"tail\n")
        found = tail.look()
        assert not found.anew and found.lines == [b"tail"]


def _rename_over(path: Path, data: bytes) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(data)
    os.replace(other, path)


def test_a_file_that_goes_and_comes_back(path: Path) -> None:
    path.write_bytes(b"one\n")
    tail = LineTail(path)
    tail.look()
    path.unlink()
    assert tail.look().anew
    assert not tail.look().anew
    path.write_bytes(b"one\n")
    assert tail.look().lines == [b"one"]
    tail.close()


def test_a_line_without_an_end_is_passed_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_tail, "_BLOCK", 16)
    monkeypatch.setattr(line_tail, "LONGEST_LINE", 64)
    tail = LineTail(path)
    path.write_bytes(b"first\n" + b"x" * 200)
    assert tail.look().lines == [b"first"]
    add(path, b"x\nlast line of all\n")
    found = tail.look()
    assert found.lines == [b"last line of all"] and found.starts == [208]


def test_many_lines_come_in_one_look(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_tail, "_BLOCK", 7)
    path.write_bytes(b"".join(b"%d\n" % n for n in range(100)))
    found = LineTail(path).look()
    assert found.lines == [b"%d" % n for n in range(100)]
    data = path.read_bytes()
    assert [data[start:].partition(b"\n")[0] for start in found.starts] == found.lines


def test_what_is_no_file_is_refused_by_its_path(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(InvalidRequest, match=r"lines is no regular file") as caught:
        LineTail(path).look()
    assert caught.value.field == "run"


def test_a_long_file_comes_in_looks_of_some_bytes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_tail, "_BLOCK", 16)
    path.write_bytes(b"".join(b"%03d\n" % n for n in range(20)))
    tail, lines, looks = LineTail(path), [], []
    while not looks or looks[-1].more:
        looks.append(tail.look(most_bytes=32))
        lines += looks[-1].lines
    assert lines == [b"%03d" % n for n in range(20)]
    assert max(len(found.lines) for found in looks) == 8
