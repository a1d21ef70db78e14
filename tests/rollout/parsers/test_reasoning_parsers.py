"""The thinking block of a reply: opened by the prompt, by the reply or by nobody, cut anywhere."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.parsers.events import Content, Reasoning
from rollout.parsers.formats import REASONING_PARSERS, ReplyFormat, select_format
from tests.helpers.reply_events import events_of, said, streamed

FORMATS = {name: select_format(None, None, name) for name in REASONING_PARSERS}
TAGS = {name: (found.opening, found.closing) for name, found in REASONING_PARSERS.items()}
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def with_calls(name: str) -> ReplyFormat:
    return select_format(None, "hermes", name)


@pytest.mark.parametrize("name", FORMATS)
def test_a_block_that_the_reply_opens(name: str) -> None:
    opening, closing = TAGS[name]
    text = f"\n{opening}\nFirst,\n\n1 < 2. \n{closing}\n\nSo 3.\n"
    whole = events_of(FORMATS[name], [text])
    assert whole == [Reasoning("First,\n\n1 < 2."), Content("So 3.\n")]
    for at in range(len(text)):
        assert streamed(events_of(FORMATS[name], [text[:at], text[at:]])) == streamed(whole)
    assert streamed(events_of(FORMATS[name], text)) == streamed(whole)


@pytest.mark.parametrize("name", FORMATS)
def test_a_block_that_the_prompt_opened(name: str) -> None:
    opening, closing = TAGS[name]
    text = f"hm{closing}yes{closing}"
    expected = (f"yes{closing}", "hm", [])
    assert said(events_of(FORMATS[name], text, thinking=True)) == expected
    assert said(events_of(FORMATS[name], [opening + text], thinking=True)) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_a_reply_without_a_block(name: str) -> None:
    opening, closing = TAGS[name]
    text = f" plain {opening} words {closing}\n"
    assert said(events_of(FORMATS[name], text)) == (text, "", [])


@pytest.mark.parametrize("name", FORMATS)
def test_a_block_that_is_never_closed_is_all_reasoning(name: str) -> None:
    _, closing = TAGS[name]
    text = f"thinking {closing[:-1]} \n"
    assert said(events_of(FORMATS[name], text, thinking=True)) == ("", text, [])


@pytest.mark.parametrize("name", FORMATS)
def test_calls_are_looked_for_behind_the_block(name: str) -> None:
    opening, closing = TAGS[name]
    text = f"{opening}\nI write\n{CALL}\n{closing}\n\n{CALL}"
    events = events_of(with_calls(name), text)
    assert said(events) == ("", f"I write\n{CALL}", [("now", "{}")])


def test_reasoning_comes_while_it_is_written() -> None:
    parser = FORMATS["qwen3"].parser([], False)
    assert parser.push("<think>\nA") == [Reasoning("A")]
    assert parser.push("b </th") == [Reasoning("b")]
    assert parser.push("is") == [Reasoning(" </this")]
    assert parser.push("</think>") == []
    assert parser.push("\nYes") == [Content("Yes")]
    assert parser.push(".") == [Content(".")]
    assert parser.close() == []


@pytest.mark.parametrize(
    "name,prompt,expected",
    [
        ("qwen3", "<|im_start|>assistant\n<think>\n", True),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("qwen3", "<|im_start|>assistant\n", False),
        ("deepseek-r1", "<｜Assistant｜>", True),
        ("deepseek-r1", "<｜Assistant｜><think>\n\n</think>\n", False),
        ("mistral", "[/INST]", False),
        ("none", "<think>", False),
    ],
)
def test_where_a_reply_begins(name: str, prompt: str, expected: bool) -> None:
    assert select_format(None, None, name).prompt_ends_in_thinking(prompt) is expected


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    parts=st.lists(
        st.sampled_from(["<think>", "</think>", "[THINK]", "[/THINK]", " ", "\n", "<", "/", "a"]),
        max_size=20,
    ),
    thinking=st.booleans(),
)
def test_any_text_is_split_the_same_however_it_comes(
    name: str, parts: list[str], thinking: bool
) -> None:
    text = "".join(parts)
    whole = events_of(FORMATS[name], [text], thinking=thinking)
    assert streamed(events_of(FORMATS[name], parts, thinking=thinking)) == streamed(whole)
    content, reasoning, _ = said(whole)
    rest = iter(text)
    assert all(char in rest for char in reasoning + content)
    lost = len(text.replace(" ", "").replace("\n", "")) - len(
        (reasoning + content).replace(" ", "").replace("\n", "")
    )
    opening, closing = TAGS[name]
    assert lost in (0, len(opening), len(closing), len(opening + closing))
