"""Any JSON value in any field of any route: 2xx or 4xx in the one error shape, and an engine that
answers afterwards.

Every case has a server of its own, so what is refused is refused by what was sent and not by what
came before. `make test` draws some cases of each body, the same on every run; `make test-long`
gives every field of every route a sixth of the values, in turn.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    Control,
    LoadFromDisk,
    Resume,
    ResumeMemory,
)
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.hostile_json import HOSTILE, any_json, with_value
from tests.helpers.http_app import Server, serving
from tests.helpers.route_bodies import RouteBody, query_routes, route_bodies

DEADLINE_S = 60.0
ROUTES = list(route_bodies())
QUERIES = list(query_routes())
HEADERS = {"content-type": "application/json"}
seeded = settings(
    max_examples=5,
    phases=(Phase.explicit, Phase.generate),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


async def answered(server: Server, method: str, path: str, **options: Any) -> httpx.Response:
    """The reply, or the error that killed the engine meanwhile: it would never come then."""
    loop = asyncio.get_running_loop()
    died: asyncio.Future[httpx.Response] = loop.create_future()

    def failed(_: Any, context: dict[str, Any]) -> None:
        if not died.done():
            died.set_exception(context.get("exception") or RuntimeError(context["message"]))

    loop.set_exception_handler(failed)
    asked = asyncio.ensure_future(server.http.request(method, path, headers=HEADERS, **options))
    done, _ = await asyncio.wait(
        (asked, died), timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED
    )
    assert done, f"{method} {path} was not answered"
    return done.pop().result()


def assert_answer(reply: httpx.Response) -> None:
    """A result, or a refusal that says what it is about."""
    assert 200 <= reply.status_code < 300 or 400 <= reply.status_code < 500, reply.text[:500]
    if reply.status_code >= 400 and reply.headers["content-type"] == "application/json":
        error = reply.json()["error"]
        unknown_model = reply.status_code == 404 and error["param"] == "model"
        code = "model_not_found" if unknown_model else reply.status_code
        assert error["message"] and error["code"] == code and error["type"]
        assert len(reply.content) < 20_000, "a refusal repeats the whole value"


async def assert_alive(server: Server) -> None:
    """It answers a command and a prompt, once whatever it was told to do is taken back."""
    state = (await answered(server, "GET", "/server_info")).json()
    assert state
    await take_back(server)
    reply = await answered(
        server,
        "POST",
        "/generate",
        content=b'{"input_ids": [5], "sampling_params": {"max_new_tokens": 3}}',
    )
    assert reply.json()["output_ids"] == expected_tokens([5], 3)


async def take_back(server: Server) -> None:
    """Clear by control commands what one call may have asked for: an update that is open, memory
    that is released, weights that are gone, a pause."""
    now = await server.engine.state(max_age_s=0.0)
    if now.open_update is not None:
        await command(server, AbortUpdate(version=now.open_update))
    if now.released:
        await command(server, ResumeMemory(tags=list(now.released)))
    now = await server.engine.state(max_age_s=0.0)
    if now.refusal:
        version = now.version + 1
        await command(server, BeginUpdate(version=version))
        await command(server, LoadFromDisk(path="/step_0"))
        await command(server, CommitUpdate(version=version))
    await command(server, Resume())
    now = await server.engine.state(max_age_s=0.0)
    left = (now.paused, now.refusal, now.released, now.open_update)
    assert left == (False, "", [], None), left


async def command(server: Server, message: Control) -> None:
    reply = await answered(server, "POST", "/command", json=msgspec.to_builtins(message))
    assert reply.status_code == 200, reply.text


def survives(method: str, path: str, **options: Any) -> None:
    async def check() -> None:
        async with serving() as server:
            assert_answer(await answered(server, method, path, **options))
            await assert_alive(server)

    asyncio.run(check())


@pytest.mark.parametrize("route", ROUTES, ids=str)
@seeded
@given(data=st.data())
def test_a_spoiled_field(route: RouteBody, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(route.paths))
    survives(route.method, route.path, content=with_value(route.body, path, data.draw(any_json())))


@pytest.mark.long
@pytest.mark.parametrize("route", [r for r in ROUTES if r.method != "PUT"], ids=str)
def test_every_value_in_every_route(route: RouteBody) -> None:
    """Every field gets every sixth value, and the next field the next: all of them would take a
    quarter of an hour, most of it for servers that are made anew. PUT is POST's handler."""
    for place, path in enumerate(route.paths):
        for name, text in list(HOSTILE.items())[place % 6 :: 6]:
            try:
                survives(route.method, route.path, content=with_value(route.body, path, text))
            except BaseException as error:
                error.add_note(f"{route}, field {path}, {name}")
                raise


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_the_example_itself(route: RouteBody) -> None:
    survives(route.method, route.path, json=route.body)


TEXTS = ("", "-1", "1e308", "NaN", "9" * 400, "null", "[1]", "a", "%00", "x" * 5_000, "\U0001f600")


@pytest.mark.parametrize("method,path,name", QUERIES)
def test_any_text_in_any_query(method: str, path: str, name: str) -> None:
    for text in TEXTS:
        survives(method, path, params={name: text})


RAW = {
    "empty": b"",
    "no JSON": b"{",
    "no UTF-8": b'{"text": "\xff\xfe"}',
    "a number": b"1",
    "NUL": b"\0" * 100,
    "deep": b"[" * 100_000,
    "a key twice": b'{"input_ids": [1], "input_ids": [2], "text": 1, "text": "a"}',
    "a byte order mark": b'\xef\xbb\xbf{"input_ids": [1]}',
    "another encoding": '{"input_ids": [1]}'.encode("utf-16"),
}


@pytest.mark.parametrize("path", sorted({route.path for route in ROUTES}))
def test_bodies_that_are_no_object(path: str) -> None:
    for body in RAW.values():
        survives("POST", path, content=body)
