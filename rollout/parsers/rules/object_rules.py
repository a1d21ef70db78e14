"""Rules of calls whose arguments are a JSON object."""

from __future__ import annotations

import json

from engine.errors import InvalidRequest
from rollout.parsers.functions import Functions, Schema
from rollout.parsers.rules.lark import Lark, named_function


def call_objects(lark: Lark, functions: Functions, key: str) -> str:
    """`{"name": NAME, KEY: ARGUMENTS}` of one of the functions."""
    calls = []
    for name, schema in functions.items():
        begin = lark.text(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": ')
        calls.append(f"{begin} {json_arguments(lark, name, schema)} {lark.text('}')}")
    return lark.either([lark.rule(call) for call in calls])


def json_arguments(lark: Lark, name: str, schema: Schema) -> str:
    """The arguments of a function, an object. Raises InvalidRequest (`tools`) naming it."""
    try:
        return lark.json({"type": "object", **schema})
    except InvalidRequest as error:
        raise named_function(error, name) from error
