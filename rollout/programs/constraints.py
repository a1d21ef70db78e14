"""What the text of a `gen` has to be, in the words that authors of programs use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from engine.errors import InvalidRequest
from engine.protocol import Grammar


def grammar_of_words(
    *,
    regex: str | None = None,
    json_schema: Mapping[str, Any] | str | None = None,
    ebnf: str | None = None,
    choices: Sequence[str] | None = None,
    returns: Any = None,
    grammar: Grammar | None = None,
) -> Grammar | None:
    """The one constraint that is given; None without any.

    returns: a type that msgspec decodes, whose JSON Schema the text has to fit. Raises
    InvalidRequest naming the second of two, or `returns` for a type that has no schema.
    """
    given = {
        "regex": regex,
        "json_schema": json_schema,
        "ebnf": ebnf,
        "choices": choices,
        "returns": returns,
        "grammar": grammar,
    }
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InvalidRequest(
            f"{names[0]} and {names[1]} are both given; a text is held to one", field=names[1]
        )
    match names:
        case []:
            return None
        case ["choices"]:
            return Grammar(kind="choice", source=json.dumps(texts_of(choices)))
        case ["returns"]:
            return Grammar(kind="json_schema", source=json.dumps(schema_of(returns)))
        case ["json_schema"]:
            return Grammar(kind="json_schema", source=_schema_text(json_schema))
        case ["regex"]:
            return Grammar(kind="regex", source=regex or "")
        case ["ebnf"]:
            return Grammar(kind="ebnf", source=ebnf or "")
        case _:
            return grammar


def texts_of(choices: Any) -> list[str]:
    """The texts of some choices. Raises InvalidRequest (`choices`) for anything else, such as one
    text, whose characters nobody means."""
    found = list(choices) if isinstance(choices, Iterable) else []
    if isinstance(choices, str) or not found or not all(isinstance(each, str) for each in found):
        raise InvalidRequest(
            f"choices is {repr(choices)[:100]}; give a list of one text or more", field="choices"
        )
    return found


def _schema_text(schema: Any) -> str:
    """A JSON Schema as text. Raises InvalidRequest (`json_schema`) for what JSON cannot say."""
    try:
        return schema if isinstance(schema, str) else json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"json_schema is no JSON: {error}", field="json_schema") from error


def schema_of(kind: Any) -> dict[str, Any]:
    """The JSON Schema of a type. Raises InvalidRequest (`returns`) for one that has none."""
    try:
        return msgspec.json.schema(kind)
    except TypeError as error:
        raise InvalidRequest(f"returns is {kind!r}: {error}", field="returns") from error


def value_of(text: str, kind: Any, name: str) -> Any:
    """The text of variable `name` as a value of a type. Raises InvalidRequest naming the variable
    for a text that was cut off by its length."""
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError as error:
        raise InvalidRequest(
            f"{name}: the text is no whole {getattr(kind, '__name__', kind)} ({error}); allow it "
            "more max_new_tokens",
            field=name,
        ) from error
