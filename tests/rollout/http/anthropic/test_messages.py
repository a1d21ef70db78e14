"""/v1/messages: text, thinking and tools in Anthropic's form, whole and as events, and errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.helpers.http_app import Server, run, serving, until
from tests.helpers.scripted_replies import CALL, OTHER_CALL, THINKING, scripted

USER = {"role": "user", "content": "ab"}
TOOLS: list[dict[str, Any]] = [
    {"name": "forecast", "description": "d", "input_schema": {"type": "object"}},
    {"name": "now", "input_schema": {"type": "object"}},
]
BODY: dict[str, Any] = {"model": "default", "messages": [USER], "max_tokens": 200}


async def send(server: Server, **more: Any) -> Any:
    reply = await server.post("/v1/messages", {**BODY, **more})
    assert reply.status_code == 200, reply.text
    return reply.json()


async def stream(server: Server, **more: Any) -> list[Any]:
    reply = await server.post("/v1/messages", {**BODY, "stream": True, **more})
    found = []
    for block in reply.text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def added_up(events: list[Any]) -> list[dict[str, Any]]:
    """The content that the events of a stream add up to."""
    blocks: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"])
            texts.append("")
        if event["type"] == "content_block_delta":
            assert event["index"] == len(blocks) - 1
            delta = event["delta"]
            texts[-1] += delta[{"text_delta": "text", "thinking_delta": "thinking",
                                "input_json_delta": "partial_json"}[delta["type"]]]  # fmt: skip
    for block, text in zip(blocks, texts, strict=True):
        if block["type"] == "tool_use":
            block["input"] = json.loads(text)
        else:
            block[block["type"]] = text
    return blocks


def without_ids(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in block.items() if key != "id"} for block in blocks]


def test_a_text() -> None:
    async def test() -> None:
        async with serving(**scripted("Hello.")) as server:
            found = await send(server)
            assert (found["type"], found["role"]) == ("message", "assistant")
            assert found["id"].startswith("msg_")
            assert found["content"] == [{"type": "text", "text": "Hello."}]
            assert (found["stop_reason"], found["stop_sequence"]) == ("end_turn", None)
            usage = found["usage"]
            assert usage["output_tokens"] == 7
            count = await server.post(
                "/v1/messages/count_tokens", {"model": "default", "messages": [USER]}
            )
            cached = usage["cache_read_input_tokens"]
            assert count.json() == {"input_tokens": usage["input_tokens"] + cached}
            assert found["weight_version"] == "0"
            found = await send(server, stop_sequences=["llo", "zz"])
            assert found["content"] == [{"type": "text", "text": "He"}]
            assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", "llo")
            assert (await send(server, max_tokens=2))["stop_reason"] == "max_tokens"

    run(test)


def test_events_add_up_to_the_message() -> None:
    text = f"<think>Oslo?</think>Well.{CALL}{OTHER_CALL}"

    async def test() -> None:
        async with serving(**scripted(text, template=THINKING)) as server:
            whole = await send(server, tools=TOOLS)
            thinking, said, call, other = whole["content"]
            assert thinking == {"type": "thinking", "thinking": "Oslo?", "signature": ""}
            assert said == {"type": "text", "text": "Well."}
            assert call["type"] == "tool_use" and call["name"] == "forecast" and call["id"]
            assert call["input"] == {"city": "Oslo", "days": 2} and other["input"] == {}
            assert whole["stop_reason"] == "tool_use"
            events = await stream(server, tools=TOOLS)
            kinds = list(dict.fromkeys(event["type"] for event in events))
            assert kinds == [
                "message_start",
                "ping",
                "content_block_start",
                "content_block_delta",
                "content_block_stop",
                "message_delta",
                "message_stop",
            ]
            start = events[0]["message"]
            assert start["content"] == [] and start["stop_reason"] is None
            assert start["usage"]["input_tokens"] > 0
            assert without_ids(added_up(events)) == without_ids(whole["content"])
            assert events[-2]["delta"]["stop_reason"] == "tool_use"
            assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]

    run(test)  # fmt: skip


def test_messages_become_those_of_chat() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Wea"},
                                     {"type": "text", "text": "ther?"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "s"},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "Well."},
            {"type": "tool_use", "id": "a", "name": "forecast", "input": {"city": "Oslo"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "a", "content": "rain"},
            {"type": "tool_result", "tool_use_id": "a", "is_error": True,
             "content": [{"type": "text", "text": "no"}]},
            {"type": "text", "text": "So?"},
        ]},
    ]  # fmt: skip
    expected = (
        "[system]Be brief.[user]Weather?[assistant]<think>Hm.</think>Well."
        '<tool_call>{"name": "forecast", "arguments": {"city": "Oslo"}}</tool_call>'
        "[tool]rain[tool]no[user]So?[assistant]"
    )

    async def test() -> None:
        async with serving(**scripted("x")) as server:
            system = [{"type": "text", "text": "Be ", "cache_control": {"type": "ephemeral"}},
                      {"type": "text", "text": "brief."}]  # fmt: skip
            body = {"messages": messages, "system": system}
            reply = await server.post("/v1/messages/count_tokens", body)
            assert reply.json() == {"input_tokens": len(expected)}
            await send(server, **body)
            (request,) = server.link.requests
            decoded = "".join(chr(33 + t) if t < 94 else " " for t in request.prompt_ids.tolist())
            assert decoded == expected

    run(test)


def test_thinking_on_and_off() -> None:
    texts = ["Hm.</think>Yes.", "Yes.", "Hm.</think>Yes."]

    async def test() -> None:
        async with serving(**scripted(*texts, template=THINKING)) as server:
            on = {"type": "enabled", "budget_tokens": 100}
            thinking, text = (await send(server, thinking=on))["content"]
            assert (thinking["thinking"], text["text"]) == ("Hm.", "Yes.")
            (text,) = (await send(server, thinking={"type": "disabled"}))["content"]
            assert text["text"] == "Yes."
            hidden = {"type": "adaptive", "display": "omitted"}
            assert len((await send(server, thinking=hidden))["content"]) == 1
            over = {**BODY, "thinking": {**on, "budget_tokens": 200}}
            reply = await server.post("/v1/messages", over)
            assert reply.json()["error"]["param"] == "thinking.budget_tokens"

    run(test)


def test_a_call_that_the_limit_cuts_off_is_content() -> None:
    async def test() -> None:
        async with serving(**scripted(CALL)) as server:
            found = await send(server, tools=TOOLS, max_tokens=len(CALL) - 25)
            assert found["stop_reason"] == "max_tokens"
            assert [block["type"] for block in found["content"]] == ["text"]

    run(test)


def test_only_one_call_where_that_is_asked_for() -> None:
    async def test() -> None:
        async with serving(**scripted(CALL + OTHER_CALL)) as server:
            choice = {"type": "auto", "disable_parallel_tool_use": True}
            found = await send(server, tools=TOOLS, tool_choice=choice)
            assert [block["name"] for block in found["content"]] == ["forecast"]

    run(test)


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]},
         "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "tool_use"}]}]},
         "messages[1].content[0].input"),
        ({"messages": [USER, {"role": "assistant", "content": "So"}]}, "messages[1]"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": TOOLS, "tool_choice": {"type": "x"}}, "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"output_config": {"format": {"type": "x"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"context_management": {"edits": []}}, "context_management"),
        ({"temprature": 1}, "temprature"),
        ({"temperature": -1}, "temperature"),
    ],
)  # fmt: skip
def test_errors_have_the_form_of_the_dialect(more: dict[str, Any], field: str) -> None:
    async def test() -> None:
        async with serving(**scripted("x")) as server:
            reply = await server.post("/v1/messages", {**BODY, **more})
            assert reply.status_code == 400, reply.text
            found = reply.json()
            assert found["type"] == "error"
            assert found["error"]["type"] == "invalid_request_error"
            assert found["error"]["param"] == field, found
            assert server.link.requests == []

    run(test)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("thread", {"type": "create"}),
        ("compaction", {"type": "auto"}),
        ("fallbacks", [{"model": "other"}]),
    ],
)
def test_what_only_anthropics_server_does_is_known_and_refused(name: str, value: Any) -> None:
    async def test() -> None:
        async with serving(**scripted("x")) as server:
            reply = await server.post("/v1/messages", {**BODY, name: value})
            assert reply.status_code == 400
            error = reply.json()["error"]
            assert error["param"] == name and "not served" in error["message"], error
            assert (await server.post("/v1/messages", {**BODY, name: None})).status_code == 200

    run(test)


def test_errors_of_what_stands_before_the_route() -> None:
    async def test() -> None:
        async with serving(**scripted("x"), api_key="k", max_body_bytes=1000) as server:
            words = {}
            for name, headers, body in (
                ("none", {}, BODY),
                ("wrong", {"x-api-key": "j"}, BODY),
                ("twice", [("x-api-key", "k"), ("x-api-key", "k")], BODY),
                ("own", {"x-api-key": "k"}, BODY),
                ("bearer", {"authorization": "Bearer k"}, BODY),
                ("both", {"authorization": "Bearer other", "x-api-key": "k"}, BODY),
                ("large", {"x-api-key": "k"}, {**BODY, "system": "x" * 2000}),
                ("model", {"x-api-key": "k"}, {**BODY, "model": "another"}),
            ):
                reply = await server.post("/v1/messages", body, headers=headers)
                found = reply.json()
                words[name] = (reply.status_code, found.get("error", {}).get("type"))
                assert found["type"] == ("error" if reply.status_code >= 400 else "message")
            refused = (401, "authentication_error")
            assert words == {
                "none": refused,
                "wrong": refused,
                "twice": refused,
                "own": (200, None),
                "bearer": (200, None),
                "both": (200, None),
                "large": (413, "request_too_large"),
                "model": (404, "not_found_error"),
            }
            reply = await server.get("/v1/messages", headers={"x-api-key": "k"})
            assert reply.status_code == 405 and reply.json()["type"] == "error"
            # The other dialects take the header too; the control routes do not.
            plain = {"x-api-key": "k"}
            assert (await server.get("/v1/models", headers=plain)).status_code == 200
            assert (await server.post("/flush_cache", headers=plain)).status_code == 401

    run(test)


def test_a_message_that_is_aborted_is_an_error() -> None:
    async def test() -> None:
        async with serving(**scripted("x" * 50)) as server:
            server.link.stalled = True
            bodies = (BODY, {**BODY, "stream": True})
            calls = [asyncio.ensure_future(server.post("/v1/messages", body)) for body in bodies]
            await until(lambda: len(server.link.requests) == 2)
            server.link.stalled = False
            await server.post("/abort_request", {"abort_all": True})
            whole, streamed = await asyncio.gather(*calls)
            assert whole.status_code == 503
            assert whole.json()["error"]["type"] == "overloaded_error"
            assert "event: error" in streamed.text and "message_stop" not in streamed.text

    run(test)
