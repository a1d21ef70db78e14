"""One reader of lines: what ends a line, what is read, and what is said of the rest."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import msgspec
import pytest

from engine.errors import InvalidRequest
from rollout.files.jsonl import check_line, parse_line, read_lines

SEPARATORS = ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"]


class Pair(msgspec.Struct, frozen=True):
    name: str
    size: int


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def pairs(path: Path) -> list[tuple[int, Pair]]:
    lines = read_lines(path, field="input")
    return [
        (line.number, parse_line(line, Pair, field="input", example="a pair")) for line in lines
    ]


def refusal(path: Path) -> str:
    with pytest.raises(InvalidRequest) as caught:
        pairs(path)
    assert caught.value.field == "input"
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("packed", [False, True])
def test_only_newlines_end_a_line(tmp_path: Path, end: str, bom: bytes, packed: bool) -> None:
    names = [f"a{separator}b" for separator in SEPARATORS]
    rows = [json.dumps({"name": name, "size": 1}, ensure_ascii=False) for name in names]
    data = bom + (end.join(rows) + end).encode()
    path = write(tmp_path / "in.jsonl", gzip.compress(data) if packed else data)
    # JSON has control characters escaped, and the rest as they are: only the latter could split.
    assert [found.name for _, found in pairs(path)] == names


def test_numbers_are_those_of_an_editor(tmp_path: Path) -> None:
    row = b'{"name": "a", "size": 1}'
    path = write(tmp_path / "in", b"\n" + row + b"\n \t\r\n" + b"\xef\xbb\xbf" + row)
    assert [number for number, _ in pairs(path)] == [2, 4]
    assert [line.ended for line in read_lines(path, field="input")] == [True, False]


ROW = b'{"name": "a", "size": 1}\n'


@pytest.mark.parametrize(
    "line,told",
    [
        (b'{"name": "\xe9", "size": 1}', r"byte 11 \(0xe9\) is not UTF-8.*iconv"),
        (b'{"name": "a\x00", "size": 1}', "NUL.*UTF-8"),
        (b"name, size", "not JSON at character 1.*one JSON object a line"),
        (b"{", "whole on one line"),
        (b'{"name": "a",', "whole on one line"),
        (b'{"name": "a", "size": 1}{"name": "b", "size": 1}', "one object a line"),
        (b'[{"name": "a", "size": 1}]', r"is a list.*jq -c '\.\[\]'"),
        (b'"a"', "is str, no object"),
        (b"null", "NoneType"),
        (b'{"name": "a", "name": "b", "size": 1}', "'name' is there twice"),
        (b'{"name": "a", "size": 1, "x": [{"y": 1, "y": 2}]}', "'y' is there twice"),
        (b'{"name": "a", "size": NaN}', "NaN is no number of JSON"),
        (b'{"name": "a"}', "missing required field `size`; each line is a pair"),
        (b'{"name": 1, "size": 1}', r"\$\.name.*; each line is a pair"),
        (b'{"name": "a", "size": true}', r"\$\.size.*; each line is a pair"),
        (b'{"name": "\\ud800", "size": 1}', r"\\ud800 is half of a surrogate pair"),
        (b'{"name": "a\\uDE00", "size": 1}', r"\\uDE00 is half of a surrogate pair"),
        (b'{"name": "\\\\\\ud83d\\ud83d\\ude00", "size": 1}', r"\\ud83d is half of a"),
        (b'{"name": "a", "size": ' + b"9" * 5000 + b"}", "number that can be read"),
        (b'{"name": ' + b"[" * 100_000, "nested too deeply"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_line_is_named_with_what_to_do(tmp_path: Path, line: bytes, told: str) -> None:
    path = write(tmp_path / "in.jsonl", ROW + b"\n" + line + b"\n" + ROW)
    message = refusal(path)
    assert f"{path}:3: " in message
    assert re.search(told, message), message


@pytest.mark.parametrize(
    "data,told",
    [
        ('{"name": "a", "size": 1}\n'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ('{"name": "a", "size": 1}\n'.encode("utf-32"), "is UTF-32; save it as UTF-8"),
        ('{"name": "a", "size": 1}\n'.encode("utf-16-le"), "NUL"),
        (b"PK\x03\x04....", "zip archive"),
        (b"PAR1....", "Parquet"),
        (gzip.compress(ROW * 1000)[:-20], "broken gzip"),
        (b"\x1f\x8bnothing of the kind", "broken gzip"),
    ],
)
def test_a_file_that_is_no_text(tmp_path: Path, data: bytes, told: str) -> None:
    assert told in refusal(write(tmp_path / "in.jsonl", data))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "no file" in refusal(tmp_path / "none")
    assert "no file" in refusal(tmp_path)


def test_an_object_comes_as_it_is(tmp_path: Path) -> None:
    (line,) = read_lines(write(tmp_path / "in", b'{"a": {"b": [1]}}'), field="input")
    assert check_line(line) == {"a": {"b": [1]}}


def test_halves_of_a_pair_stand_together(tmp_path: Path) -> None:
    data = b'{"name": "\\ud83d\\uDE00 \\\\ud800 \\\\\\\\udc00 \\u0041", "size": 1}'
    ((_, found),) = pairs(write(tmp_path / "in", data))
    assert found.name == "\U0001f600 \\ud800 \\\\udc00 A"


def test_a_key_that_is_there_twice_is_found_in_a_wide_object(tmp_path: Path) -> None:
    """Every key is looked at once: of so many, pairs of them would take hours."""
    keys = "".join(f'"{number}": 0, ' for number in range(400_000))
    (line,) = read_lines(write(tmp_path / "in", b"{%b" % keys.encode() + b'"399999": 0}'), field="")
    with pytest.raises(InvalidRequest, match="'399999' is there twice"):
        check_line(line)
