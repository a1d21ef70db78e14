"""What the text of a turn must be: calls that are forced, what the body asks for, or either, behind
what the model thinks first."""

from __future__ import annotations

import json
from dataclasses import dataclass

import msgspec

from engine.errors import UnsupportedOption
from engine.protocol import Grammar
from rollout.http.chat.tool_choice import ToolChoice
from rollout.http.openai.bodies import ChatBody
from rollout.http.openai.structured import grammar_of_body
from rollout.parsers.formats import ReplyFormat

_OF_JSON = {"json_schema": "", "json_object": '{"type": "object"}'}
"""Kinds of grammars whose texts are JSON, and the schema of those that have none of their own."""


@dataclass(frozen=True, kw_only=True)
class ThinkingMarks:
    """The marks of a thinking block that a reply begins in, or may begin with. opening: None where
    the prompt has opened it. end_ids: the tokens of the closing one. special: ids of the marks that
    are special tokens, by their text."""

    opening: str | None
    closing: str
    end_ids: list[int]
    special: dict[str, int]


def turn_grammar(
    body: ChatBody, choice: ToolChoice, reply_format: ReplyFormat, marks: ThinkingMarks | None
) -> Grammar | None:
    """The language of a turn's text, None for any text.

    marks: None where the reply has no thinking block. Raises InvalidRequest for a format that
    cannot be read, UnsupportedOption for one of a kind that is not served, or not beside calls that
    the model may make.
    """
    asked = grammar_of_body(body)
    found = _forced_or_asked(body, choice, reply_format, asked)
    if found is None or marks is None:
        return found
    # Rules that the body brings may have any names, and are left alone.
    ours = found.kind in _OF_JSON or asked is None or found is not asked[1]
    if marks.opening is None or not ours:
        return msgspec.structs.replace(found, after_ids=marks.end_ids)
    return Grammar(kind="lark", source="\n".join([*_thought(marks), *_rules(found, "reply")]))


def _forced_or_asked(
    body: ChatBody,
    choice: ToolChoice,
    reply_format: ReplyFormat,
    asked: tuple[str, Grammar] | None,
) -> Grammar | None:
    tools = body.tools or []
    if choice.forced:
        return reply_format.force(tools, choice.name, choice.parallel)
    if asked is None:
        return None
    field, grammar = asked
    if choice.mode == "none" or reply_format.tool_parser is None:
        return grammar
    if grammar.kind not in _OF_JSON:
        raise UnsupportedOption(
            f"{field} is served beside tools where it asks for JSON alone; set tool_choice to "
            "'none' or 'required'",
            field=field,
        )
    calls = _rules(reply_format.force(tools, None, choice.parallel), "calls")
    lines = ["start: calls | answer", *_rules(grammar, "answer"), *calls]
    return Grammar(kind="lark", source="\n".join(lines))


def _rules(grammar: Grammar, name: str) -> list[str]:
    """The rules, in Lark, of a grammar that is of JSON or was made here: there `start` is the first
    line, which is to be called `name`."""
    if grammar.kind in _OF_JSON:
        return [f"{name}: %json {grammar.source or _OF_JSON[grammar.kind]}"]
    first, *others = grammar.source.split("\n")
    assert grammar.kind == "lark" and first.startswith("start: "), "calls are written in Lark"
    return [f"{name}: {first.removeprefix('start: ')}", *others]


def _thought(marks: ThinkingMarks) -> list[str]:
    """Rules by which an answer may follow a block of free text: a reply that does not begin with
    the opening mark is the answer."""

    def mark(text: str) -> str:
        token_id = marks.special.get(text)
        return json.dumps(text) if token_id is None else f"<[{token_id}]>"

    # A special token ends free text by itself.
    lazy = "" if marks.closing in marks.special else "[lazy]"
    return [
        "start: reply | thought reply",
        f"thought: {mark(marks.opening or '')} thought_rest THOUGHT_END",
        f"thought_rest{lazy}: THOUGHT_TEXT {mark(marks.closing)}",
        "THOUGHT_TEXT: /(?s:.*)/",
        r"THOUGHT_END: /\s*/",
    ]
