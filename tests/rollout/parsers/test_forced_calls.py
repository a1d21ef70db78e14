"""Grammars of forced calls: what the family's templates write fits them, and nothing else does."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest

from engine.errors import InvalidRequest, UnsupportedOption
from rollout.parsers.formats import TOOL_PARSERS, ReplyFormat, select_format
from tests.helpers.byte_matcher import ByteVocabulary
from tests.helpers.call_templates import CALL_TEMPLATES, written
from tests.helpers.reply_events import TOOLS, WEATHER, events_of, said

Calls = list[tuple[str, dict[str, Any]]]

# Those that the grammars write: without a token before them that may be left out.
KINDS = [kind for kind in CALL_TEMPLATES if "token" not in kind]
WHOLE = {
    "city": "Zürich \"'\\ 😀\n<b>",
    "days": -2,
    "ratio": 1.5,
    "hourly": True,
    "note": "five",
    "tags": ["a", ""],
    "where": {"deep": [1, {"er": None}]},
}
FULL: Calls = [("forecast", WHOLE)]
BOUNDED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "code": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["a", "b<", 3, None, True]},
        "count": {"type": "integer", "minimum": 5, "maximum": 900},
        "flag": {"type": "boolean"},
        "size": {"$ref": "#/$defs/Size"},
        "pair": {
            "type": "array",
            "items": {"type": "boolean"},
            "maxItems": 2,
        },
        "word": {"type": "string", "pattern": "^[a-f]{2,4}$"},
        "maybe": {"anyOf": [{"type": "null"}, {"const": "yes"}]},
    },
    "required": ["count", "word"],
    "additionalProperties": False,
    "$defs": {"Size": {"type": "number", "minimum": 0, "maximum": 50}},
}
BOUNDED_TOOLS = [
    {"type": "function", "function": {"name": "first", "parameters": BOUNDED}},
    {"type": "function", "function": {"name": "second"}},
]


def vocabulary_and_format(kind: str, *, special: bool) -> tuple[ByteVocabulary, ReplyFormat]:
    name = CALL_TEMPLATES[kind][0]
    vocabulary = ByteVocabulary(TOOL_PARSERS[name].markers if special else ())
    found = select_format(None, name, special_token_id=vocabulary.special_token_id)
    return vocabulary, found


def own(kind: str, calls: Calls) -> str:
    return written(CALL_TEMPLATES[kind][1], calls).strip()


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mistral"])
def test_what_a_template_writes_is_a_forced_call(kind: str, special: bool) -> None:
    vocabulary, found = vocabulary_and_format(kind, special=special)
    one, two = own(kind, FULL), own(kind, [*FULL, ("now", {})])
    required = found.force(TOOLS, None, False)
    assert vocabulary.accepts(required, one)
    assert vocabulary.accepts(required, own(kind, [("now", {})]))
    assert vocabulary.accepts(required, own(kind, [("forecast", {"city": ""})]))
    assert not vocabulary.accepts(required, two)
    assert vocabulary.accepts(found.force(TOOLS, None, True), one)
    assert vocabulary.accepts(found.force(TOOLS, None, True), two)
    three = own(kind, [*FULL, ("now", {}), ("now", {})])
    assert vocabulary.accepts(found.force(TOOLS, None, True), three)
    assert vocabulary.accepts(found.force(TOOLS, "forecast", True), one)
    assert not vocabulary.accepts(found.force(TOOLS, "now", True), one)


def test_the_list_of_mistral() -> None:
    """Its templates write ids behind calls, which models of that form do not."""
    vocabulary, found = vocabulary_and_format("mistral", special=True)
    call = '{"name": "forecast", "arguments": {"city": "Bern"}}'
    grammar = found.force(TOOLS, None, True)
    assert vocabulary.accepts(grammar, f"[TOOL_CALLS] [{call}]")
    assert vocabulary.accepts(grammar, f"[TOOL_CALLS][{call}, {call}]")
    assert not vocabulary.accepts(grammar, f"[TOOL_CALLS][{call}")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_call_of_the_tools_is_refused(kind: str) -> None:
    vocabulary, found = vocabulary_and_format(kind, special=True)
    grammar = found.force(TOOLS, None, False)
    good = own(kind, [("forecast", {"city": "Bern"})])
    for text in (
        "Hello",
        f"So: {good}",
        good[:-1],
        good + "!",
        own(kind, [("unheard_of", {})]),
        own(kind, [("forecast", {})]),
        own(kind, [("forecast", {"city": "a", "days": 1.5})]),
        own(kind, [("forecast", {"city": "a", "days": "soon"})]),
        own(kind, [("forecast", {"city": "a", "tags": [1]})]),
        own(kind, [("now", {"city": "a"})]),
    ):
        assert not vocabulary.accepts(grammar, text), text


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_drawn_is_read_as_calls_that_fit(kind: str, special: bool) -> None:
    vocabulary, found = vocabulary_and_format(kind, special=special)
    grammar = found.force(BOUNDED_TOOLS, None, True)
    called = set()
    for seed in range(6):
        text = vocabulary.drawn(grammar, seed)
        content, _, calls = said(events_of(found, [text], BOUNDED_TOOLS))
        assert content == ""
        assert calls
        for name, arguments in calls:
            called.add(name)
            schema = BOUNDED if name == "first" else {"maxProperties": 0}
            jsonschema_rs.validate(schema, json.loads(arguments))
    assert called == {"first", "second"}


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_that_may_all_be_left_out(kind: str) -> None:
    tools = [
        {
            "name": "look",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "integer"} for key in "abc"},
            },
        }
    ]
    vocabulary, found = vocabulary_and_format(kind, special=False)
    grammar = found.force(tools, "look", False)
    for keys in ("", "a", "b", "c", "ab", "ac", "bc", "abc"):
        text = own(kind, [("look", dict.fromkeys(keys, 1))])
        if kind == "mistral":
            text = text.replace(', "id": "call00000"', "")
        assert vocabulary.accepts(grammar, text), text


def test_a_closing_tag_within_a_text_goes_on_with_it() -> None:
    vocabulary, found = vocabulary_and_format("qwen3-coder", special=False)
    calls: Calls = [("forecast", {"city": "</parameter>\n</parameter> </function>"})]
    text = own("qwen3-coder", calls)
    assert vocabulary.accepts(found.force(TOOLS, None, False), text)


def refused(name: str, tools: Any, choice: str | None = None) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        select_format(None, name).force(tools, choice, True)
    return caught.value


def test_a_choice_that_cannot_be() -> None:
    assert refused("hermes", TOOLS, "unheard_of").field == "tool_choice"
    assert refused("hermes", []).field == "tool_choice"
    with pytest.raises(UnsupportedOption, match="--tool-parser") as caught:
        select_format("no marks").force(TOOLS, None, True)
    assert caught.value.field == "tool_choice"


@pytest.mark.parametrize("name", ["qwen3-coder", "glm", "pythonic"])
@pytest.mark.parametrize(
    "parameters",
    [
        {**WEATHER, "anyOf": [{"required": ["days"]}]},
        {"type": "object", "properties": []},
        {"type": "object", "properties": {"a": False}},
        {"type": "object", "properties": {"a</b": {}}},
        {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}},
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/d0"}},
            "$defs": {
                f"d{at}": {"anyOf": [{"$ref": f"#/$defs/d{at + 1}"}] * 8 + [{"const": at}]}
                for at in range(12)
            },
        },
    ],
)
def test_parameters_that_cannot_be_written_one_by_one(name: str, parameters: Any) -> None:
    error = refused(name, [{"name": "look", "parameters": parameters}])
    assert error.field == "tools"
    assert "look" in error.message or "a</b" in error.message


@pytest.mark.parametrize("name", ["hermes", "mistral-args", "qwen3-coder", "pythonic"])
def test_a_schema_that_is_not_served_names_function_and_place(name: str) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "integer", "not": {"const": 1}}}}
    error = refused(name, [{"name": "look", "parameters": parameters}])
    assert error.field == "tools"
    assert "'look'" in error.message and "/not" in error.message


@pytest.mark.parametrize(
    "pattern,fits,others",
    [
        ("b+", ["abbc", "b"], ["", "a"]),
        ("^b+$", ["bb"], ["abb", ""]),
        ("^a|b", ["a", "ab"], ["ca", ""]),
        (r"^\d/\d$", ["1/2"], ["12"]),
        (r"^a\$", ["a$", "a$b"], ["a"]),
    ],
)
def test_a_pattern_between_tags(pattern: str, fits: list[str], others: list[str]) -> None:
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "string", "pattern": pattern}},
        "required": ["a"],
    }
    vocabulary, found = vocabulary_and_format("glm", special=False)
    grammar = found.force([{"name": "look", "parameters": parameters}], None, False)
    for text in fits:
        assert vocabulary.accepts(grammar, own("glm", [("look", {"a": text})])), text
    for text in others:
        assert not vocabulary.accepts(grammar, own("glm", [("look", {"a": text})])), text


@pytest.mark.parametrize("name", ["qwen3-coder", "glm"])
@pytest.mark.parametrize(
    "schema", [{"type": "string", "allOf": [{"minLength": 3}]}, {"type": "string", "not": {}}]
)
def test_what_cannot_be_said_of_a_text_between_tags(name: str, schema: dict[str, Any]) -> None:
    parameters = {"type": "object", "properties": {"a": schema}}
    assert refused(name, [{"name": "look", "parameters": parameters}]).field == "tools"


def test_a_restricted_text_or_something_else() -> None:
    schema = {"type": ["string", "null", "integer"], "maxLength": 2, "minimum": 5}
    parameters = {"type": "object", "properties": {"a": schema}}
    vocabulary, found = vocabulary_and_format("qwen3-coder", special=False)
    grammar = found.force([{"name": "look", "parameters": parameters}], None, False)
    for value, fits in (("ab", True), (None, True), (700, True), ("abc", False)):
        text = own("qwen3-coder", [("look", {"a": value})])
        assert vocabulary.accepts(grammar, text) is fits, text
