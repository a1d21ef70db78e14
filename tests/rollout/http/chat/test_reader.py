"""Texts that are not to be shown, wherever a reply is cut, and calls that break off."""

from __future__ import annotations

from rollout.http.chat.reader import ReplyReader, WithoutTexts, settled
from rollout.parsers.events import CallArguments, CallBegin, CallBroken, Content
from rollout.parsers.formats import select_format
from tests.helpers.scripted_replies import CALL, OTHER_CALL, TEMPLATE, TOOLS


def test_hidden_texts_wherever_the_text_is_cut() -> None:
    text = "a<|x|>b<|<|x|>c<|xy|>d<|x"
    for width in range(1, len(text)):
        found = WithoutTexts(["<|x|>", "<|xy|>"])
        pieces = [found.push(text[i : i + width]) for i in range(0, len(text), width)]
        assert "".join(pieces) + found.close() == "ab<|cd<|x"
    assert WithoutTexts([]).push("a<|x") == "a<|x"


def test_a_reply_without_a_parser_is_content() -> None:
    reader = ReplyReader(None)
    assert reader.is_plain
    assert reader.read(CALL, last=False) == [Content(CALL)]
    assert reader.read("", last=True) == []
    assert reader.reply().content == CALL


def test_the_call_that_is_shown_is_the_first_that_is_one() -> None:
    parser = select_format(TEMPLATE).parser(TOOLS, False)
    reader = ReplyReader(parser, parallel=False)
    reader.whole(f"{CALL[:-14]}, <tool_call> {OTHER_CALL}{CALL}")
    assert [call.name for call in reader.reply().calls] == ["now"]


def test_a_call_that_breaks_off_is_content_of_a_whole_reply() -> None:
    events = [
        CallBegin(0, "a", "f"),
        CallArguments(0, "{}"),
        CallBegin(1, "b", "g"),
        CallArguments(1, "{"),
        CallBroken(1, "<g>{"),
    ]
    assert settled(events) == [*events[:2], Content("<g>{")]
