"""Keys, exposure, and the limits of bodies."""

from typing import Any

import httpx
import pytest

from rollout.http.access import is_loopback
from tests.helpers.http_app import Server, run, serving

BODY = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
KEY, ADMIN = {"authorization": "Bearer k"}, {"authorization": "Bearer a"}


async def statuses(server: Server, headers: dict[str, str]) -> list[int]:
    """/health, /v1/models, /generate, /pause_generation."""
    replies: list[httpx.Response] = [
        await server.get("/health", headers=headers),
        await server.get("/v1/models", headers=headers),
        await server.post("/generate", BODY, headers=headers),
        await server.post("/continue_generation", headers=headers),
    ]
    return [reply.status_code for reply in replies]


@pytest.mark.parametrize(
    "options,headers,expected",
    [
        ({}, {}, [200, 200, 200, 200]),
        ({"api_key": "k"}, {}, [200, 401, 401, 401]),
        ({"api_key": "k"}, {"authorization": "Bearer x"}, [200, 401, 401, 401]),
        ({"api_key": "k"}, KEY, [200, 200, 200, 200]),
        ({"api_key": "k", "admin_api_key": "a"}, KEY, [200, 200, 200, 401]),
        ({"api_key": "k", "admin_api_key": "a"}, ADMIN, [200, 401, 401, 200]),
        ({"admin_api_key": "a"}, {}, [200, 200, 200, 401]),
        ({"host": "0.0.0.0"}, {}, [200, 200, 200, 403]),
        ({"host": "0.0.0.0", "api_key": "k"}, KEY, [200, 200, 200, 403]),
        ({"host": "0.0.0.0", "admin_api_key": "a"}, ADMIN, [200, 200, 200, 200]),
        ({"host": "0.0.0.0", "admin_api_key": "a"}, {}, [200, 200, 200, 401]),
    ],
)
def test_who_may_call_what(
    options: dict[str, Any], headers: dict[str, str], expected: list[int]
) -> None:
    async def test() -> None:
        async with serving(**options) as server:
            assert await statuses(server, headers) == expected

    run(test)


def test_every_control_route_is_closed_on_an_open_address() -> None:
    async def test() -> None:
        async with serving(host="0.0.0.0") as server:
            for path in (
                "/command",
                "/pause",
                "/init_weights_update_group",
                "/init_weights_update_group/",
                "/update_weights_from_tensor",
                "/init_weight_transfer_engine",
                "/update_weights",
                "/sleep",
                "/flush_cache",
                "/abort_request",
            ):
                reply = await server.post(path, follow_redirects=True)
                error = reply.json()["error"]
                assert (reply.status_code, error["type"]) == (403, "Forbidden"), path
                assert "--admin-api-key" in error["message"]
            assert server.commands() == []

    run(test)


def test_a_body_over_the_limit_is_413_by_its_length_and_by_its_bytes() -> None:
    async def chunks() -> Any:
        for _ in range(10):
            yield b" " * 100

    async def test() -> None:
        async with serving(max_body_bytes=500, max_control_body_bytes=2000) as server:
            for content in (b" " * 501, chunks()):
                reply = await server.http.post("/generate", content=content)
                error = reply.json()["error"]
                assert (reply.status_code, error["field"]) == (413, "body")
                assert "--max-body-mib" in error["message"]
            assert (await server.post("/generate", BODY)).status_code == 200
            large = {"pad": "x" * 1000}
            assert (await server.post("/continue_generation", large)).status_code == 200
            reply = await server.post("/continue_generation", {"pad": "x" * 2000})
            assert reply.status_code == 413
            assert "--max-control-body-mib" in reply.json()["error"]["message"]

    run(test)


def test_errors_outside_any_route_have_the_one_shape() -> None:
    async def test() -> None:
        async with serving() as server:
            for reply, code in (
                (await server.get("/nowhere"), 404),
                (await server.get("/generate"), 405),
            ):
                assert reply.status_code == code
                assert set(reply.json()["error"]) == {"type", "message", "field", "code"}

    run(test)


@pytest.mark.parametrize(
    "host,expected",
    [("127.0.0.1", True), ("127.3.2.1", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.2", False), ("host.example", False)],
)  # fmt: skip
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
