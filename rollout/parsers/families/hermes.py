"""Hermes 2 Pro and later, Qwen 2.5 and Qwen 3: a JSON object between tags.

::

    <tool_call>
    {"name": "forecast", "arguments": {"city": "Paris"}}
    </tool_call>
"""

from __future__ import annotations

from rollout.parsers.call_objects import read_call_object
from rollout.parsers.calls import CallReader
from rollout.parsers.families.family import Family
from rollout.parsers.functions import Functions
from rollout.parsers.rules.lark import Lark
from rollout.parsers.rules.object_rules import call_objects
from rollout.parsers.source import Steps

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"


class _Syntax:
    openings: tuple[str, ...] = (_OPENING,)
    line_openings: tuple[str, ...] = ()

    def read(self, call: CallReader, opening: str) -> Steps[None]:
        yield from read_call_object(call)
        yield from call.closing(_CLOSING)


def _grammar(lark: Lark, functions: Functions, many: bool) -> str:
    objects = call_objects(lark, functions, "arguments")
    opening, closing = lark.text(f"{_OPENING}\n"), lark.text(f"\n{_CLOSING}")
    return lark.repeated(f"{opening} {objects} {closing}", "\n", many=many)


HERMES = Family(syntax=lambda functions: _Syntax(), grammar=_grammar, markers=(_OPENING, _CLOSING))
