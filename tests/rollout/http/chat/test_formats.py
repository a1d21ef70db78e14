"""Formats and forced calls through each dialect: what reaches the engine, and what is refused."""

from __future__ import annotations

import json
from typing import Any

from tests.helpers.http_app import Server, run, serving
from tests.helpers.scripted_replies import TOOLS, scripted

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
WRONG = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": "x"}}}
DEEP = '{"items":' * 10_000 + "{}" + "}" * 10_000
FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]
USER = [{"role": "user", "content": "a"}]


def chat(schema: Any) -> dict[str, Any]:
    inner = {"name": "f", "schema": schema}
    return {"messages": USER, "response_format": {"type": "json_schema", "json_schema": inner}}


def responses(schema: Any) -> dict[str, Any]:
    return {
        "input": "a",
        "text": {"format": {"type": "json_schema", "name": "f", "schema": schema}},
    }


def messages(schema: Any) -> dict[str, Any]:
    config = {"format": {"type": "json_schema", "schema": schema}}
    return {"messages": USER, "max_tokens": 5, "output_config": config}


BODIES = {
    "/v1/chat/completions": (chat, "response_format.json_schema.schema"),
    "/v1/responses": (responses, "text.format.schema"),
    "/v1/messages": (messages, "output_config.format.schema"),
}


async def grammars(server: Server, path: str, body: dict[str, Any]) -> list[Any]:
    """Of the requests that reached the engine."""
    await server.post(path, body)
    found = [request.grammar for request in server.link.requests]
    server.link.requests.clear()
    return found


def test_a_schema_in_each_dialect() -> None:
    async def test() -> None:
        async with serving(**scripted("x", template="{{ messages[0].content }}")) as server:
            found = [
                await grammars(server, path, body(SCHEMA)) for path, (body, _) in BODIES.items()
            ]
            assert found[0] == found[1] == found[2]
            assert [grammar.kind for grammar in found[0]] == ["json_schema"]
            for path, (body, field) in BODIES.items():
                reply = await server.post(path, body(WRONG))
                error = reply.json()["error"]
                assert reply.status_code == 400 and error["param"].startswith(field), error
                assert error["message"].startswith(field), error
                text = json.dumps(body("DEEP")).replace('"DEEP"', DEEP)
                deep = await server.http.post(
                    path, content=text, headers={"content-type": "application/json"}
                )
                assert deep.status_code == 400 and deep.json()["error"]["message"]

    run(test)


def test_a_forced_call_in_each_dialect() -> None:
    forced = {
        "/v1/chat/completions": {"messages": USER, "tools": TOOLS, "tool_choice": "required"},
        "/v1/responses": {"input": "a", "tools": FLAT, "tool_choice": "required"},
        "/v1/messages": {
            "messages": USER,
            "max_tokens": 5,
            "tools": [
                {"name": "forecast", "input_schema": TOOLS[0]["function"]["parameters"]},
                {"name": "now"},
            ],
            "tool_choice": {"type": "any"},
        },
    }

    async def test() -> None:
        async with serving(**scripted("x")) as server:
            found = [await grammars(server, path, body) for path, body in forced.items()]
            assert found[0] == found[1] == found[2]
            assert [grammar.kind for grammar in found[0]] == ["lark"]
            wrong = [{"type": "function", "function": {"name": "f", "parameters": WRONG}}]
            body = {**forced["/v1/chat/completions"], "tools": wrong}
            error = (await server.post("/v1/chat/completions", body)).json()["error"]
            assert error["param"] == "tools", error
            render = "/v1/chat/completions/render"
            for body, field in (
                (forced["/v1/chat/completions"], "tool_choice"),
                (chat(SCHEMA), "response_format.json_schema.schema"),
            ):
                reply = await server.post(render, body)
                assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)

    run(test)
