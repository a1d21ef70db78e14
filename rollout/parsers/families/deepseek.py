"""DeepSeek V3, R1 and V3.1: names and JSON between markers with fullwidth bars.

Of V3 and R1, and of V3.1::

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>forecast
    ```json
    {"city": "Paris"}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>

Both are read, whichever the model's template writes.
"""

from __future__ import annotations

import re
from dataclasses import replace

from rollout.parsers.call_objects import read_arguments
from rollout.parsers.calls import CallReader
from rollout.parsers.families.family import Family, check_name
from rollout.parsers.functions import Functions
from rollout.parsers.rules.lark import Lark
from rollout.parsers.rules.object_rules import json_arguments
from rollout.parsers.source import Steps

_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"
_FENCE = "```"
_WORD = re.compile(r"[^\s<{`]+")


class _Syntax:
    openings: tuple[str, ...] = (_CALLS, _CALL)
    line_openings: tuple[str, ...] = ()

    def read(self, call: CallReader, opening: str) -> Steps[None]:
        if opening == _CALLS:
            yield from call.source.need(_CALL)
        opening = _CALL
        while opening == _CALL:
            yield from _read_call(call)
            opening = yield from call.separator(_CALL, _CALLS_END)


def _read_call(call: CallReader) -> Steps[None]:
    source = call.source
    name = yield from source.run(_WORD)
    yield from source.need(_SEPARATOR)
    yield from source.spaces()
    if (yield from source.peek()) != "{":
        # What came was the type of the tool.
        name = yield from source.run(_WORD)
        yield from source.spaces()
        yield from source.word(f"{_FENCE}json", _FENCE)
        yield from source.spaces()
    yield from read_arguments(call, name)
    call.end()
    yield from call.closing(_FENCE, _CALL_END)


def _v3_grammar(lark: Lark, functions: Functions, many: bool) -> str:
    return _grammar(lark, functions, ("function" + _SEPARATOR, "\n```json\n", "\n```"), "\n", many)


def _v31_grammar(lark: Lark, functions: Functions, many: bool) -> str:
    return _grammar(lark, functions, ("", _SEPARATOR, ""), "", many)


def _grammar(
    lark: Lark, functions: Functions, around: tuple[str, str, str], separator: str, many: bool
) -> str:
    """around: what stands before the name, behind it, and behind the arguments."""
    before, behind, end = around
    calls = []
    for name, schema in functions.items():
        check_name(name, _WORD)
        begin = lark.text(f"{_CALL}{before}{name}{behind}")
        arguments = json_arguments(lark, name, schema)
        calls.append(lark.rule(f"{begin} {arguments} {lark.text(end + _CALL_END)}"))
    all_calls = lark.repeated(lark.either(calls), separator, many=many)
    return f"{lark.text(_CALLS)} {all_calls} {lark.text(_CALLS_END)}"


DEEPSEEK_V3 = Family(
    syntax=lambda functions: _Syntax(),
    grammar=_v3_grammar,
    markers=(_CALLS, _CALLS_END, _CALL, _CALL_END, _SEPARATOR),
    special=True,
)
DEEPSEEK_V31 = replace(DEEPSEEK_V3, grammar=_v31_grammar)
