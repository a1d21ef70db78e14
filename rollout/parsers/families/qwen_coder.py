"""Qwen3-Coder and Qwen 3.5: tags named by function and parameter, values on lines of their own.

::

    <tool_call>
    <function=forecast>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>
"""

from __future__ import annotations

import re

from rollout.parsers.calls import CallReader
from rollout.parsers.families.family import Family, check_name
from rollout.parsers.functions import NO_ARGUMENTS, Functions
from rollout.parsers.rules.lark import Lark
from rollout.parsers.rules.tagged_rules import PYTHON_WORDS, tagged_arguments
from rollout.parsers.source import NotACall, Source, Steps
from rollout.parsers.tagged_values import TaggedArguments

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_NAME = re.compile(r"[^<>\n]+")


class _Syntax:
    openings: tuple[str, ...] = (_CALL, _FUNCTION)
    line_openings: tuple[str, ...] = ()

    def __init__(self, functions: Functions) -> None:
        self._functions = functions

    def read(self, call: CallReader, opening: str) -> Steps[None]:
        source = call.source
        if opening == _CALL:
            yield from source.need(_FUNCTION)
        name = yield from _read_name(source)
        schema = self._functions.get(name, NO_ARGUMENTS)
        arguments = TaggedArguments(call, name, schema, lines=True)
        found = yield from source.need(_PARAMETER, _FUNCTION_END)
        while found == _PARAMETER:
            key = yield from _read_name(source)
            found = yield from arguments.read(key, _PARAMETER_END, _PARAMETER, _FUNCTION_END)
        arguments.end()
        yield from call.closing(_CALL_END)


def _read_name(source: Source) -> Steps[str]:
    name = (yield from source.run(_NAME)).strip()
    if not name or not (yield from source.word(">")):
        raise NotACall
    return name


def _grammar(lark: Lark, functions: Functions, many: bool) -> str:
    def opening(key: str) -> str:
        check_name(key, _NAME)
        return f"{_PARAMETER}{key}>\n"

    calls = []
    for name, schema in functions.items():
        check_name(name, _NAME)
        arguments = tagged_arguments(
            lark, name, schema, opening, f"\n{_PARAMETER_END}\n", PYTHON_WORDS
        )
        begin = lark.text(f"{_CALL}\n{_FUNCTION}{name}>\n")
        end = lark.text(f"{_FUNCTION_END}\n{_CALL_END}")
        calls.append(lark.rule(f"{begin} {arguments} {end}"))
    return lark.repeated(lark.either(calls), "\n", many=many)


QWEN_CODER = Family(syntax=_Syntax, grammar=_grammar, markers=(_CALL, _CALL_END))
