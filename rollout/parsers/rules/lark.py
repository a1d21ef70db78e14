"""Rules of llguidance's Lark dialect whose texts are calls.

A marker that is a special token of the model stands in a rule by its id: nothing else says it, and
no free text holds it. Any other marker is text, in whatever tokens it comes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from engine.errors import InvalidRequest
from rollout.masks.grammar.languages.json_schema import served_schema
from rollout.masks.grammar.languages.regex import literal, regex_terminal

_ANY = "/(?s:.*)/"
# As templates write arguments, which is what models have learnt.
_SPACING: Mapping[str, Any] = MappingProxyType(
    {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
)


class Lark:
    """Writes rules. Its methods return expressions to be put side by side, and keep the rules
    that those need. special: ids of the markers that are special tokens, by their text."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        words = sorted(special, key=len, reverse=True)
        self._markers = re.compile("|".join(map(re.escape, words)) or "(?!)")
        self._lines: list[str] = []

    def source(self, start: str) -> str:
        """The whole grammar, of which `start` is the first expression."""
        return "\n".join([f"start: {start}", *self._lines, ""])

    def text(self, text: str) -> str:
        """`text`, as it stands."""
        parts, at = [], 0
        for found in self._markers.finditer(text):
            parts += [literal(text[at : found.start()])] if found.start() > at else []
            parts.append(f"<[{self._special[found[0]]}]>")
            at = found.end()
        parts += [literal(text[at:])] if at < len(text) or not parts else []
        return " ".join(parts)

    def json(self, schema: Mapping[str, Any]) -> str:
        """A JSON value that fits a schema. Raises InvalidRequest, naming the place, for what is
        not served of it."""
        given = {**served_schema(dict(schema)), "x-guidance": dict(_SPACING)}
        return self.rule(f"%json {json.dumps(given)}")

    def check(self, schema: Mapping[str, Any]) -> None:
        """Raise InvalidRequest, naming the place, for what is not served of a schema."""
        served_schema(dict(schema))

    def up_to(self, closing: str) -> str:
        """Any text that has no `closing`, and `closing`."""
        found = self._markers.search(closing)
        if found is not None:
            # A special token ends a text by itself.
            return f"{self.terminal(_ANY)} {self.text(closing[found.start() :])}"
        return self.rule(f"{self.terminal(_ANY)} {literal(closing)}", attributes="[lazy]")

    def matching(self, pattern: str, free: str) -> str:
        """A terminal of texts that have a part which a JSON schema's `pattern` matches; `free`:
        the class of the characters beside that part. Raises InvalidRequest for a pattern that is
        not served."""
        begin = end = f"{free}*"
        if pattern.startswith("^"):
            begin, pattern = "", pattern[1:]
        if re.search(r"(?<!\\)(?:\\\\)*\$$", pattern):
            end, pattern = "", pattern[:-1]
        return regex_terminal(f"{begin}(?:{pattern}){end}")

    def rule(self, body: str, attributes: str = "") -> str:
        """The name of a new rule."""
        name = f"r{len(self._lines)}"
        self._lines.append(f"{name}{attributes}: {body}")
        return name

    def terminal(self, body: str) -> str:
        """The name of a new terminal."""
        name = f"T{len(self._lines)}"
        self._lines.append(f"{name}: {body}")
        return name

    def either(self, expressions: Sequence[str]) -> str:
        """One of `expressions`."""
        return expressions[0] if len(expressions) == 1 else self.rule(" | ".join(expressions))

    def repeated(self, expression: str, separator: str, *, many: bool) -> str:
        """`expression` once; `many`: or more often, with `separator` between."""
        if not many:
            return expression
        one = self.rule(expression)
        between = f"{self.text(separator)} " if separator else ""
        return f"{one} ({between}{one})*"


def named_function(error: InvalidRequest, name: str) -> InvalidRequest:
    """The error of a function whose schema is not served, in the words of the request."""
    return InvalidRequest(
        f"a call of {name[:100]!r} cannot be forced, since its parameters are not served: "
        f"{error.message.removeprefix('grammar: ')}",
        field="tools",
    )
