"""Rules of arguments that are written one by one between tags, as bare texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from engine.errors import InvalidRequest
from rollout.parsers.functions import Schema
from rollout.parsers.rules.argument_forms import Fixed, Open, arguments_of
from rollout.parsers.rules.lark import Lark, named_function

NO_WORDS: Mapping[str, Sequence[str]] = MappingProxyType({})
PYTHON_WORDS: Mapping[str, Sequence[str]] = MappingProxyType(
    {"boolean": ("True", "False"), "null": ("None",)}
)

_FREE = "[^<]"
"""Characters of a text that a schema restricts: so no closing tag is among them."""


def tagged_arguments(
    lark: Lark,
    name: str,
    schema: Schema,
    opening: Callable[[str], str],
    closing: str,
    words: Mapping[str, Sequence[str]] = NO_WORDS,
) -> str:
    """The arguments of the function `name`, each behind `opening(key)` and before `closing`.

    words: by type, what the family also writes in place of JSON. Raises InvalidRequest (`tools`)
    naming the function.
    """
    parts = [lark.text("")]
    try:
        for argument in arguments_of(schema):
            begin = lark.text(opening(argument.key))
            values = [_value(lark, form, closing, words) for form in argument.forms]
            one = lark.rule(f"{begin} {lark.either(values)}")
            parts.append(one if argument.required else f"{one}?")
    except InvalidRequest as error:
        raise named_function(error, name) from error
    return " ".join(parts)


def _value(lark: Lark, form: Fixed | Open, closing: str, words: Mapping[str, Sequence[str]]) -> str:
    """One value and what closes it."""
    if isinstance(form, Fixed):
        value = form.value
        bare = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return lark.text(bare + closing)
    if "string" not in form.kinds:
        found = [lark.text(word) for kind in sorted(form.kinds) for word in words.get(kind, ())]
        return f"{lark.either([lark.json(form.schema), *found])} {lark.text(closing)}"
    restricted = _restricted(lark, form.schema) if form.kinds == {"string"} else []
    if not restricted:
        return lark.up_to(closing)
    return f"{lark.terminal(' & '.join(restricted))} {lark.text(closing)}"


def _restricted(lark: Lark, schema: Schema) -> list[str]:
    """Terminals whose texts all fit what a schema says of a string; none if it says nothing."""
    found = []
    if isinstance(schema.get("pattern"), str):
        found.append(f"({lark.matching(schema['pattern'], _FREE)})")
    least, most = schema.get("minLength"), schema.get("maxLength")
    if least is not None or most is not None:
        most = "" if most is None else json.dumps(most)
        found.append(f"/{_FREE}{{{json.dumps(least or 0)},{most}}}/")
    return found
