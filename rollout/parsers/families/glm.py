"""GLM 4.5 and later: a name, then keys and values between tags; 4.7 writes no newlines.

::

    <tool_call>forecast
    <arg_key>city</arg_key>
    <arg_value>Paris</arg_value>
    </tool_call>
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

from rollout.parsers.calls import CallReader
from rollout.parsers.families.family import Family, check_name
from rollout.parsers.functions import NO_ARGUMENTS, Functions
from rollout.parsers.rules.lark import Lark
from rollout.parsers.rules.tagged_rules import tagged_arguments
from rollout.parsers.source import Steps
from rollout.parsers.tagged_values import TaggedArguments

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_KEY, _KEY_END = "<arg_key>", "</arg_key>"
_VALUE, _VALUE_END = "<arg_value>", "</arg_value>"
_NAME = re.compile(r"[^\s<]+")
_ARGUMENT = re.compile(r"[^<]+")


class _Syntax:
    openings: tuple[str, ...] = (_CALL,)
    line_openings: tuple[str, ...] = ()

    def __init__(self, functions: Functions) -> None:
        self._functions = functions

    def read(self, call: CallReader, opening: str) -> Steps[None]:
        source = call.source
        yield from source.spaces()
        name = yield from source.run(_NAME)
        schema = self._functions.get(name, NO_ARGUMENTS)
        arguments = TaggedArguments(call, name, schema, lines=False)
        found = yield from source.need(_KEY, _CALL_END)
        while found == _KEY:
            key = yield from source.run(_ARGUMENT)
            yield from source.need(_KEY_END)
            yield from source.need(_VALUE)
            found = yield from arguments.read(key.strip(), _VALUE_END, _KEY, _CALL_END)
        arguments.end()


def _grammar(lark: Lark, functions: Functions, many: bool, newline: str = "\n") -> str:
    def opening(key: str) -> str:
        check_name(key, _ARGUMENT)
        return f"{_KEY}{key}{_KEY_END}{newline}{_VALUE}"

    calls = []
    for name, schema in functions.items():
        check_name(name, _NAME)
        arguments = tagged_arguments(lark, name, schema, opening, _VALUE_END + newline)
        begin = lark.text(f"{_CALL}{name}{newline}")
        calls.append(lark.rule(f"{begin} {arguments} {lark.text(_CALL_END)}"))
    return lark.repeated(lark.either(calls), newline, many=many)


GLM = Family(
    syntax=_Syntax,
    grammar=_grammar,
    markers=(_CALL, _CALL_END, _KEY, _KEY_END, _VALUE, _VALUE_END),
)
GLM_47 = replace(GLM, grammar=partial(_grammar, newline=""))
