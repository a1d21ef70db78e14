"""Keys, exposure, and the limits of bodies."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from rollout.http.edge.access import is_loopback
from rollout.http.edge.browsers import STATE_CHANGING_GETS
from tests.helpers.http_app import Server, run, serving, until

BODY = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
KEY, ADMIN = {"authorization": "Bearer k"}, {"authorization": "Bearer a"}


async def statuses(server: Server, headers: dict[str, Any]) -> list[int]:
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
        ({"api_key": "k"}, {"authorization": "bEARER  k "}, [200, 200, 200, 200]),
        ({"api_key": "k"}, {"authorization": "k"}, [200, 401, 401, 401]),
        ({"api_key": "k"}, {"authorization": "Basic k"}, [200, 401, 401, 401]),
        ({"api_key": "k"}, {"authorization": "Bearer Bearer k"}, [200, 401, 401, 401]),
        ({"api_key": "k"}, {"authorization": "Bearer k k"}, [200, 401, 401, 401]),
        ({"api_key": "k"}, {"authorization": b"Bearer \xe9\xff"}, [200, 401, 401, 401]),
        ({"api_key": "ké"}, {"authorization": "Bearer ké".encode()}, [200, 200, 200, 200]),
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
    options: dict[str, Any], headers: dict[str, Any], expected: list[int]
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


class Slow:
    """A request whose body stops after its first bytes, until it is told to go on."""

    def __init__(self, server: Server, first: bytes) -> None:
        self._more = asyncio.Event()
        self.begun = asyncio.Event()
        self.call = asyncio.ensure_future(
            server.http.post(
                "/update_weight_version",
                content=self._chunks(first),
                headers={"content-type": "application/json"},
            )
        )

    async def end(self) -> int:
        self._more.set()
        return (await self.call).status_code

    async def _chunks(self, first: bytes) -> AsyncIterator[bytes]:
        yield first
        self.begun.set()
        await self._more.wait()
        yield b'{"new_version": "1"}'


def test_bodies_that_do_not_end_have_a_limit_together_and_leave_room_for_small_ones() -> None:
    first = b" " * ((2 << 20) - 100)

    async def test() -> None:
        async with serving(max_held_body_bytes=8 << 20) as server:
            slow = [Slow(server, first) for _ in range(3)]
            for each in slow:
                await each.begun.wait()
            # Announced, and not: refused before it is read, and when it is.
            for content in (first, Slow(server, first)):
                if isinstance(content, Slow):
                    reply = await content.call
                else:
                    reply = await server.http.post("/generate", content=content)
                error = reply.json()["error"]
                assert (reply.status_code, error["type"]) == (503, "BodiesFull")
                assert "--max-held-body-mib" in error["message"]
            assert (await server.post("/generate", BODY)).status_code == 200
            assert [await each.end() for each in slow] == [200] * 3
            assert [await each.end() for each in [Slow(server, first)]] == [200]

    run(test)


def test_small_bodies_have_a_limit_too_and_count_until_they_are_complete() -> None:
    async def test() -> None:
        async with serving(max_held_body_bytes=1000) as server:
            slow = [Slow(server, b" " * 300) for _ in range(3)]
            for each in slow:
                await each.begun.wait()
            pad = {"pad": "x" * 300}
            assert (await server.post("/continue_generation", pad)).status_code == 503
            assert [await each.end() for each in slow] == [200] * 3
            await server.post("/pause_generation", {"mode": "in_place"})
            waiting = [asyncio.ensure_future(server.post("/generate", BODY)) for _ in range(40)]
            await until(lambda: server.engine.num_open == 40)
            assert (await server.post("/continue_generation", pad)).status_code == 200
            assert {(await call).status_code for call in waiting} == {200}

    run(test)


def test_errors_outside_any_route_have_the_one_shape() -> None:
    async def test() -> None:
        async with serving() as server:
            for reply, code in (
                (await server.get("/nowhere"), 404),
                (await server.get("/generate"), 405),
            ):
                assert reply.status_code == code
                assert set(reply.json()["error"]) == {"type", "message", "field", "param", "code"}

    run(test)


@pytest.mark.parametrize(
    "host,expected",
    [("127.0.0.1", True), ("127.3.2.1", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.2", False), ("host.example", False)],
)  # fmt: skip
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_ping_is_open_like_health() -> None:
    async def test() -> None:
        async with serving(api_key="k") as server:
            for path in ("/health", "/liveness", "/ping"):
                assert (await server.get(path)).status_code == 200

    run(test)


def test_a_key_given_twice_is_none() -> None:
    async def test() -> None:
        async with serving(api_key="k") as server:
            headers = [("authorization", "Bearer k"), ("authorization", "Bearer k")]
            assert (await server.http.get("/v1/models", headers=headers)).status_code == 401

    run(test)


FORM = {"content-type": "application/x-www-form-urlencoded"}
TEXT = {"content-type": "text/plain;charset=UTF-8"}
JSON = {"content-type": "application/json; charset=utf-8"}
EVIL = {"origin": "https://evil.example"}


@pytest.mark.parametrize(
    "headers,generates,controls",
    [
        (JSON, 200, 200),
        ({"content-type": "application/vnd.api+json"}, 200, 200),
        (FORM, 200, 415),
        ({}, 200, 415),
        (TEXT, 415, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415, 415),
        ({**FORM, "sec-fetch-site": "same-origin"}, 415, 415),
        ({**JSON, **EVIL}, 403, 403),
        ({**TEXT, **EVIL}, 403, 403),
        ({**JSON, "origin": "null"}, 403, 403),
        ({**JSON, "origin": "http://[::1"}, 403, 403),
        ({**JSON, "referer": "http://[::1"}, 403, 403),
        ({**JSON, "content-length": "9" * 5000}, 413, 413),
        ({**JSON, "origin": "http://127.0.0.1"}, 200, 200),
        ({**JSON, "origin": "http://127.0.0.1:8080"}, 403, 403),
        ({**JSON, "sec-fetch-site": "cross-site"}, 403, 403),
        ({**JSON, "sec-fetch-site": "same-site"}, 403, 403),
        ({**JSON, "sec-fetch-site": "none"}, 200, 200),
        ({**JSON, "host": "evil.example"}, 403, 403),
        ({**JSON, "host": "127.0.0.1.evil.example:30000"}, 403, 403),
        ({**JSON, "host": "localhost:1234"}, 200, 200),
        ({**JSON, "host": "[::1]:1234"}, 200, 200),
    ],
)
def test_what_a_page_of_another_origin_may_send(
    headers: dict[str, str], generates: int, controls: int
) -> None:
    async def test() -> None:
        async with serving() as server:
            body = json.dumps(BODY).encode()
            reply = await server.http.post("/generate", content=body, headers=headers)
            assert reply.status_code == generates, reply.text
            server.commands()
            for path in ("/pause_generation", "/sleep", "/command"):
                content = b'{"type": "pause"}' if path == "/command" else b"{}"
                reply = await server.http.post(path, content=content, headers=headers)
                if controls == 200:
                    assert reply.status_code in (200, 400), (path, reply.text)
                else:
                    assert (reply.status_code, server.commands()) == (controls, []), path

    run(test)


@pytest.mark.parametrize(
    "path", ["/flush_cache", "/release_memory_occupation", "/resume_memory_occupation"]
)
@pytest.mark.parametrize(
    "headers",
    [EVIL, {"sec-fetch-site": "cross-site"}, {"referer": "http://evil.example/page"},
     {"host": "evil.example"}],
)  # fmt: skip
def test_gets_that_change_state_are_not_for_pages(path: str, headers: dict[str, str]) -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.get(path, headers=headers)
            assert (reply.status_code, server.commands()) == (403, [])
            await server.get(path)
            assert len(server.commands()) == 1, "a program may"

    run(test)


def test_every_other_route_that_changes_state_is_no_get() -> None:
    """Lists all GET routes of control routers; who adds one that changes state lists it in
    `browsers.STATE_CHANGING_GETS`."""

    async def test() -> None:
        async with serving() as server:
            reading = {"/get_weights_by_name", "/is_paused", "/is_sleeping", "/get_world_size"}
            endless = {"/dashboard/api/live"}
            found = _get_routes(server.routes)
            assert found > STATE_CHANGING_GETS
            for path in sorted(found - STATE_CHANGING_GETS - reading - endless):
                server.commands()
                await server.get(path)
                assert server.commands() == [], path

    run(test)


def _get_routes(app: Any) -> set[str]:
    return {route.path for route in app.routes if "GET" in route.methods and "{" not in route.path}


def test_hosts_and_origins_that_are_allowed() -> None:
    async def test() -> None:
        options = {"allowed_hosts": ("gpu.lan",), "allowed_origins": ("https://ui.example",)}
        async with serving(**options) as server:
            headers = {"host": "gpu.lan:30000", "origin": "https://ui.example"}
            reply = await server.post("/generate", BODY, headers=headers)
            assert reply.status_code == 200
            assert reply.headers["access-control-allow-origin"] == "https://ui.example"
            assert (await server.get("/v1/models", headers={"host": "x"})).status_code == 403
            preflight = {**headers, "access-control-request-method": "POST"}
            reply = await server.http.options("/generate", headers=preflight)
            assert reply.status_code == 200

    run(test)


def test_an_exposed_server_takes_any_host_unless_some_are_listed() -> None:
    async def test() -> None:
        async with serving(host="0.0.0.0") as server:
            assert (await server.get("/v1/models", headers={"host": "gpu"})).status_code == 200
        async with serving(host="0.0.0.0", allowed_hosts=("gpu",)) as server:
            assert (await server.get("/v1/models", headers={"host": "gpu"})).status_code == 200
            assert (await server.get("/v1/models", headers={"host": "x"})).status_code == 403

    run(test)


def test_a_body_that_stops_half_way_is_408() -> None:
    async def half() -> Any:
        yield b'{"input_ids"'
        await asyncio.sleep(60)
        yield b": [1]}"

    async def test() -> None:
        async with serving(receive_timeout_s=0.05) as server:
            reply = await server.http.post("/generate", content=half())
            assert (reply.status_code, reply.json()["error"]["type"]) == (408, "BodyTimeout")
            assert "--receive-timeout-s" in reply.json()["error"]["message"]
            assert reply.headers["connection"] == "close"

    run(test)


def test_the_time_for_a_body_is_not_that_of_the_reply() -> None:
    async def test() -> None:
        async with serving(receive_timeout_s=0.2) as server:
            await server.post("/pause_generation", {"mode": "in_place"})
            asked = asyncio.create_task(server.post("/generate", BODY))
            await asyncio.sleep(0.4)
            await server.post("/continue_generation")
            assert (await asked).status_code == 200

    run(test)


def test_a_handler_that_is_cancelled_still_answers() -> None:
    async def test() -> None:
        async with serving() as server:
            await server.post("/pause_generation", {"mode": "in_place"})
            sent: list[Any] = []

            async def receive() -> Any:
                if not sent:
                    sent.append(None)
                    return {"type": "http.request", "body": json.dumps(BODY).encode()}
                await asyncio.Event().wait()

            async def send(message: Any) -> None:
                sent.append(message)

            headers = [(b"content-type", b"application/json")]
            scope = {"type": "http", "method": "POST", "path": "/generate", "query_string": b"",
                     "headers": headers, "raw_path": b"/generate", "root_path": "",
                     "http_version": "1.1", "scheme": "http"}  # fmt: skip
            task = asyncio.create_task(server.app(scope, receive, send))
            await until(lambda: server.engine.num_open == 1)
            task.cancel()
            await task
            assert sent[1]["status"] == 503
            assert b"shutting down" in sent[2]["body"]
            assert server.engine.num_open == 0

    run(test)
