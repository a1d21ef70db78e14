"""Calls that are written as a JSON object with a name and arguments."""

from __future__ import annotations

import re

from rollout.parsers.calls import CallReader
from rollout.parsers.json_text import decoded, json_kind, read_text, read_value
from rollout.parsers.source import NotACall, Source, Steps

_ARGUMENTS = ("arguments", "parameters")
_OWN = ("name", *_ARGUMENTS)
_OTHERS = ("id", "type")
_HALF = re.compile(r"[\ud800-\udfff]")
"""Half of a pair, which JSON can write and UTF-8 cannot."""


def read_call_object(call: CallReader, *, bare: bool = False) -> Steps[None]:
    """Take one `{"name": ..., "arguments": {...}}`, keys in any order; `parameters` are arguments
    too, and without any there are none.

    bare: nothing but its brace, which is taken, said that it is a call: it must have arguments,
    and no other keys. Raises NotACall where it is something else.
    """
    source = call.source
    name: str | None = None
    found: list[str] | None = None
    if not bare:
        yield from source.need("{")
    separator = ","
    while separator == ",":
        key = yield from _read_key(source)
        if key == "name" and name is None:
            name = yield from read_text(source)
            if not call.offers(name):
                call.begin(name)
        elif key in _ARGUMENTS and found is None:
            found = []
            if name is None:
                yield from read_value(source, found.append)
            else:
                yield from read_arguments(call, name)
        elif key in _OTHERS or (name is not None and not bare and key not in _OWN):
            yield from read_value(source, _drop)
        else:
            raise NotACall
        separator = yield from source.need(",", "}")
    if name is None or (bare and found is None):
        raise NotACall
    if not call.is_begun:
        _give(call, name, "".join(found or ["{}"]), "")
    call.end()


def read_arguments(call: CallReader, name: str, call_id: str = "") -> Steps[None]:
    """Take the arguments of `name`: an object, the text of one as a string, or null."""
    char = yield from call.source.peek()
    if char == "{":
        if not call.is_begun:
            call.begin(name, call_id)
        yield from read_value(call.source, call.arguments)
        return
    pieces: list[str] = []
    yield from read_value(call.source, pieces.append)
    _give(call, name, "".join(pieces), call_id)


def _give(call: CallReader, name: str, text: str, call_id: str) -> None:
    """A call whose arguments are all there: an object, the text of one as a string, or null."""
    if text == "null":
        text = "{}"
    elif text.startswith('"'):
        text = _HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", decoded(text))
    if json_kind(text) != "object":
        raise NotACall
    if not call.is_begun:
        call.begin(name, call_id)
    call.arguments(text)


def _read_key(source: Source) -> Steps[str]:
    yield from source.spaces()
    key = yield from read_text(source)
    yield from source.need(":")
    yield from source.spaces()
    return key


def _drop(text: str) -> None:
    """Text that says nothing of the call."""
