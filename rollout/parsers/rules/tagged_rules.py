"""Rules of arguments that are written one by one between tags, as bare texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from engine.errors import InvalidRequest, UnsupportedOption
from rollout.parsers.functions import Schema
from rollout.parsers.rules.argument_forms import Fixed, Open, arguments_of
from rollout.parsers.rules.lark import Lark, named_function

NO_WORDS: Mapping[str, Sequence[str]] = MappingProxyType({})
PYTHON_WORDS: Mapping[str, Sequence[str]] = MappingProxyType(
    {"boolean": ("True", "False"), "null": ("None",)}
)

_COMBINING = frozenset({"allOf", "anyOf", "oneOf", "$ref"})
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
        return f"{_bare_json(lark, form.schema, form.kinds, words)} {lark.text(closing)}"
    restricted = _restricted(lark, form.schema)
    if not restricted:
        return lark.up_to(closing)
    found = [f"{lark.terminal(' & '.join(restricted))} {lark.text(closing)}"]
    others = form.kinds - {"string"}
    if others:
        schema = {**form.schema, "type": sorted(others)}
        found.append(f"{_bare_json(lark, schema, others, words)} {lark.text(closing)}")
    return lark.either(found)


def _bare_json(
    lark: Lark, schema: Schema, kinds: frozenset[str], words: Mapping[str, Sequence[str]]
) -> str:
    """A value that is no string."""
    found = [lark.text(word) for kind in sorted(kinds) for word in words.get(kind, ())]
    return lark.either([lark.json(schema), *found])


def _restricted(lark: Lark, schema: Schema) -> list[str]:
    """Terminals whose texts all fit what a schema says of a string; none if it says nothing.
    Raises InvalidRequest for a keyword that is not served there."""
    lark.check({key: value for key, value in schema.items() if key != "format"})
    for keyword in schema.keys() & _COMBINING:
        raise UnsupportedOption(
            f"{keyword!r} of an argument that may be a string says of it what cannot be said where "
            "it stands between tags",
            field="tools",
        )
    found = []
    if "pattern" in schema:
        found.append(f"({lark.matching(schema['pattern'], _FREE)})")
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if least or most != "":
        found.append(f"/{_FREE}{{{least},{most}}}/")
    return found
