"""Every family's calls: cut anywhere, among content, malformed, of functions nobody offered."""

from __future__ import annotations

from rollout.parsers.events import CallBegin
from rollout.parsers.formats import select_format
from tests.helpers.reply_events import argument_pieces, events_of, said, streamed

HERMES = select_format("<tool_call>")
CALL = '<tool_call>\n{"name": "forecast", "arguments": {"city": "</tool_call>"}}\n</tool_call>'


def test_a_reply_may_be_cut_anywhere() -> None:
    text = f"Look:\n{CALL}\n{CALL} and\n"
    whole = streamed(events_of(HERMES, [text]))
    assert said(events_of(HERMES, [text])) == (
        "Look: and\n",
        "",
        [("forecast", '{"city": "</tool_call>"}')] * 2,
    )
    assert streamed(events_of(HERMES, text)) == whole
    for at in range(len(text)):
        assert streamed(events_of(HERMES, [text[:at], text[at:]])) == whole


def test_arguments_come_while_they_are_written() -> None:
    events = events_of(HERMES, CALL)
    assert isinstance(events[0], CallBegin)
    assert len(argument_pieces(events)) > 10


def test_a_call_of_an_unknown_function_is_content() -> None:
    text = CALL.replace("forecast", "other")
    assert said(events_of(HERMES, [text])) == (text, "", [])
