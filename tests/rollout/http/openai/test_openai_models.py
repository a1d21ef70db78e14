"""Models by name, and what is said of models and routes that are not there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.http_app import run, serving
from tests.helpers.replicas import fake_config

CHAT = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 2}
COMPLETION = {"prompt": "ab", "max_tokens": 2}


@pytest.mark.parametrize(
    ("path", "body"), [("chat/completions", CHAT), ("completions", COMPLETION)]
)
def test_a_body_names_the_model_that_is_served_or_none(path: str, body: dict[str, Any]) -> None:
    async def test() -> None:
        async with serving(served_model_name="org/mine", engine=fake_config("fake")) as server:
            for model in ("org/mine", "fake", "default", "", None):
                reply = await server.post(f"/v1/{path}", {**body, "model": model})
                assert reply.status_code == 200, reply.text
                assert reply.json()["model"] == "org/mine"
            server.link.requests.clear()
            for model in ("mine", "gpt-4o", "org/mine:adapter", "ORG/MINE"):
                reply = await server.post(f"/v1/{path}", {**body, "model": model, "stream": True})
                assert reply.status_code == 404, reply.text
                error = reply.json()["error"]
                assert (error["code"], error["param"]) == ("model_not_found", "model")
                assert model in error["message"] and "org/mine" in error["message"]
            assert server.link.requests == []

    run(test)


@pytest.mark.parametrize("name", ["mine", "org/mine", "/models/a b/x.gguf", "./rel.gguf", "ä"])
def test_a_model_by_its_id(name: str) -> None:
    from urllib.parse import quote

    async def test() -> None:
        async with serving(served_model_name=name) as server:
            (listed,) = (await server.get("/v1/models")).json()["data"]
            assert listed["id"] == name and listed["object"] == "model"
            assert isinstance(listed["created"], int) and listed["created"] > 1_600_000_000
            paths = [quote(name, safe="")]
            # A client's URL library takes "./" out unless it is quoted.
            paths += [] if name.startswith(".") else [quote(name)]
            for path in paths:
                reply = await server.get(f"/v1/models/{path}")
                assert reply.status_code == 200 and reply.json() == listed, path
            reply = await server.get("/v1/models/other/model")
            assert reply.status_code == 404
            assert reply.json()["error"]["code"] == "model_not_found"

    run(test)


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("/v1/completion", "POST /v1/completions"),
        ("/chat/completions", "POST /v1/chat/completions"),
        ("/v1/model", "GET /v1/models"),
        ("/generat", "POST, PUT /generate"),
        ("/pause_generations", "POST /pause_generation"),
        ("/", "/"),
        ("/" + "x" * 5000, "/"),
    ],
)
def test_a_route_that_is_not_there_names_the_nearest(path: str, near: str) -> None:
    async def test() -> None:
        async with serving() as server:
            for reply in (await server.post(path), await server.get(path)):
                assert reply.status_code == 404
                error = reply.json()["error"]
                assert f"the nearest is {near}" in error["message"] or near == "/"
                assert error["type"] == "NotFound" and "/openapi.json" in error["message"]

    run(test)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/generate", "POST, PUT"),
        ("GET", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET"),
        ("DELETE", "/v1/models/fake", "GET"),
        ("DELETE", "/flush_cache", "GET, POST"),
    ],
)
def test_a_method_that_a_route_has_not(method: str, path: str, allowed: str) -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.http.request(method, path)
            assert reply.status_code == 405
            assert reply.headers["allow"] == allowed
            message = reply.json()["error"]["message"]
            assert f"{path} takes {allowed}, not {method}" in message

    run(test)


def test_openapi_lists_a_model_by_its_id_and_what_may_be_null() -> None:
    async def test() -> None:
        async with serving() as server:
            found = (await server.get("/openapi.json")).json()
        (parameter,) = found["paths"]["/v1/models/{model_id}"]["get"]["parameters"]
        assert (parameter["name"], parameter["in"]) == ("model_id", "path")
        schemas = found["components"]["schemas"]
        fields = schemas["ChatBody"]["properties"]
        assert {"type": "null"} in fields["n"]["anyOf"] and fields["n"]["default"] == 1
        assert {"type": "null"} not in fields["messages"].get("anyOf", [])
        assert {"type": "null"} in schemas["SamplingParams"]["properties"]["stop"]["anyOf"]

    run(test)
