"""/openapi.json: every route of the application, and a document that holds together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rollout.http.edge.unserved_routes import REFUSED
from tests.helpers.http_app import Server, run, serving

_TRAINERS = Path(__file__).resolve().parents[3] / "docs" / "external_trainers.md"
_NAME = re.compile(r"^[a-zA-Z0-9._-]+$")
# Routes that change something and read nothing.
_NO_BODY = {
    ("post", "/continue_generation"),
    ("post", "/end_weight_update"),
    ("post", "/finish_session"),
    ("post", "/flush_cache"),
    ("post", "/pause"),
    ("post", "/post_process_weights"),
    ("post", "/reset_prefix_cache"),
    ("post", "/resume"),
    ("post", "/shutdown_weight_transfer_engine"),
    ("post", "/sleep"),
    ("post", "/stop_profile"),
    ("post", "/v1/responses/{response_id}/cancel"),
    ("post", "/wake_up"),
}


async def document(server: Server) -> dict[str, Any]:
    reply = await server.get("/openapi.json")
    assert reply.status_code == 200
    found: dict[str, Any] = reply.json()
    return found


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method, path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def routes_of(app: Any) -> set[tuple[str, str]]:
    """Method and path of every route that the application answers."""
    return {(method.lower(), route.path_format) for route in app.routes for method in route.methods}


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a document."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value:
        if isinstance(child, dict | list):
            yield from nodes(child)


def test_every_route_of_the_application_is_in_it() -> None:
    async def check() -> None:
        async with serving() as server:
            described = operations(await document(server))
            answered = {found for found in routes_of(server.routes) if found[0] != "head"}
            assert described.keys() == answered
            assert len(answered) > 50
            bare = {
                key
                for key, operation in described.items()
                if key[0] in ("post", "put") and "requestBody" not in operation
            }
            refused = {("post", path) for path, (method, _) in REFUSED.items() if method == "POST"}
            assert bare == _NO_BODY | refused

    run(check)


def test_the_document_holds_together() -> None:
    async def check() -> None:
        async with serving() as server:
            found = await document(server)
        assert found["openapi"].startswith("3.1") and found["info"]["version"]
        schemas = found["components"]["schemas"]
        assert all(_NAME.match(name) for name in schemas)
        for node in nodes(found):
            if "$ref" in node:
                assert node["$ref"].removeprefix("#/components/schemas/") in schemas
        ids = [operation["operationId"] for operation in operations(found).values()]
        assert len(set(ids)) == len(ids)
        for operation in operations(found).values():
            refused = operation["responses"]["4XX"]["content"]["application/json"]
            assert refused["schema"] == {"$ref": "#/components/schemas/Error"}
        error = schemas["Error"]["properties"]["error"]
        async with serving() as server:
            reply = (await server.post("/generate", {"top": 1})).json()
        assert set(reply["error"]) == set(error["required"])

    run(check)


def test_a_schema_states_fields_and_defaults_of_the_struct_it_is_made_from() -> None:
    async def check() -> None:
        async with serving() as server:
            found = await document(server)
        schemas = found["components"]["schemas"]
        assert schemas["SamplingParams"]["properties"]["temperature"]["default"] == 1.0
        assert "ReceiveBroadcast" in schemas and "CompletionBody" in schemas
        batch = schemas["GenerateBatch"]["properties"]
        assert batch["text"]["type"] == "array" and "anyOf" in batch["sampling_params"]

    run(check)


def test_it_takes_the_key_and_says_which_routes_do() -> None:
    async def check() -> None:
        async with serving(api_key="k", admin_api_key="a") as server:
            assert (await server.get("/openapi.json")).status_code == 401
            reply = await server.get("/openapi.json", headers={"Authorization": "Bearer k"})
            described = operations(reply.json())
        assert described["get", "/health"]["security"] == []
        assert described["post", "/generate"]["security"] == [{"apiKey": []}]
        assert described["post", "/command"]["security"] == [{"adminApiKey": []}]

    run(check)


def test_the_routes_that_the_docs_name_are_there() -> None:
    """What clients call, by the table of them; prime-rl's that is refused by 404 is told there."""

    async def test() -> None:
        async with serving() as server:
            there = {path for _, path in routes_of(server.routes)} | {"/init_broadcaster"}
        rows = _TRAINERS.read_text().split("| client, with the version")[1].split("\n\n")[0]
        calls = [row.split(" | ")[1] for row in rows.splitlines()[2:]]
        named = {path for call in calls for path in re.findall(r"`(/[\w/]+)", call)}
        assert len(named) > 40
        assert named <= there, named - there

    run(test)
