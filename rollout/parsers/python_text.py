"""Literals of Python read while they arrive, and passed on as JSON: strings, numbers, True, False,
None, lists and dicts with keys that are strings; JSON's own words are taken too."""

from __future__ import annotations

import json
import math
import re
import unicodedata

from rollout.parsers.json_text import encoded, json_kind
from rollout.parsers.source import Markers, NotACall, Sink, Source, Steps

_WORDS = {"True": "true", "False": "false", "None": "null"}
_WORD = re.compile(r"[-+.\w]+")
_NUMBER = re.compile(r"[-+]?\.?[0-9]")
_ESCAPES = {
    "\\": "\\\\",
    "'": "'",
    '"': '\\"',
    "a": "\\u0007",
    "b": "\\b",
    "f": "\\f",
    "n": "\\n",
    "r": "\\r",
    "t": "\\t",
    "v": "\\u000b",
    "\n": "",
}
_DIGITS = {"x": 2, "u": 4, "U": 8}
_OCTAL = re.compile(r"[0-7]{1,2}")
_HEX = re.compile(r"[0-9a-fA-F]*")
_NAME = re.compile(r"[A-Za-z0-9 -]+")


def read_literal(source: Source, sink: Sink) -> Steps[None]:
    """Take one literal, its JSON text to `sink` in pieces. Raises NotACall at the first character
    that belongs to none."""
    closers: list[str] = []
    before = ""
    while True:
        yield from source.spaces()
        char = yield from source.peek()
        if closers and char == closers[-1]:
            source.take(source.at + 1)
            sink(closers.pop())
        else:
            sink(before)
            if closers[-1:] == ["}"]:
                char = yield from _read_key(source, sink)
            if char and char in "[{":
                source.take(source.at + 1)
                sink(char)
                closers.append("]" if char == "[" else "}")
                before = ""
                continue
            yield from _read_atom(source, sink, char)
        if not closers:
            return
        yield from source.spaces()
        if not (yield from source.word(",")) and (yield from source.peek()) != closers[-1]:
            raise NotACall
        before = ", "


def _read_key(source: Source, sink: Sink) -> Steps[str]:
    """Take a key of a dict; what its value begins with."""
    yield from _read_string(source, sink)
    yield from source.need(":")
    sink(": ")
    yield from source.spaces()
    return (yield from source.peek())


def _read_atom(source: Source, sink: Sink, char: str) -> Steps[None]:
    if char and char in "'\"":
        yield from _read_string(source, sink)
    else:
        sink(_scalar((yield from source.run(_WORD))))


def _scalar(text: str) -> str:
    """The JSON text of a number or a word."""
    text = _WORDS.get(text, text)
    if json_kind(text) is not None:
        return text
    if not _NUMBER.match(text):
        raise NotACall
    try:
        return json.dumps(int(text, 0))
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError as error:
        raise NotACall from error
    if not math.isfinite(number):
        raise NotACall
    return json.dumps(number)


def _read_string(source: Source, sink: Sink) -> Steps[None]:
    quote = yield from source.word('"""', "'''", '"', "'")
    if not quote:
        raise NotACall
    markers = Markers("\\", quote)
    sink('"')
    while (found := (yield from source.until(markers, lambda text: sink(encoded(text))))) != quote:
        if not found:
            raise NotACall
        sink((yield from _read_escape(source)))
    sink('"')


def _read_escape(source: Source) -> Steps[str]:
    """Take what stands behind a backslash, as it is written within the quotes of JSON."""
    char = yield from source.peek()
    source.take(source.at + 1)
    if char in _ESCAPES:
        return _ESCAPES[char]
    if char in _DIGITS:
        digits = yield from source.at_least(_DIGITS[char])
        source.take(source.at + _DIGITS[char])
        if len(digits) < _DIGITS[char] or not _HEX.fullmatch(digits):
            raise NotACall
        return f"\\u{digits}" if char == "u" else _character(int(digits, 16))
    if char and char in "01234567":
        yield from source.at_least(2)
        return _character(int(char + source.match(_OCTAL), 8))
    if char == "N":
        return (yield from _read_named(source))
    return "\\\\" + encoded(char)


def _read_named(source: Source) -> Steps[str]:
    """Take the name of a character, in braces."""
    opened = yield from source.word("{")
    name = yield from source.run(_NAME)
    closed = yield from source.word("}")
    if not opened or not closed:
        raise NotACall
    try:
        return encoded(unicodedata.lookup(name))
    except KeyError as error:
        raise NotACall from error


def _character(code: int) -> str:
    if code > 0x10FFFF:
        raise NotACall
    # Half of a pair is no text, but JSON has a way to write it.
    return f"\\u{code:04x}" if 0xD800 <= code < 0xE000 else encoded(chr(code))


def python_json(text: str) -> str | None:
    """The JSON text of the literal that `text` is; None if it is none."""
    source = Source()
    source.push(text)
    source.closed = True
    pieces: list[str] = []
    try:
        for _ in read_literal(source, pieces.append):
            pass
        for _ in source.spaces():
            pass
    except NotACall:
        return None
    return "".join(pieces) if source.at == len(text) else None
