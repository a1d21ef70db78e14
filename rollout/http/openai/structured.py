"""What OpenAI's bodies say the text of a reply must be: `response_format`, vLLM's
`structured_outputs` and the older `guided_*`, and SGLang's `json_schema`, `regex`, `ebnf` and
`structural_tag`."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from engine.errors import InvalidRequest, UnsupportedOption
from engine.protocol import Grammar, GrammarKind
from engine.protocol.types import MAX_GRAMMAR_CHARS, GrammarSource
from rollout.masks.grammar.requested import from_source, in_field


class StructuredFields(msgspec.Struct, kw_only=True):
    """The fields of a body; at most one of them constrains."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | GrammarSource | None = None
    guided_regex: GrammarSource | None = None
    guided_choice: list[str] | None = None
    guided_grammar: GrammarSource | None = None
    json_schema: dict[str, Any] | GrammarSource | None = None
    regex: GrammarSource | None = None
    ebnf: GrammarSource | None = None
    structural_tag: dict[str, Any] | GrammarSource | None = None


_FORMATS = ("text", "json_object", "json_schema", "structural_tag")
_SERVED = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_UNSERVED = (
    "disable_additional_properties",
    "disable_any_whitespace",
    "disable_fallback",
    "whitespace_pattern",
)
"""Options of `structured_outputs` that ask for a form of JSON, or for another engine's code."""

Named = tuple[str, Grammar]


def grammar_of_body(body: StructuredFields) -> Named | None:
    """The field of `body` that constrains its reply, and how; None where none does.

    Raises InvalidRequest for two, and for a field that says nothing of the kind; UnsupportedOption
    for an option that is not served. Whether the grammar is one is looked at later.
    """
    found = [
        *_of_format(body.response_format),
        *_of_options(body.structured_outputs),
        *_plain("guided_json", "json_schema", body.guided_json),
        *_plain("guided_regex", "regex", body.guided_regex),
        *_plain("guided_choice", "choice", body.guided_choice),
        *_of_rules("guided_grammar", body.guided_grammar),
        *_plain("json_schema", "json_schema", body.json_schema),
        *_plain("regex", "regex", body.regex),
        *_plain("ebnf", "ebnf", body.ebnf),
        *_plain("structural_tag", "structural_tag", body.structural_tag),
    ]
    if len(found) > 1:
        (first, _), (second, _) = found[:2]
        raise InvalidRequest(
            f"{first} and {second} constrain the same reply; send one of them", field=second
        )
    return found[0] if found else None


def named_grammar(error: InvalidRequest, body: StructuredFields) -> InvalidRequest:
    """An error of the grammar of `body` with the name of its field; others as they are."""
    prefix, _, name = error.field.rpartition(".")
    found = grammar_of_body(body) if name == "grammar" else None
    if found is None:
        return error
    plain = in_field(type(error)(error.message, field="grammar"), found[0])
    field = f"{prefix}.{found[0]}" if prefix else found[0]
    return type(error)(plain.message, field=field)


def _of_format(given: dict[str, Any] | None) -> list[Named]:
    if given is None:
        return []
    kind = given.get("type")
    if kind == "text":
        return []
    if kind == "json_object":
        return [("response_format", Grammar(kind="json_object", source=""))]
    if kind == "json_schema":
        return [_of_schema(given.get("json_schema"))]
    if kind == "structural_tag":
        return _plain("response_format", "structural_tag", given)
    raise InvalidRequest(
        f"response_format.type is {_show(kind)}; give one of {', '.join(_FORMATS)}",
        field="response_format.type",
    )


def _of_schema(given: Any) -> Named:
    """OpenAI's `json_schema`: a schema with a name. `strict` is taken either way: a schema is
    always held to."""
    field = "response_format.json_schema"
    if not isinstance(given, dict):
        raise InvalidRequest(f"{field} is {_show(given)}; give an object", field=field)
    known = ("name", "description", "schema", "strict")
    for name in given:
        if name not in known:
            raise InvalidRequest(
                f"{field}.{name} is no field of it; known are {', '.join(known)}",
                field=f"{field}.{name}",
            )
    if not isinstance(given.get("name"), str):
        raise InvalidRequest(f"{field}.name is missing; give a text", field=f"{field}.name")
    schema = given.get("schema")
    if schema is None:
        # OpenAI's own default: any object.
        return field, Grammar(kind="json_object", source="")
    return f"{field}.schema", _grammar(f"{field}.schema", "json_schema", schema)


def _of_options(given: dict[str, Any] | None) -> list[Named]:
    if given is None:
        return []
    field = "structured_outputs"
    for name, value in given.items():
        if name in _UNSERVED and value:
            raise UnsupportedOption(
                f"{field}.{name} is not served by this engine; leave it out",
                field=f"{field}.{name}",
            )
        if name not in _SERVED and name not in _UNSERVED:
            raise InvalidRequest(
                f"{field}.{name} is no field of it; known are {', '.join(_SERVED)}",
                field=f"{field}.{name}",
            )
    found = [
        *_plain(f"{field}.json", "json_schema", given.get("json")),
        *_plain(f"{field}.regex", "regex", given.get("regex")),
        *_plain(f"{field}.choice", "choice", given.get("choice")),
        *_of_rules(f"{field}.grammar", given.get("grammar")),
        *_plain(f"{field}.structural_tag", "structural_tag", given.get("structural_tag")),
    ]
    if given.get("json_object"):
        found.append((f"{field}.json_object", Grammar(kind="json_object", source="")))
    return found


def _of_rules(field: str, value: Any) -> list[Named]:
    """Rules of either form: GBNF defines them by `::=`, Lark by `:`."""
    ebnf = isinstance(value, str) and "::=" in value
    return _plain(field, "ebnf" if ebnf else "lark", value)


def _plain(field: str, kind: GrammarKind, value: Any) -> list[Named]:
    return [] if value is None or value == "" else [(field, _grammar(field, kind, value))]


def _grammar(field: str, kind: GrammarKind, value: Any) -> Grammar:
    if kind in ("json_schema", "structural_tag", "choice") and not isinstance(value, str):
        source = json.dumps(value)
    elif isinstance(value, str) and kind != "choice":
        source = value
    else:
        what = "a list of texts" if kind == "choice" else "text"
        raise InvalidRequest(f"{field} is {_show(value)}; give {what}", field=field)
    if len(source) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(
            f"{field} has {len(source)} characters; the most is {MAX_GRAMMAR_CHARS}", field=field
        )
    return from_source(kind, source)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
