"""Llama 3.1 and later, without their built-in tools: bare JSON objects, `;` between them.

::

    {"name": "forecast", "parameters": {"city": "Paris"}}

`<|python_tag|>` may stand before it, Llama 4's `<|python_start|>` and `<|python_end|>` around it.
"""

from __future__ import annotations

from rollout.parsers.call_objects import read_call_object
from rollout.parsers.calls import CallReader
from rollout.parsers.families.family import Family
from rollout.parsers.functions import Functions
from rollout.parsers.rules.lark import Lark
from rollout.parsers.rules.object_rules import call_objects
from rollout.parsers.source import Steps

_TAG, _START, _END = "<|python_tag|>", "<|python_start|>", "<|python_end|>"
_BRACE = "{"


class _Syntax:
    openings: tuple[str, ...] = (_TAG, _START)
    line_openings: tuple[str, ...] = (_BRACE,)

    def read(self, call: CallReader, opening: str) -> Steps[None]:
        yield from read_call_object(call, bare=opening == _BRACE)
        while (yield from call.separator(";")):
            yield from read_call_object(call)
        if opening == _START:
            yield from call.closing(_END)


def _grammar(lark: Lark, functions: Functions, many: bool) -> str:
    return lark.repeated(call_objects(lark, functions, "parameters"), "; ", many=many)


LLAMA3 = Family(
    syntax=lambda functions: _Syntax(), grammar=_grammar, markers=(_TAG, _START, _END), special=True
)
