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
from rollout.parsers.source import Steps

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"


class _Syntax:
    openings: tuple[str, ...] = (_OPENING,)
    line_openings: tuple[str, ...] = ()

    def read(self, call: CallReader, opening: str) -> Steps[None]:
        yield from read_call_object(call)
        yield from call.closing(_CLOSING)


HERMES = Family(syntax=lambda functions: _Syntax(), markers=(_OPENING, _CLOSING))
