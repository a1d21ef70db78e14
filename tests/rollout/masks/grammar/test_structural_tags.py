"""Structural tags in both of their forms."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.protocol import Grammar
from tests.helpers.grammars import accepts, begins, compiled

INTEGER = {"type": "integer", "minimum": 0, "maximum": 99}
STRUCTURES = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<f=a>", "schema": INTEGER, "end": "</f>"},
        {"begin": "<f=b>", "schema": {"enum": ["x"]}, "end": "</f>"},
    ],
    "triggers": ["<f="],
}
TAG = {"begin": "<f=a>", "content": {"type": "json_schema", "json_schema": INTEGER}, "end": "</f>"}


def tag_of(given: Any) -> Grammar:
    return Grammar(kind="structural_tag", source=json.dumps(given))


def formatted(given: Any) -> Grammar:
    return tag_of({"type": "structural_tag", "format": given})


@pytest.mark.parametrize(
    "text,fits",
    [
        ("", True),
        ("some text", True),
        ('text <f=a>7</f> more <f=b>"x"</f>', True),
        ("a < b", True),
        ("<f=a>7", False),
        ("<f=a>x</f>", False),
        ("<f=c>7</f>", False),
        ("text <f=a>7</f> <f=", False),
    ],
)
def test_text_is_free_until_a_trigger(text: str, fits: bool) -> None:
    assert accepts(tag_of(STRUCTURES), text) == fits
    triggered = {"type": "triggered_tags", "triggers": ["<f="], "tags": [TAG]}
    if "b>" not in text:
        assert accepts(formatted(triggered), text) == fits


def test_how_often_tags_may_come() -> None:
    kind = {"type": "triggered_tags", "triggers": ["<f="], "tags": [TAG]}
    once, twice = "<f=a>1</f>", "<f=a>1</f> <f=a>2</f>"
    least = formatted({**kind, "at_least_one": True})
    assert [accepts(least, text) for text in ("", once, twice, once + "x")] == [
        False,
        True,
        True,
        True,
    ]
    first = formatted({**kind, "stop_after_first": True})
    assert [accepts(first, text) for text in ("", "t", once, twice)] == [True, True, True, False]
    only = formatted({**kind, "at_least_one": True, "stop_after_first": True})
    assert [accepts(only, text) for text in ("", once, once + "x")] == [False, True, False]


FORMATS: list[tuple[Any, list[str], list[str]]] = [
    ({"type": "const_string", "value": "a<|im_end|>"}, ["a<|im_end|>"], ["a"]),
    ({"type": "regex", "pattern": "[0-9]+"}, ["12"], ["x", ""]),
    ({"type": "grammar", "grammar": 'root ::= "x" root | "y"'}, ["xxy"], ["x"]),
    ({"type": "any_text"}, ["", "anything"], []),
    (TAG | {"type": "tag"}, ["<f=a>7</f>"], ["<f=a>7"]),
    (
        {"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"},
        ["<t></t>", "<t>a <t> b</t>"],
        ["<t>a", "<t></t>x</t>"],
    ),
    (
        {
            "type": "sequence",
            "elements": [
                {
                    "type": "tag",
                    "begin": "<think>",
                    "content": {"type": "any_text"},
                    "end": "</think>",
                },
                {"type": "json_schema", "json_schema": INTEGER},
            ],
        },
        ["<think>hm</think>5"],
        ["<think>hm</think>", "5"],
    ),
    (
        {
            "type": "or",
            "elements": [{"type": "const_string", "value": "no"}, TAG | {"type": "tag"}],
        },
        ["no", "<f=a>1</f>"],
        ["yes"],
    ),
    (
        {"type": "tags_with_separator", "tags": [TAG], "separator": ", "},
        ["", "<f=a>1</f>", "<f=a>1</f>, <f=a>2</f>"],
        ["<f=a>1</f>,", "x"],
    ),
]


@pytest.mark.parametrize("given,good,bad", FORMATS, ids=[given["type"] for given, _, _ in FORMATS])
def test_formats(given: Any, good: list[str], bad: list[str]) -> None:
    grammar = formatted(given)
    assert [text for text in good if not accepts(grammar, text)] == []
    assert [text for text in bad if accepts(grammar, text)] == []


def test_a_special_token_that_begins_a_tag_is_the_token() -> None:
    grammar = tag_of(
        {
            "structures": [{"begin": "<|im_start|>call ", "schema": INTEGER, "end": "<|im_end|>"}],
            "triggers": ["<|im_start|>"],
        }
    )
    assert accepts(grammar, "text <|im_start|>call 5<|im_end|> text")
    assert not begins(grammar, "<|im_start|>x")
    assert not begins(grammar, "<|im_end|>")


@pytest.mark.parametrize(
    "given,place",
    [
        ([], "object"),
        ({"type": "text"}, "#/type"),
        ({"structures": 1, "triggers": []}, "#/structures"),
        ({"structures": [], "triggers": ["a"]}, "tags"),
        ({**STRUCTURES, "triggers": ["<g"]}, "triggers"),
        ({**STRUCTURES, "triggers": [""]}, "triggers"),
        ({**STRUCTURES, "x": 1}, "#/x"),
        ({"format": {"type": "qwen_xml"}}, "#/format/type"),
        (
            {"format": {"type": "sequence", "elements": [{"type": "regex"}]}},
            "#/format/elements/0/pattern",
        ),
        (
            {"format": {"type": "json_schema", "json_schema": {"not": {}}}},
            "#/format/json_schema/not",
        ),
        ({"format": {"type": "any_text", "exclude": ["a"]}}, "#/format/exclude"),
    ],
)
def test_what_is_no_tag_is_refused_by_its_place(given: Any, place: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiled(tag_of(given))
    assert place in caught.value.message, caught.value
