"""Grammars of a turn: forced calls, an answer, or either, behind thinking that may be there."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import UnsupportedOption
from engine.protocol import Grammar
from rollout.http.chat.constraint import ThinkingMarks, turn_grammar
from rollout.http.chat.tool_choice import tool_choice
from rollout.http.openai.bodies import ChatBody
from rollout.parsers.formats import ReplyFormat, select_format
from tests.helpers.byte_matcher import ByteVocabulary
from tests.helpers.scripted_replies import TOOLS

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "f", "schema": SCHEMA}}
CALL = '<tool_call>\n{"name": "forecast", "arguments": {"city": "Oslo"}}\n</tool_call>'
OTHER_CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
ANSWER = '{"a": 1}'
HERMES = select_format(None, "hermes", "qwen3")
THOUGHT = "<think>\nHm {<tool_call></thin.\n</think>\n\n"


def marks_of(vocabulary: ByteVocabulary, *, opening: str | None = "<think>") -> ThinkingMarks:
    ids = {mark: vocabulary.special_token_id(mark) for mark in ("<think>", "</think>")}
    return ThinkingMarks(
        opening=opening,
        closing="</think>",
        end_ids=vocabulary.ids("</think>"),
        special={mark: token_id for mark, token_id in ids.items() if token_id is not None},
    )


def grammar_of(
    marks: ThinkingMarks | None = None, found: ReplyFormat = HERMES, **fields: Any
) -> Grammar | None:
    body = ChatBody(messages=[], **fields)
    return turn_grammar(body, tool_choice(body), found, marks)


def accepted(grammar: Grammar | None, texts: list[str], vocabulary: ByteVocabulary) -> list[bool]:
    assert grammar is not None and grammar.kind == "lark"
    return [vocabulary.accepts(grammar, text) for text in texts]


def test_nothing_is_asked_of_a_turn_that_may_call() -> None:
    assert grammar_of() is None
    assert grammar_of(tools=TOOLS, response_format={"type": "text"}) is None
    assert grammar_of(tools=TOOLS, marks=marks_of(ByteVocabulary())) is None


def test_calls_that_are_forced() -> None:
    bytewise = ByteVocabulary()
    texts = [CALL, OTHER_CALL, f"{CALL}\n{OTHER_CALL}", "hi", f"{THOUGHT}{CALL}", ANSWER]
    required: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required"}
    found = accepted(grammar_of(**required), texts, bytewise)
    assert found == [True, True, True, False, False, False]
    found = accepted(grammar_of(**required, parallel_tool_calls=False), texts, bytewise)
    assert found == [True, True, False, False, False, False]
    named = {"type": "function", "function": {"name": "now"}}
    found = accepted(grammar_of(tools=TOOLS, tool_choice=named), texts, bytewise)
    assert found == [False, True, False, False, False, False]
    # A format is that of an answer.
    found = accepted(grammar_of(**required, response_format=FORMAT), texts, bytewise)
    assert found == [True, True, True, False, False, False]


@pytest.mark.parametrize("special", [False, True])
def test_thinking_may_come_first(special: bool) -> None:
    vocabulary = ByteVocabulary(("<think>", "</think>") if special else ())
    marks = marks_of(vocabulary)
    texts = [CALL, f"{THOUGHT}{CALL}", f"<think></think>{CALL}", THOUGHT, f"Hm.{CALL}", ANSWER]
    calls = grammar_of(marks, tools=TOOLS, tool_choice="required")
    assert accepted(calls, texts, vocabulary) == [True, True, True, False, False, False]
    texts = [ANSWER, f"{THOUGHT}{ANSWER}", f"{THOUGHT}{CALL}", "<think>Hm.", f"{THOUGHT}Yes."]
    answer = grammar_of(marks, response_format=FORMAT)
    assert accepted(answer, texts, vocabulary) == [True, True, False, False, False]
    either = grammar_of(marks, tools=TOOLS, response_format=FORMAT)
    assert accepted(either, texts, vocabulary) == [True, True, True, False, False]


def test_thinking_that_the_prompt_began_ends_before_the_constraint() -> None:
    marks = marks_of(ByteVocabulary(), opening=None)
    for fields in (
        {"response_format": FORMAT},
        {"structured_outputs": {"regex": "a"}},
        {"tools": TOOLS, "tool_choice": "required"},
    ):
        plain, found = grammar_of(**fields), grammar_of(marks, **fields)
        assert plain is not None and found is not None
        assert (found.kind, found.source) == (plain.kind, plain.source)
        assert found.after_ids == list(b"</think>") and plain.after_ids == []


def test_rules_that_the_body_brings_are_left_as_they_are() -> None:
    rules = "start: thought\nthought: /a/"
    found = grammar_of(marks_of(ByteVocabulary()), structured_outputs={"grammar": rules})
    assert found is not None and found.source == rules and found.after_ids


def test_an_answer_in_json_or_calls() -> None:
    texts = [CALL, f"{OTHER_CALL}\n{CALL}", ANSWER, f"{ANSWER}{CALL}", "hi", '{"b": 1}']
    either = grammar_of(tools=TOOLS, response_format=FORMAT)
    assert accepted(either, texts, ByteVocabulary()) == [True, True, True, False, False, False]
    either = grammar_of(tools=TOOLS, response_format={"type": "json_object"})
    assert accepted(either, texts, ByteVocabulary()) == [True, True, True, False, False, True]
    # Calls of a family whose form is not known would not be read.
    unknown = select_format(None, "none", "none")
    answer = grammar_of(found=unknown, tools=TOOLS, response_format=FORMAT)
    assert answer is not None and answer.kind == "json_schema"
    assert grammar_of(tools=TOOLS, tool_choice="none", response_format=FORMAT) == answer
    with pytest.raises(UnsupportedOption) as caught:
        grammar_of(tools=TOOLS, structured_outputs={"choice": ["a"]})
    assert caught.value.field == "structured_outputs.choice"
