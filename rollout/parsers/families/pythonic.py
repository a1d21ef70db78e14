"""Llama 3.2 and 4, LFM2 and others: a list of Python's calls with literals as arguments.

::

    [forecast(city="Paris", days=2), now()]

Llama 4 may write it between `<|python_start|>` and `<|python_end|>`, LFM2 between
`<|tool_call_start|>` and `<|tool_call_end|>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from types import MappingProxyType

from engine.errors import InvalidRequest
from rollout.parsers.calls import CallReader
from rollout.parsers.families.family import Family, check_name
from rollout.parsers.functions import Functions
from rollout.parsers.python_text import read_literal
from rollout.parsers.rules.argument_forms import Argument, Fixed, Open, arguments_of
from rollout.parsers.rules.lark import Lark, named_function
from rollout.parsers.rules.tagged_rules import PYTHON_WORDS
from rollout.parsers.source import NotACall, Steps

_BRACKET = "["
_CLOSINGS = MappingProxyType(
    {
        "<|python_start|>": "<|python_end|>",
        "<|tool_call_start|>": "<|tool_call_end|>",
    }
)
_NAME = re.compile(r"[\w.-]+")
_KEY = re.compile(r"\w+")
_WORDS = MappingProxyType({"true": "True", "false": "False", "null": "None"})


class _Syntax:
    openings: tuple[str, ...] = tuple(_CLOSINGS)
    line_openings: tuple[str, ...] = (_BRACKET,)

    def read(self, call: CallReader, opening: str) -> Steps[None]:
        if opening != _BRACKET:
            yield from call.source.need(_BRACKET)
        separator = ","
        while separator == ",":
            yield from _read_call(call)
            separator = yield from call.separator(",", "]")
        if opening in _CLOSINGS:
            yield from call.closing(_CLOSINGS[opening])


def _read_call(call: CallReader) -> Steps[None]:
    source = call.source
    yield from source.spaces()
    name = yield from source.run(_NAME)
    yield from source.need("(")
    keys: set[str] = set()
    yield from source.spaces()
    while not (yield from source.word(")")):
        key = yield from source.run(_KEY)
        yield from source.need("=")
        if not key or key in keys:
            raise NotACall
        if not keys:
            call.begin(name)
        call.arguments(f"{', ' if keys else '{'}{json.dumps(key, ensure_ascii=False)}: ")
        keys.add(key)
        yield from read_literal(source, call.arguments)
        yield from source.spaces()
        if not (yield from source.word(",")) and (yield from source.peek()) != ")":
            raise NotACall
        yield from source.spaces()
    if not keys:
        call.begin(name)
    call.arguments("}" if keys else "{}")
    call.end()


def _grammar(lark: Lark, functions: Functions, many: bool) -> str:
    calls = []
    for name, schema in functions.items():
        check_name(name, _NAME)
        try:
            arguments = _arguments(lark, arguments_of(schema))
        except InvalidRequest as error:
            raise named_function(error, name) from error
        calls.append(lark.rule(f"{lark.text(f'{name}(')} {arguments} {lark.text(')')}"))
    listed = lark.repeated(lark.either(calls), ", ", many=many)
    return f"{lark.text('[')} {listed} {lark.text(']')}"


def _arguments(lark: Lark, arguments: Sequence[Argument]) -> str:
    """Arguments with commas between: those that may be left out stand last."""
    arguments = sorted(arguments, key=lambda one: not one.required)
    rest, firsts = lark.rule('""'), []
    for argument in reversed(arguments):
        check_name(argument.key, _KEY)
        value = lark.either([_value(lark, form) for form in argument.forms])
        one = lark.rule(f"{lark.text(f'{argument.key}=')} {value}")
        firsts.append(f"{one} {rest}")
        behind = f"{lark.text(', ')} {one} {rest}"
        rest = lark.rule(behind if argument.required else f"{behind} | {rest}")
    if arguments and arguments[0].required:
        return firsts[-1]
    return lark.rule(" | ".join(['""', *firsts]))


def _value(lark: Lark, form: Fixed | Open) -> str:
    if isinstance(form, Fixed):
        value = json.dumps(form.value, ensure_ascii=False)
        return lark.text(_WORDS.get(value, value))
    found = [lark.text(word) for kind in sorted(form.kinds) for word in PYTHON_WORDS.get(kind, ())]
    others = sorted(form.kinds - PYTHON_WORDS.keys())
    if others:
        found.append(lark.json({**form.schema, "type": others}))
    return lark.either(found)


PYTHONIC = Family(
    syntax=lambda functions: _Syntax(),
    grammar=_grammar,
    markers=(*_CLOSINGS, *_CLOSINGS.values()),
    special=True,
)
