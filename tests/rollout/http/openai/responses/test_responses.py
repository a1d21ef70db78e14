"""/v1/responses: text, calls and reasoning, whole and as events; conversations that are kept."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.http_app import Server, run, serving
from tests.helpers.scripted_replies import CALL, THINKING, TOOLS, scripted
from tests.helpers.tiny_tokenizer import tiny_tokenizer

TOOL = {"type": "function", **TOOLS[0]["function"]}


async def respond(server: Server, **body: Any) -> Any:
    reply = await server.post("/v1/responses", {"max_output_tokens": 200, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


async def stream(server: Server, **body: Any) -> list[Any]:
    """The events of a stream; each is named by its type, and numbered."""
    body = {"max_output_tokens": 200, "stream": True, **body}
    reply = await server.post("/v1/responses", body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = []
    for number, block in enumerate(reply.text.strip().split("\n\n")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == number
        found.append(event)
    return found


async def prompt_of(server: Server, **body: Any) -> str:
    found = await respond(server, return_token_ids=True, **body)
    return tiny_tokenizer().decode(found["prompt_token_ids"])


def test_a_text() -> None:
    async def test() -> None:
        async with serving(**scripted("Hello.")) as server:
            found = await respond(server, input="ab", metadata={"run": "1"})
            assert found["object"] == "response" and found["status"] == "completed"
            assert found["id"].startswith("resp_")
            (item,) = found["output"]
            assert (item["type"], item["role"], item["status"]) == (
                "message",
                "assistant",
                "completed",
            )
            (part,) = item["content"]
            assert part == {
                "type": "output_text",
                "text": "Hello.",
                "annotations": [],
                "logprobs": [],
            }
            usage = found["usage"]
            assert usage["output_tokens"] == 7
            assert usage["input_tokens"] + 7 == usage["total_tokens"]
            assert found["metadata"] == {"run": "1"} and found["weight_version"] == "0"

    run(test)  # fmt: skip


def test_items_become_the_messages_that_they_stand_for() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Wea"},
                                     {"type": "input_text", "text": "ther?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [],
         "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "Well.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "forecast", "arguments": '{"city": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "function_call_output", "call_id": "c2", "output": [
            {"type": "input_text", "text": "noon"}]},
    ]  # fmt: skip
    expected = (
        "[system]Be brief.[user]Weather?[assistant]<think>Hm.</think>Well."
        '<tool_call>{"name": "forecast", "arguments": {"city": 1}}</tool_call>'
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>[tool]rain[tool]noon[assistant]'
    )

    async def test() -> None:
        async with serving(**scripted("x")) as server:
            assert await prompt_of(server, input=items, instructions="Be brief.") == expected
            reply = await server.post("/v1/responses/input_tokens", {"input": "ab"})
            size = len(await prompt_of(server, input="ab"))
            assert reply.json() == {"object": "response.input_tokens", "input_tokens": size}

    run(test)


def test_events_add_up_to_the_response() -> None:
    text = f"<think>Oslo?</think>Well.{CALL}"

    async def test() -> None:
        async with serving(**scripted(text, template=THINKING)) as server:
            whole = await respond(server, input="ab", tools=[TOOL])
            found = await stream(server, input="ab", tools=[TOOL])
            kinds = list(dict.fromkeys(event["type"] for event in found))
            item = ["response.output_item.added", "response.content_part.added"]
            assert kinds == [
                "response.created",
                "response.in_progress",
                *item,
                "response.reasoning_text.delta",
                "response.reasoning_text.done",
                "response.content_part.done",
                "response.output_item.done",
                "response.output_text.delta",
                "response.output_text.done",
                "response.function_call_arguments.delta",
                "response.function_call_arguments.done",
                "response.completed",
            ]
            assert found[0]["response"]["output"] == []
            last = found[-1]["response"]
            done = [e["item"] for e in found if e["type"] == "response.output_item.done"]
            assert last["output"] == done
            for event in found:
                if event["type"] == "response.output_item.added":
                    assert event["item"]["status"] == "in_progress"
                if "item_id" in event:
                    assert event["item_id"] == done[event["output_index"]]["id"]
            for index, (item, other) in enumerate(zip(done, whole["output"], strict=True)):
                said = [
                    e["delta"]
                    for e in found
                    if e["type"].endswith("delta") and e["output_index"] == index
                ]
                same = {"type", "name", "status", "content", "arguments"}
                assert {k: item.get(k) for k in same} == {k: other.get(k) for k in same}
                told = item.get("arguments") or item["content"][0]["text"]
                assert "".join(said) == told
            assert last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
            details = last["usage"]["output_tokens_details"]
            assert details == {"reasoning_tokens": len("<think>Oslo?</think>")}

    run(test)  # fmt: skip


def test_a_response_that_the_limit_cut_off() -> None:
    async def test() -> None:
        async with serving(**scripted("Hello.")) as server:
            found = await respond(server, input="ab", max_output_tokens=3)
            assert found["status"] == found["output"][0]["status"] == "incomplete"
            assert found["incomplete_details"] == {"reason": "max_output_tokens"}
            events = await stream(server, input="ab", max_output_tokens=3)
            assert events[-1]["type"] == "response.incomplete"
            assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Hel"

    run(test)


def test_logprobs_of_a_text() -> None:
    asked = {"input": "ab", "include": ["message.output_text.logprobs"], "top_logprobs": 2}

    async def test() -> None:
        plain = "{{ messages[0].content }}<tool_call>"
        async with serving(**scripted("Hello.", template=plain)) as server:
            found = await respond(server, **asked)
            entries = found["output"][0]["content"][0]["logprobs"]
            assert [entry["token"] for entry in entries[:6]] == list("Hello.")
            assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
            events = await stream(server, **asked)
            said = [e for e in events if e["type"] == "response.output_text.delta"]
            assert [entry["token"] for e in said for entry in e["logprobs"]] == list("Hello.")
            last = events[-1]["response"]["output"][0]["content"][0]
            assert last["logprobs"] == entries
        async with serving(**scripted("Hello.")) as server:
            reply = await server.post("/v1/responses", {**asked, "tools": [TOOL]})
            assert reply.json()["error"]["param"] == "include"

    run(test)


def test_a_conversation_goes_on_from_what_is_kept() -> None:
    async def test() -> None:
        async with serving(**scripted(CALL, "It rains.", "Bye.")) as server:
            first = await respond(server, input="ab", tools=[TOOL], instructions="Be brief.")
            (call,) = first["output"]
            output = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
            second = await respond(server, input=[output], previous_response_id=first["id"])
            text = await prompt_of(server, input="more", previous_response_id=second["id"])
            arguments = '{"name": "forecast", "arguments": {"city": "Oslo", "days": 2}}'
            # Instructions are those of one response.
            assert text == (
                f"[user]ab[assistant]<tool_call>{arguments}</tool_call>[tool]rain"
                "[assistant]It rains.[user]more[assistant]"
            )
            kept = await server.get(f"/v1/responses/{second['id']}")
            assert kept.json() == second
            items = (await server.get(f"/v1/responses/{second['id']}/input_items")).json()
            assert [item["type"] for item in items["data"]] == ["function_call_output"]

    run(test)


def test_what_is_not_kept_is_not_there() -> None:
    async def test() -> None:
        async with serving(**scripted("a")) as server:
            loose = await respond(server, input="ab", store=False)
            kept = (await stream(server, input="ab"))[-1]["response"]
            assert (await server.get(f"/v1/responses/{loose['id']}")).status_code == 404
            path = f"/v1/responses/{kept['id']}"
            assert (await server.get(path)).json() == kept
            gone = await server.http.delete(path)
            assert gone.json() == {"id": kept["id"], "object": "response", "deleted": True}
            for reply in (
                await server.get(path),
                await server.http.delete(path),
                await server.get(f"{path}/input_items"),
                await server.post(f"{path}/cancel"),
            ):
                assert reply.status_code == 404
                assert reply.json()["error"]["code"] == "response_not_found"
            body = {"input": "a", "previous_response_id": kept["id"]}
            error = (await server.post("/v1/responses", body)).json()["error"]
            assert error["code"] == "previous_response_not_found"
            assert error["param"] == "previous_response_id"

    run(test)


def test_pages_of_input_items() -> None:
    items = [{"role": "user", "content": str(number)} for number in range(5)]

    async def test() -> None:
        async with serving(**scripted("a")) as server:
            name = (await respond(server, input=items))["id"]
            path = f"/v1/responses/{name}/input_items"
            page = (await server.get(path, params={"limit": 2, "order": "asc"})).json()
            assert [item["content"] for item in page["data"]] == ["0", "1"] and page["has_more"]
            after = {"order": "asc", "after": page["last_id"]}
            rest = (await server.get(path, params=after)).json()
            assert [item["content"] for item in rest["data"]] == ["2", "3", "4"]
            assert not rest["has_more"]
            assert (await server.get(path)).json()["first_id"] == rest["last_id"]
            assert (await server.get(path, params={"after": "x"})).status_code == 400

    run(test)


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"type": "message", "content": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": "a"},
                    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]},
         "input[1].arguments"),
        ({"input": [{"type": "function_call", "arguments": "{}"}]}, "input[0].name"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": ""}, "input"),
        ({"input": "x" * 5_000_000}, "input"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temprature": 1}, "temprature"),
        ({"model": "another"}, "model"),
    ],
)  # fmt: skip
def test_refusals_name_the_field_as_it_is_called_here(more: dict[str, Any], field: str) -> None:
    async def test() -> None:
        async with serving(**scripted("a")) as server:
            reply = await server.post("/v1/responses", {"input": "ab", **more})
            assert reply.status_code in (400, 404), reply.text
            error = reply.json()["error"]
            assert error["param"] == field, error
            assert server.link.requests == []

    run(test)


def test_a_response_cannot_be_cancelled() -> None:
    async def test() -> None:
        async with serving(**scripted("a")) as server:
            name = (await respond(server, input="ab"))["id"]
            reply = await server.post(f"/v1/responses/{name}/cancel")
            assert reply.status_code == 400
            assert reply.json()["error"]["param"] == "background"
            reply = await server.get(f"/v1/responses/{name}", params={"stream": "true"})
            assert reply.json()["error"]["param"] == "stream"

    run(test)
