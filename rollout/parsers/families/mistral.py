"""Mistral: a list of JSON objects behind a token, and since tokenizer v11 names and arguments.

::

    [TOOL_CALLS] [{"name": "forecast", "arguments": {"city": "Paris"}, "id": "a1B2c3D4e"}]
    [TOOL_CALLS]forecast[CALL_ID]a1B2c3D4e[ARGS]{"city": "Paris"}
    [TOOL_CALLS]forecast[ARGS]{"city": "Paris"}

All three are read, whichever the model's template writes.
"""

from __future__ import annotations

import re
from dataclasses import replace

from rollout.parsers.call_objects import read_arguments, read_call_object
from rollout.parsers.calls import CallReader
from rollout.parsers.families.family import Family, check_name, short_call_id
from rollout.parsers.functions import Functions
from rollout.parsers.rules.lark import Lark
from rollout.parsers.rules.object_rules import call_objects, json_arguments
from rollout.parsers.source import NotACall, Steps

_CALLS, _CALL_ID, _ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_WORD = re.compile(r"[^\s\[{]+")


class _Syntax:
    openings: tuple[str, ...] = (_CALLS,)
    line_openings: tuple[str, ...] = ()

    def read(self, call: CallReader, opening: str) -> Steps[None]:
        yield from call.source.spaces()
        match (yield from call.source.peek()):
            case "[":
                yield from _read_list(call)
            case "{":
                yield from read_call_object(call)
            case _:
                yield from _read_named(call)


def _read_list(call: CallReader) -> Steps[None]:
    yield from call.source.need("[")
    separator = ","
    while separator == ",":
        yield from read_call_object(call)
        separator = yield from call.separator(",", "]")


def _read_named(call: CallReader) -> Steps[None]:
    source = call.source
    name = yield from source.run(_WORD)
    if not name:
        raise NotACall
    call_id = ""
    if (yield from source.word(_CALL_ID)):
        call_id = yield from source.run(_WORD)
    yield from source.word(_ARGS)
    yield from source.spaces()
    yield from read_arguments(call, name, call_id)
    call.end()


def _list_grammar(lark: Lark, functions: Functions, many: bool) -> str:
    objects = lark.repeated(call_objects(lark, functions, "arguments"), ", ", many=many)
    return f"{lark.text(_CALLS)} {lark.text(' ')}? {lark.text('[')} {objects} {lark.text(']')}"


def _args_grammar(lark: Lark, functions: Functions, many: bool) -> str:
    return _named_grammar(lark, functions, lark.text(_ARGS), many)


def _call_id_grammar(lark: Lark, functions: Functions, many: bool) -> str:
    call_id = lark.terminal("/[a-zA-Z0-9]{9}/")
    between = f"{lark.text(_CALL_ID)} {call_id} {lark.text(_ARGS)}"
    return _named_grammar(lark, functions, between, many)


def _named_grammar(lark: Lark, functions: Functions, between: str, many: bool) -> str:
    calls = []
    for name, schema in functions.items():
        check_name(name, _WORD)
        arguments = json_arguments(lark, name, schema)
        calls.append(lark.rule(f"{lark.text(_CALLS + name)} {between} {arguments}"))
    return lark.repeated(lark.either(calls), "", many=many)


MISTRAL = Family(
    syntax=lambda functions: _Syntax(),
    grammar=_list_grammar,
    markers=(_CALLS, _CALL_ID, _ARGS),
    special=True,
    new_id=short_call_id,
)
MISTRAL_ARGS = replace(MISTRAL, grammar=_args_grammar)
MISTRAL_CALL_ID = replace(MISTRAL, grammar=_call_id_grammar)
