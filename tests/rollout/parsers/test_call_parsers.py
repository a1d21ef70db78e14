"""Every family's calls: as its templates write them, cut anywhere, among content, malformed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequest
from rollout.parsers.calls import CallParser
from rollout.parsers.events import CallArguments, CallBegin, CallBroken, Content, collect
from rollout.parsers.formats import TOOL_PARSERS, select_format
from rollout.parsers.functions import offered_functions
from tests.helpers.call_templates import CALL_TEMPLATES, written
from tests.helpers.reply_events import TOOLS, argument_pieces, events_of, said, streamed

FORMATS = {name: select_format(None, name) for name in TOOL_PARSERS}
CALLS: list[tuple[str, dict[str, Any]]] = [
    (
        "forecast",
        {
            "city": "ü😀\\u00e9 \"'</tool_call>\n",
            "ratio": -1.5e-7,
            "hourly": True,
            "note": None,
            "tags": ["</parameter>", "]"],
            "where": {"a": [{"b": [[], {}]}, 2]},
        },
    ),
    ("now", {}),
]
OWN = pytest.mark.parametrize("kind", CALL_TEMPLATES)
MARKERS = sorted({mark for family in TOOL_PARSERS.values() for mark in family.markers})


def parsed(kind: str, pieces: Any) -> Any:
    return events_of(FORMATS[CALL_TEMPLATES[kind][0]], pieces)


def own(kind: str, calls: list[tuple[str, dict[str, Any]]] = CALLS, content: str = "") -> str:
    return written(CALL_TEMPLATES[kind][1], calls, content)


def found_calls(events: Any) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in said(events)[2]]


@OWN
def test_what_a_template_writes_is_read_wherever_it_is_cut(kind: str) -> None:
    text = own(kind, content="See [1] {2} <b>")
    whole = parsed(kind, [text])
    assert said(whole)[0] == "See [1] {2} <b>"
    assert found_calls(whole) == CALLS
    expected = streamed(whole)
    assert streamed(parsed(kind, text)) == expected
    for at in range(1, len(text)):
        assert streamed(parsed(kind, [text[:at], text[at:]])) == expected, text[:at]


@OWN
def test_a_whole_reply_that_ends_anywhere_loses_nothing(kind: str) -> None:
    text = own(kind)
    for at in range(len(text)):
        events = parsed(kind, [text[:at]])
        content, _, calls = said(events)
        assert all(CALLS[index][0] == name for index, (name, _) in enumerate(calls))
        if calls:
            assert content in text
        else:
            assert content == text[:at]


@OWN
def test_arguments_come_while_they_are_written(kind: str) -> None:
    events = parsed(kind, own(kind, [("forecast", {"city": "a long name of a town"})]))
    pieces = argument_pieces(events)
    assert len(pieces) > 10
    assert json.loads("".join(pieces)) == {"city": "a long name of a town"}
    assert isinstance(events[0], CallBegin)


@OWN
def test_a_call_of_a_function_nobody_offers_is_content(kind: str) -> None:
    text = own(kind, [("unheard_of", {"city": own(kind, [("now", {})])})])
    events = parsed(kind, text)
    assert said(events) == (text, "", [])
    assert {type(event) for event in events} == {Content}


@OWN
def test_calls_of_known_and_unknown_functions(kind: str) -> None:
    calls = [("now", {}), ("unheard_of", {"x": "1"}), ("forecast", {"city": "Bern"})]
    text = own(kind, calls)
    events = parsed(kind, [text])
    assert found_calls(events) == [calls[0], calls[2]]
    assert "unheard_of" in said(events)[0]
    assert streamed(parsed(kind, text)) == streamed(events)


@OWN
def test_without_tools_everything_is_content(kind: str) -> None:
    text = own(kind)
    found = FORMATS[CALL_TEMPLATES[kind][0]]
    assert events_of(found, [text], []) == [Content(text)]


@OWN
def test_text_between_and_behind_calls_is_content(kind: str) -> None:
    one = own(kind, [("now", {})]).strip()
    events = parsed(kind, [f"First\n{one}\nthen\n{one}\n\nand last.\n"])
    assert said(events) == ("First\nthen\n\nand last.\n", "", [("now", "{}")] * 2)
    events = parsed(kind, [f"\n {one}\n\n{one}\n"])
    assert said(events) == ("", "", [("now", "{}")] * 2)
    assert said(parsed(kind, f"{one}\n\nDone.\n")) == ("Done.\n", "", [("now", "{}")])


@OWN
def test_many_calls(kind: str) -> None:
    calls = [("forecast", {"city": f"town {index}"}) for index in range(200)]
    events = parsed(kind, [own(kind, calls)])
    assert found_calls(events) == calls
    begun = [event for event in events if isinstance(event, CallBegin)]
    assert [event.index for event in begun] == list(range(200))
    assert len({event.id for event in begun}) >= 200 - kind.count("call-id")


BROKEN = {
    "hermes": ['{"name": "forecast", "arguments": {"city": Bern}}'],
    "llama3": ['{"name": "forecast", "parameters": {"city": "Bern",}}', "print(1)"],
    "mistral": ['[{"name": "forecast", "arguments": {"city" "Bern"}}]', "forecast[ARGS]city"],
    "deepseek-v3": [
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>forecast\n```json\n{"city": 01}\n```',
        "<｜tool▁call▁begin｜>forecast",
    ],
    "qwen3-coder": [
        "<function=forecast>\n<parameter=city>\nBern\n",
        "<function=forecast>\nBern\n",
        "<function=forecast>\n<parameter=city>\na\n</parameter>\n"
        "<parameter=city>\nb\n</parameter>\n</function>\n",
    ],
    "glm": ["forecast\n<arg_key>city</arg_key>\nBern", "forecast\n<arg_key>city</arg_value>"],
    "pythonic": ["[forecast(city=Bern)]", "[forecast('Bern')]", "[forecast(city='a', city='b')]"],
}


@pytest.mark.parametrize(
    "name,inner", [(name, inner) for name, texts in BROKEN.items() for inner in texts]
)
def test_a_malformed_call_is_given_back_whole(name: str, inner: str) -> None:
    opening = (TOOL_PARSERS[name].syntax({}).openings or ("",))[0]
    text = f"So: {opening}\n{inner} and on."
    if name == "pythonic":
        text = f"So:\n{inner} and on."
    events = events_of(FORMATS[name], text)
    assert said(events) == (text, "", [])
    assert streamed(events) == streamed(events_of(FORMATS[name], [text]))


def test_what_a_stream_sent_of_a_broken_call_is_named() -> None:
    call = ' <tool_call>{"name": "now"}'
    text = 'So: <tool_call>{"name": "forecast", "arguments": {"city": Bern}}' + call
    events = events_of(FORMATS["hermes"], [text])
    assert [type(event) for event in events] == [
        *(Content, CallBegin, CallArguments, CallBroken),
        *(Content, CallBegin, CallArguments),
    ]
    assert collect(events).content + call == text
    assert [call.name for call in collect(events).calls] == ["now"]


@pytest.mark.parametrize(
    "arguments,expected",
    [
        ("", "{}"),
        (', "arguments": null', "{}"),
        (r', "arguments": "{\"city\": \"Z\u00fcrich\"}"', '{"city": "Zürich"}'),
        (', "type": "function", "parameters": {"city": ""}', '{"city": ""}'),
        (', "arguments": { "city" :"a" }, "id": {"x": [1]}', '{ "city" :"a" }'),
        (', "arguments": [1]', None),
        (', "arguments": "{"', None),
        (', "arguments": {}, "arguments": {}', None),
    ],
)
def test_forms_of_an_object_that_is_a_call(arguments: str, expected: str | None) -> None:
    for text in (
        f'<tool_call>{{"name": "forecast"{arguments}}}</tool_call>',
        f'<tool_call>{{{arguments[2:]}{", " if arguments else ""}"name": "forecast"}}</tool_call>',
    ):
        content, _, calls = said(events_of(FORMATS["hermes"], [text]))
        assert calls == ([] if expected is None else [("forecast", expected)])
        assert content == (text if expected is None else "")


def test_half_a_pair_stays_an_escape() -> None:
    text = r'<tool_call>{"name": "forecast", "arguments": "{\"city\": \"\ud800\"}"}</tool_call>'
    (call,) = collect(events_of(FORMATS["hermes"], text)).calls
    assert call.arguments == r'{"city": "\ud800"}'
    call.arguments.encode()


@pytest.mark.parametrize(
    "text,calls",
    [
        ('{"name": "now"}', 0),
        ('{"name": "now", "parameters": {}, "why": 1}', 0),
        ('{"name": "now", "parameters": {}, "type": "function"}', 1),
        ('Call {"name": "now", "parameters": {}}', 0),
        ('Call\n  {"name": "now", "parameters": {}}', 1),
        ('{\n{"name": "now", "parameters": {}}', 1),
        ('<|python_tag|>{"name": "now"}', 1),
        ('<|python_start|>{"name": "now"}<|python_end|>', 1),
    ],
)
def test_a_bare_object_is_a_call_where_nothing_else_can_be_meant(text: str, calls: int) -> None:
    content, _, found = said(events_of(FORMATS["llama3"], [text]))
    assert len(found) == calls
    assert (content == text) == (calls == 0)


@pytest.mark.parametrize(
    "text,calls",
    [
        ("see [now()]", 0),
        ("see\n[now()]", 1),
        ("[\n[now()]", 1),
        ("[link](http://a)", 0),
        ("<|python_start|>[now()]<|python_end|>", 1),
    ],
)
def test_a_list_is_calls_at_the_beginning_of_a_line(text: str, calls: int) -> None:
    assert len(said(events_of(FORMATS["pythonic"], text))[2]) == calls


def test_a_single_object_behind_the_token_of_mistral() -> None:
    text = '[TOOL_CALLS]{"name": "now", "arguments": {}}'
    assert said(events_of(FORMATS["mistral"], text)) == ("", "", [("now", "{}")])


def test_ids_are_the_models_own_or_new() -> None:
    text = "[TOOL_CALLS]now[CALL_ID]aB3dE6gH9[ARGS]{}[TOOL_CALLS]now[ARGS]{}"
    first, second = collect(events_of(FORMATS["mistral"], text)).calls
    assert first.id == "aB3dE6gH9"
    assert len(second.id) == 9 and second.id.isalnum()
    (call,) = collect(events_of(FORMATS["hermes"], own("hermes", [("now", {})]))).calls
    assert call.id.startswith("call_")


HUGE: dict[str, Callable[[int], str]] = {
    "one text": lambda size: own("hermes", [("forecast", {"city": "ab <" * size})]),
    "escapes": lambda size: own("hermes", [("forecast", {"city": "\\\n" * size})]),
    "depth": lambda size: (
        '<tool_call>{"name": "forecast", "arguments": {"a": ' + "[" * size + "]" * size + "}}"
    ),
    "a value between tags": lambda size: own(
        "qwen3-coder", [("forecast", {"city": "</parameter>\n< " * size})]
    ),
    "many keys": lambda size: own("glm", [("forecast", {f"k{at}": at for at in range(size)})]),
    "many parts": lambda size: own("pythonic", [("forecast", {"tags": ["é"] * size})]),
    "no call": lambda size: '[TOOL_CALLS] [{"name": "' * size,
    "openings": lambda size: '{"name": {\n' * size,
    "spaces": lambda size: " \n" * size,
    "unknown": lambda size: own("hermes", [("unheard_of", {"city": "ab <" * size})]),
}
NAMES = {
    "a value between tags": "qwen3-coder",
    "many keys": "glm",
    "many parts": "pythonic",
    "no call": "mistral",
    "openings": "llama3",
}


@pytest.mark.parametrize("kind", HUGE)
@pytest.mark.parametrize("step", [1, 0])
def test_work_is_linear_in_the_text(kind: str, step: int) -> None:
    """Calls of functions, which count what Python does, and what is held between pieces, which
    bounds what the C code of strings looks at again."""
    name = NAMES.get(kind, "hermes")

    def work(size: int) -> int:
        text = HUGE[kind](size)
        count = 0

        def counted(*_: object) -> None:
            nonlocal count
            count += 1

        found = FORMATS[name].parser(TOOLS, False)
        assert isinstance(found, CallParser)
        sys.setprofile(counted)
        try:
            for at in range(0, len(text), step or len(text)):
                found.push(text[at : at + (step or len(text))])
                source = found._call.source
                assert len(source.text) - source.at < 64
            found.close()
        finally:
            sys.setprofile(None)
        return count

    assert work(200) <= 2.5 * work(100)


@st.composite
def replies(draw: Any) -> tuple[str, list[str]]:
    """Text of parts that mean something to some family, and its pieces."""
    words = st.sampled_from(
        [
            *MARKERS,
            *(
                "forecast",
                "now",
                '{"name": "now"',
                ', "arguments": {"city": "',
                '"}}',
                "}",
                "]",
                "[",
            ),
            *("now()", "forecast(city=", "<function=now>", "<parameter=city>", "</parameter>"),
            *("</function>", "<think>", "</think>", "\n", " ", ";", ",", '"', "\\", "'", "```json"),
        ]
    )
    parts = draw(st.lists(words | st.text(max_size=4), max_size=30))
    text = "".join(parts)
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=8)))
    return text, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("name", sorted({name for name, _ in CALL_TEMPLATES.values()}))
@settings(max_examples=60, deadline=None)
@given(reply=replies())
def test_any_text_is_read_and_none_is_lost(name: str, reply: tuple[str, list[str]]) -> None:
    text, pieces = reply
    events = events_of(FORMATS[name], pieces)
    assert streamed(events) == streamed(events_of(FORMATS[name], [text]))
    content, _, calls = said(events)
    for called, arguments in calls:
        assert called in offered_functions(TOOLS)
        assert isinstance(json.loads(arguments), dict)
    rest = iter(text)
    assert all(char in rest for char in content)
    if not calls:
        assert content == text


@pytest.mark.parametrize(
    "tools,field",
    [
        ([{"type": "function", "function": {}}], "tools[0].function.name"),
        ([{"name": "a"}, {"name": "a"}], "tools[1].name"),
        (["a"], "tools[0]"),
        ([{"name": "a", "parameters": []}], "tools[0].parameters"),
    ],
)
def test_tools_that_name_no_function(tools: list[Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        offered_functions(tools)
    assert caught.value.field == field
