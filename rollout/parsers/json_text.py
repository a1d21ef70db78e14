"""JSON read while it arrives, by RFC 8259, and passed on as it is written."""

from __future__ import annotations

import json
import re

from rollout.parsers.source import NotACall, Sink, Source, Steps

_SPACES = re.compile(r"[ \t\n\r]+")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_SCALAR = re.compile(r"[-+.0-9a-zA-Z]+")
_WHOLE_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")


def read_value(source: Source, sink: Sink) -> Steps[None]:
    """Take one JSON value, its text to `sink` in pieces. What stands behind an object, a list or
    a string is left. Raises NotACall at the first character that is no JSON."""
    closers: list[str] = []
    expected = "value"
    while True:
        sink((yield from source.run(_SPACES)))
        char = yield from source.peek()
        if expected == "comma":
            expected = _after_value(char, closers)
            sink(source.take(source.at + 1))
        elif expected in ("key", "first key") and char == '"':
            yield from _read_key(source, sink)
            expected = "value"
        elif expected.startswith("first") and char == closers[-1]:
            sink(source.take(source.at + 1))
            closers.pop()
            expected = "comma"
        elif expected in ("key", "first key") or not char:
            raise NotACall
        elif char in "{[":
            sink(source.take(source.at + 1))
            closers.append("}" if char == "{" else "]")
            expected = "first key" if char == "{" else "first value"
        else:
            yield from _read_atom(source, sink, char)
            expected = "comma"
        if expected == "comma" and not closers:
            return


def _after_value(char: str, closers: list[str]) -> str:
    """What is expected behind `char`, which follows a value in a container."""
    if char == closers[-1]:
        closers.pop()
        return "comma"
    if char == ",":
        return "key" if closers[-1] == "}" else "value"
    raise NotACall


def _read_key(source: Source, sink: Sink) -> Steps[None]:
    yield from read_string(source, sink)
    sink((yield from source.run(_SPACES)))
    if not (yield from source.word(":")):
        raise NotACall
    sink(":")


def _read_atom(source: Source, sink: Sink, char: str) -> Steps[None]:
    if char == '"':
        yield from read_string(source, sink)
        return
    text = yield from source.run(_SCALAR)
    if not _WHOLE_SCALAR.fullmatch(text):
        raise NotACall
    sink(text)


def read_string(source: Source, sink: Sink) -> Steps[None]:
    """Take a string, its quotes included, in pieces to `sink`. Raises NotACall if there is none."""
    if not (yield from source.word('"')):
        raise NotACall
    sink('"')
    while (yield from source.more()):
        sink(source.match(_PLAIN))
        if source.at == len(source.text):
            continue
        char = source.text[source.at]
        if char == '"':
            sink(source.take(source.at + 1))
            return
        if char != "\\":
            raise NotACall
        is_code = (yield from source.at_least(2))[1:] == "u"
        yield from source.at_least(6 if is_code else 2)
        escape = source.match(_ESCAPE)
        if not escape:
            raise NotACall
        sink(escape)
    raise NotACall


def read_text(source: Source) -> Steps[str]:
    """Take a string; what it says. Raises NotACall if there is none."""
    pieces: list[str] = []
    yield from read_string(source, pieces.append)
    return decoded("".join(pieces))


def decoded(text: str) -> str:
    """What `text`, a JSON string, says."""
    found: str = json.loads(text)
    return found


def encoded(text: str) -> str:
    """`text` as it stands within the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def json_kind(text: str) -> str | None:
    """The type of the JSON value that `text` is, as schemas name it, "integer" where a number has
    neither fraction nor exponent; None if it is no JSON value."""
    source = Source()
    source.push(text)
    source.closed = True
    try:
        for _ in read_value(source, _drop):
            pass
        source.match(_SPACES)
    except NotACall:
        return None
    if source.at < len(text):
        return None
    first = text.lstrip()[0]
    if first in "-0123456789":
        return "number" if set(text) & set(".eE") else "integer"
    kinds = {"{": "object", "[": "array", '"': "string", "n": "null"}
    return kinds.get(first, "boolean")


def _drop(text: str) -> None:
    """Text that is looked at alone."""
