"""Arguments that a family writes one by one between tags, as JSON text.

Between tags a text is bare, so whether `5` is a number or a text is told by the function's schema.
"""

from __future__ import annotations

import json

from rollout.parsers.calls import CallReader
from rollout.parsers.functions import Schema
from rollout.parsers.json_text import encoded, json_kind
from rollout.parsers.python_text import python_json
from rollout.parsers.schema_kinds import argument_kinds
from rollout.parsers.source import Markers, NotACall, Sink, Source, Steps

_WORDS = {"True": "true", "False": "false", "None": "null"}


class TaggedArguments:
    """Tells a call its arguments while they come. lines: a value has lines of its own, whose
    newlines are not of it."""

    def __init__(self, call: CallReader, name: str, schema: Schema, *, lines: bool) -> None:
        self._call = call
        self._name = name
        self._schema = schema
        self._lines = lines
        self._keys: set[str] = set()

    def read(self, key: str, closing: str, *following: str) -> Steps[str]:
        """Take the value of `key` and its `closing` tag, then one of `following`, which is
        returned. A closing tag that none of them follows is part of the value. Raises NotACall
        for a key that has a value."""
        if key in self._keys:
            raise NotACall
        self._begin()
        self._call.arguments(
            f"{', ' if self._keys else '{'}{json.dumps(key, ensure_ascii=False)}: "
        )
        self._keys.add(key)
        kinds = argument_kinds(self._schema, key)
        value = _Text(self._call.arguments) if kinds == {"string"} else _Value(kinds)
        lines = _Lines(value.add) if self._lines else None
        found = yield from _read_until(
            self._call.source, value.add if lines is None else lines.add, closing, following
        )
        self._call.arguments(value.end())
        return found

    def end(self) -> None:
        """All arguments came."""
        self._begin()
        self._call.arguments("}" if self._keys else "{}")
        self._call.end()

    def _begin(self) -> None:
        if not self._call.is_begun:
            self._call.begin(self._name)


def _read_until(source: Source, sink: Sink, closing: str, following: tuple[str, ...]) -> Steps[str]:
    markers = Markers(closing)
    while (yield from source.until(markers, sink)):
        spaces = yield from source.spaces()
        found = yield from source.word(*following)
        if found:
            return found
        sink(closing + spaces)
    raise NotACall


class _Lines:
    """Text without its first and its last newline."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._first = True
        self._held = ""

    def add(self, text: str) -> None:
        if self._first and text:
            self._first = False
            text = text.removeprefix("\n")
        if text:
            text = self._held + text
            self._held = "\n" if text.endswith("\n") else ""
            self._sink(text.removesuffix("\n"))


class _Text:
    """A value that is a string: its JSON text as it comes."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        sink('"')

    def add(self, text: str) -> None:
        self._sink(encoded(text))

    def end(self) -> str:
        return '"'


class _Value:
    """A value that is certain at its end."""

    def __init__(self, kinds: frozenset[str]) -> None:
        self._kinds = kinds
        self._pieces: list[str] = []

    def add(self, text: str) -> None:
        self._pieces.append(text)

    def end(self) -> str:
        return typed("".join(self._pieces), self._kinds)


def typed(text: str, kinds: frozenset[str]) -> str:
    """The JSON text of a value that is written `text`: it is JSON, or what Python writes for it,
    of a kind of `kinds`; where it is not, a string if it may be one."""
    plain = text.strip()
    found: str | None = _WORDS.get(plain, plain)
    if found is not None and json_kind(found) is None:
        found = None if "string" in kinds else python_json(plain)
    if found is None:
        return json.dumps(text, ensure_ascii=False)
    kind = json_kind(found) or ""
    fits = kind in kinds or (kind == "integer" and "number" in kinds)
    if "string" in kinds and (kind == "string" or not fits):
        return json.dumps(text, ensure_ascii=False)
    return found
