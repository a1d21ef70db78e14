"""Messages as clients send them, through templates of the kinds that models bring."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequest, UnsupportedOption
from rollout.text.chat_template import ChatTemplate
from rollout.text.messages import normalised_messages, normalised_tools
from rollout.text.template_traits import CallTraits
from tests.helpers.chat_templates import (
    ADDED,
    ARGUMENTS,
    LLAMA3,
    NAMED_RESULTS,
    PARTS,
    QWEN25,
    TOLD_BY_NONE,
    TOOL_LOOP,
    UNGUARDED,
)

USER = {"role": "user", "content": "hi"}
CALL = TOOL_LOOP[2]
COMPILED = [ChatTemplate(source, {}) for source in (QWEN25, LLAMA3, UNGUARDED, ADDED, PARTS)]
DEEP = '{"a":' * 5000 + "1" + "}" * 5000


def render(source: str, messages: list[dict[str, Any]] = TOOL_LOOP, **variables: Any) -> str:
    return ChatTemplate(source, {}).render(messages, add_generation_prompt=False, **variables)


def with_call(**changes: Any) -> list[dict[str, Any]]:
    """A conversation whose one call has these fields in its function."""
    function = {"name": "forecast", "arguments": ARGUMENTS, **changes}
    call = {"id": "call00001", "type": "function", "function": function}
    return [USER, {"role": "assistant", "tool_calls": [call]}]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            QWEN25,
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nWeather?<|im_end|>\n"
            '<|im_start|>assistant\n<tool_call>\n{"name": "forecast", "arguments": '
            + ARGUMENTS
            + "}\n</tool_call><|im_end|>\n"
            "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n",
        ),
        (
            LLAMA3,
            "<|start|>system\nBe brief.<|eot|><|start|>user\nWeather?<|eot|>"
            '<|start|>assistant\n{"name": "forecast", "parameters": '
            + ARGUMENTS
            + "}<|eot|><|start|>ipython\nrain<|eot|>",
        ),
        (
            UNGUARDED,
            f"[system]Be brief.[user]Weather?[assistant]<call forecast {ARGUMENTS}>[tool]rain",
        ),
        (
            ADDED,
            f"[system]Be brief.[user]Weather?[assistant]<call forecast {ARGUMENTS}>[tool]rain",
        ),
        (
            TOLD_BY_NONE,
            f"<system>Be brief.<user>Weather?<call forecast\n{ARGUMENTS}><result>rain",
        ),
        (PARTS, "[system]Be brief.[user]Weather?[assistant][tool]rain"),
        (NAMED_RESULTS, f"Be brief.Weather?<call forecast{ARGUMENTS}<result forecast>rain"),
    ],
    ids=["qwen25", "llama3", "unguarded", "added", "told-by-none", "parts", "named-results"],
)
def test_a_tool_loop_of_an_openai_client(source: str, expected: str) -> None:
    assert render(source) == expected


@pytest.mark.parametrize("source", [QWEN25, LLAMA3, UNGUARDED, ADDED, TOLD_BY_NONE, NAMED_RESULTS])
def test_every_way_to_send_a_call_gives_the_same_text(source: str) -> None:
    expected = render(source, with_call())
    function = {"name": "forecast", "arguments": ARGUMENTS}
    for turn in (
        {"tool_calls": [{"type": "function", "function": function}]},
        {"content": None, "tool_calls": [{"function": {**function, "strict": None}}]},
        {"content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"content": [], "tool_calls": [function]},
        {"content": None, "function_call": function, "tool_calls": None},
        {
            "content": None,
            "tool_calls": [{"function": {**function, "arguments": json.loads(ARGUMENTS)}}],
        },
    ):
        assert render(source, [USER, {"role": "assistant", **turn}]) == expected, turn


@pytest.mark.parametrize(
    ("sent", "written"),
    [
        ("", "{}"),
        (None, "{}"),
        ("{}", "{}"),
        ({}, "{}"),
        ("null", "{}"),
        (" null\n", "{}"),
    ],
)
def test_a_call_without_arguments(sent: Any, written: str) -> None:
    for source in (QWEN25, TOLD_BY_NONE):
        text = render(source, with_call(arguments=sent))
        assert written in text and "null" not in text and '"{}"' not in text


def test_traits_of_templates() -> None:
    def calls(source: str) -> CallTraits:
        return ChatTemplate(source, {}).traits.calls

    assert calls(QWEN25) == CallTraits(null_content=True)
    assert calls(LLAMA3) == CallTraits(null_content=True)
    assert calls(UNGUARDED) == calls(ADDED) == CallTraits()
    assert calls(TOLD_BY_NONE) == CallTraits(
        null_content=True, empty_is_null=True, text_arguments=True
    )
    # Nothing shows a call: content None would be written, or is passed over.
    assert calls("{% for m in messages %}{{ m.content }}{% endfor %}") == CallTraits()
    assert calls("{{ raise_exception('no') }}") == CallTraits()
    assert ChatTemplate(PARTS, {}).traits.content_parts
    assert not ChatTemplate(QWEN25, {}).traits.content_parts


def test_a_developer_stays_where_the_template_knows_one() -> None:
    source = "{% for m in messages %}{{ m.role }} {% endfor %}"
    assert render(source) == "system user assistant tool "
    known = source + "{# developer #}"
    assert render(known) == "developer user assistant tool "


def test_what_says_nothing_is_not_there() -> None:
    keys = "{% for m in messages %}{{ m.keys() | sort | join(',') }};{% endfor %}"
    found = render(keys, [USER, {**CALL, "tool_calls": [], "reasoning_content": "why"}])
    assert found == "content,role;content,reasoning_content,role,thinking;"
    found = render(keys, [{**USER, "name": None}, {**USER, "name": "ann"}])
    assert found == "content,role;content,name,role;"


def test_a_refusal_is_what_the_assistant_said() -> None:
    turn = {"role": "assistant", "content": None, "refusal": "No."}
    assert render(UNGUARDED, [USER, turn]) == "[user]hi[assistant]No."
    parts = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    assert render(UNGUARDED, [USER, parts]) == "[user]hi[assistant]No."


def test_tools_without_nulls_and_no_tools() -> None:
    schema = {"type": "object", "properties": {"x": {"default": None}}}
    tool = {
        "type": "function",
        "function": {"name": "f", "description": None, "parameters": schema, "strict": None},
    }
    assert normalised_tools([tool]) == [
        {"type": "function", "function": {"name": "f", "parameters": schema}}
    ]
    assert normalised_tools([]) is None and normalised_tools(None) is None
    assert "ipython" not in render(LLAMA3, [USER], tools=[])
    assert "strict" not in render(QWEN25, [USER], tools=[tool])


@pytest.mark.parametrize(
    ("message", "field", "words", "kind"),
    [
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "content", "image_url",
         UnsupportedOption),
        ({"content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}, "content",
         r"content\[1\] is a part of type 'input_audio'", UnsupportedOption),
        ({"content": [{"type": "file"}]}, "content", "file", UnsupportedOption),
        ({"content": [{"type": "text", "text": 3}]}, "content", "must be text", InvalidRequest),
        ({"content": ["a"]}, "content", "'type'", InvalidRequest),
        ({"content": 3}, "content", "text or a list", InvalidRequest),
        ({"content": None}, "content", "no content", InvalidRequest),
        ({}, "content", "no content", InvalidRequest),
        ({"content": "a", "audio": {"id": "x"}}, "audio", "audio", UnsupportedOption),
        ({"content": "a", "tool_calls": {}}, "tool_calls", "list", InvalidRequest),
        ({"tool_calls": ["x"]}, "tool_calls[0]", "object", InvalidRequest),
        ({"tool_calls": [{"type": "custom", "custom": {}}]}, "tool_calls[0].type", "custom",
         UnsupportedOption),
        ({"tool_calls": [{"function": {"arguments": "{}"}}]}, "tool_calls[0].function.name",
         "name", InvalidRequest),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{'a': 1}"}}]},
         "tool_calls[0].function.arguments", "no JSON", InvalidRequest),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
         "tool_calls[0].function.arguments", "object", InvalidRequest),
        ({"tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]},
         "tool_calls[0].function.arguments", "nested", InvalidRequest),
        ({"role": "user", "tool_calls": [{"function": {"name": "f"}}]}, "tool_calls[0]",
         "no assistant's", InvalidRequest),
        ({"function_call": {"name": 3}}, "function_call.name", "name", InvalidRequest),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(
    message: dict[str, Any], field: str, words: str, kind: type[InvalidRequest]
) -> None:
    role = "assistant" if message.keys() & {"tool_calls", "function_call"} else "user"
    with pytest.raises(InvalidRequest, match=words) as caught:
        normalised_messages([USER, {"role": role, **message}])
    assert caught.value.field == f"messages[1].{field}"
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("tools", "field"),
    [("f", "tools"), ([3], "tools[0]"), ([{"type": "web_search"}], "tools[0].type")],
)
def test_tools_that_are_no_functions(tools: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        normalised_tools(tools)
    assert caught.value.field == field


def test_messages_of_the_caller_are_left_alone() -> None:
    before = json.dumps(TOOL_LOOP)
    for source in (QWEN25, TOLD_BY_NONE, PARTS):
        render(source)
    assert json.dumps(TOOL_LOOP) == before


TEXTS = [None, "", "a", "{}", '{"a": [1]}', "function", "custom", "\ud800"]
PARTS_OF_TURNS = [
    {"type": "text", "text": "a"},
    [{"type": "text"}],
    [{"type": "text", "text": None}],
]
OTHERS = [3, 1.5, True, [], {}, ["a"], [None], {"name": "f"}, {"name": "f", "arguments": "{}"}]
PIECES = st.sampled_from([*TEXTS, *PARTS_OF_TURNS, *OTHERS])
CALLS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("id", "type", "index", "function", "name", "arguments"), PIECES)
)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "developer", "function", None, 3])},
    optional={
        **dict.fromkeys(
            ("content", "refusal", "audio", "annotations", "name", "tool_call_id"), PIECES
        ),
        "function_call": PIECES | CALLS,
        "tool_calls": PIECES | st.lists(PIECES | CALLS, max_size=2),
    },
)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(messages=st.lists(TURNS, max_size=4))
def test_any_conversation_is_rendered_or_refused(messages: list[dict[str, Any]]) -> None:
    for template in COMPILED:
        with contextlib.suppress(InvalidRequest):
            text = template.render(messages)
            assert "None" not in text
