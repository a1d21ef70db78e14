"""Files of JSON objects, one a line: the one reader of requests, data sets and a run's own logs.

A line ends at "\\n" or "\\r\\n" and nowhere else: other line separators, such as U+2028, may stand
inside a string (RFC 8259 allows them there). Blank lines count, and are passed over.
https://jsonlines.org
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar, cast

import msgspec

from engine.errors import InvalidRequest

T = TypeVar("T")

_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
_GZIP = b"\x1f\x8b"
# What a backslash begins in a string; a half of a surrogate pair alone takes six bytes.
_ESCAPE = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u[dD][89a-fA-F]..|\\.")
# How files begin that are no lines of text; UTF-32 before UTF-16, whose mark it starts with.
_ENCODINGS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_FORMATS = (
    (b"PK\x03\x04", "a zip archive"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"BZh", "a bzip2 archive"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonLine:
    """One line that is not blank, e.g. JsonLine(path=p, number=3, data=b'{"a": 1}', ended=True).

    number: from 1. data: without the line's end and without a byte order mark. ended: whether the
    line has an end; the last line of a file that was cut off while it was written has none.
    """

    path: Path
    number: int
    data: bytes
    ended: bool

    @property
    def where(self) -> str:
        """The place for people and editors: `file:line`."""
        return f"{self.path}:{self.number}"


def read_lines(path: Path, *, field: str) -> Iterator[JsonLine]:
    """The lines of a UTF-8 file, plain or gzip, whatever its name; what they say is not looked at.

    Raises InvalidRequest as `open_text` does.
    """
    with open_text(path, field=field, of="one JSON object a line") as file:
        yield from _lines(path, file)


@contextmanager
def open_text(path: Path, *, field: str, of: str) -> Iterator[BinaryIO]:
    """A file of text, plain or gzip, whatever its name, opened for its bytes. of: what it is a
    text of, e.g. "one JSON object a line".

    Raises InvalidRequest, naming `field` and the file, for one that cannot be read, is in another
    encoding than UTF-8, or is no text at all, also while the body reads.
    """
    if not path.is_file():
        raise InvalidRequest(f"{field}: no file at {path}", field=field)
    try:
        with path.open("rb") as file:
            head = file.read(8)
            _check_head(path, head, field, of)
            file.seek(0)
            if head.startswith(_GZIP):
                with gzip.open(file) as unpacked:
                    yield cast(BinaryIO, unpacked)
            else:
                yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InvalidRequest(
            f"{field}: {path} is a broken gzip file ({error}); pack it again", field=field
        ) from error
    except OSError as error:
        raise InvalidRequest(
            f"{field}: cannot read {path}: {error.strerror}", field=field
        ) from error


def parse_line(line: JsonLine, kind: type[T], *, field: str, example: str) -> T:
    """The line as a value of `kind`, a msgspec struct.

    Raises InvalidRequest naming `field`, file and line for what `check_line` finds and for a key
    that is missing or has a value of another type; `example` says what a line is.
    """
    try:
        check_line(line)
        return msgspec.json.decode(line.data, type=kind)
    except InvalidRequest as error:
        told = error.message
    except msgspec.DecodeError as error:
        told = f"{error}; each line is {example}"
    raise InvalidRequest(f"{field}: {line.where}: {told}", field=field)


def check_line(line: JsonLine) -> dict[str, Any]:
    """The line as a plain object, as `json` reads it.

    Raises InvalidRequest, which leaves the place to the caller, for bytes that are not UTF-8, for
    what is not JSON or not one whole object, for a key that an object has twice, and for half of
    a surrogate pair.
    """
    text = decode_text(line.data)
    try:
        value = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_such_number)
    except InvalidRequest:
        raise
    except json.JSONDecodeError as error:
        raise InvalidRequest(_not_json(text, error)) from error
    except RecursionError as error:
        raise InvalidRequest(
            "lists or objects are nested too deeply; write them flatter"
        ) from error
    except ValueError as error:
        # An integer of more digits than Python reads.
        raise InvalidRequest(f"is not a number that can be read: {error}") from error
    if isinstance(value, list):
        raise InvalidRequest("is a list; write one object a line (`jq -c '.[]'` makes them)")
    if not isinstance(value, dict):
        raise InvalidRequest(f"is {type(value).__name__}, no object; write one object a line")
    _check_escapes(line.data)
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidRequest(f"the key {key!r} is there twice; leave one")
            seen.add(key)
    return found


def _no_such_number(text: str) -> NoReturn:
    raise InvalidRequest(f"{text} is no number of JSON; write a finite number, or a string")


def _check_escapes(data: bytes) -> None:
    """`json` reads half of a surrogate pair as a character; nothing can write it again."""
    if b"\\ud" not in data and b"\\uD" not in data:
        return
    for escape in _ESCAPE.findall(data):
        if len(escape) == 6:
            raise InvalidRequest(
                f"{escape.decode()} is half of a surrogate pair, no character; write both halves, "
                "or the character itself in UTF-8"
            )


def decode_text(data: bytes) -> str:
    """A line of a text file. Raises InvalidRequest, which leaves the place to the caller, for a
    NUL and for bytes that are not UTF-8."""
    if 0 in data:
        raise InvalidRequest("holds a NUL byte: the file is damaged or UTF-16; save it as UTF-8")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise InvalidRequest(
            f"byte {error.start + 1} (0x{byte:02x}) is not UTF-8; save the file as UTF-8 "
            "(`iconv -f LATIN1 -t UTF-8`, if it is Latin-1)"
        ) from error


def _not_json(text: str, error: json.JSONDecodeError) -> str:
    told = f"is not JSON at character {error.pos + 1}: {error.msg}"
    if text.lstrip()[:1] in ("{", "[") and error.pos >= len(text.rstrip()):
        return f"{told}; write each object whole on one line (`jq -c .` does that)"
    if error.msg == "Extra data":
        return f'{told}; write one object a line, each line ended by "\\n"'
    return f"{told}; write one JSON object a line"


def _check_head(path: Path, head: bytes, field: str, of: str) -> None:
    for mark, encoding in _ENCODINGS:
        if head.startswith(mark):
            raise InvalidRequest(
                f"{field}: {path} is {encoding}; save it as UTF-8 (`iconv -f {encoding} -t UTF-8`)",
                field=field,
            )
    for mark, format_name in _FORMATS:
        if head.startswith(mark):
            raise InvalidRequest(
                f"{field}: {path} is {format_name}; give a text file of {of}, plain or gzip",
                field=field,
            )


def _lines(path: Path, file: BinaryIO) -> Iterator[JsonLine]:
    for number, raw in enumerate(file, start=1):
        data = raw.removesuffix(b"\n").removesuffix(b"\r").removeprefix(_BOM)
        if data.strip(_BLANK):
            yield JsonLine(path=path, number=number, data=data, ended=raw.endswith(b"\n"))
