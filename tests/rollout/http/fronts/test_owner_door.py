"""What a front passes on to the owner of the engine arrives as it was sent; so do replies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
import uvicorn

from rollout.http.app import front_paths
from rollout.http.config import ServeConfig
from rollout.http.engine.client import AsyncEngine
from rollout.http.fronts.front_app import FrontApp
from rollout.http.fronts.news import News, NewsReader, NewsWriter
from rollout.http.fronts.owner_client import REPORT, FrontReport, OwnerClient
from rollout.http.fronts.owner_door import OwnerDoor
from rollout.http.services import make_services
from rollout.metrics import FinishedSequence
from tests.helpers.http_app import InlineLink, run, until
from tests.helpers.replicas import fake_config

CALLER = {"x-slipstream-caller": "6.6.6.6"}


class Owner:
    """The owner's application: notes what it gets and replies in two parts."""

    def __init__(self) -> None:
        self.scope: dict[str, Any] = {}
        self.body = b""
        self.left = False
        self.waits = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope, more = scope, True
        while more:
            message = await receive()
            self.body += message.get("body", b"")
            more = message.get("more_body", False)
        while self.waits and not self.left:
            self.left = (await receive())["type"] == "http.disconnect"
        headers = [(b"x-one", b"1"), (b"x-one", b"2")]
        await send({"type": "http.response.start", "status": 202, "headers": headers})
        await send({"type": "http.response.body", "body": b"first,", "more_body": True})
        await send({"type": "http.response.body", "body": b"last"})


async def own(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"own"})


class Setting:
    """A front and its owner. http: a client of the front."""

    def __init__(self, folder: Path, http: httpx.AsyncClient) -> None:
        self.owner = Owner()
        self.reports: list[FrontReport] = []
        self.news = NewsWriter(folder)
        self.client = OwnerClient(str(folder / "owner"))
        self.http = http


@asynccontextmanager
async def setting(folder: Path) -> AsyncIterator[Setting]:
    async with httpx.AsyncClient() as unused:
        found = Setting(folder, unused)
    door = OwnerDoor(found.owner, found.reports.append)
    config = uvicorn.Config(door, uds=str(folder / "owner"), log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    app = FrontApp(own, ["/own"], NewsReader(found.news.path), found.client)
    transport = httpx.ASGITransport(app=app, client=("1.2.3.4", 5))
    async with httpx.AsyncClient(transport=transport, base_url="http://front") as found.http:
        yield found
    await found.client.close()
    server.should_exit = True
    await serving


def test_a_request_is_passed_on_as_it_is(tmp_path: Path) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * 100_000

    async def test() -> None:
        async with setting(tmp_path) as here:
            reply = await here.http.put(
                "/a%20b?q=1&q=2", content=parts(), headers={"x-two": "3", **CALLER}
            )
            assert (reply.status_code, reply.text) == (202, "first,last")
            assert reply.headers.get_list("x-one") == ["1", "2"]
            scope = here.owner.scope
            assert (scope["method"], scope["path"]) == ("PUT", "/a b")
            assert scope["query_string"] == b"q=1&q=2"
            assert scope["client"][0] == "1.2.3.4", "a client says where it comes from"
            headers = dict(scope["headers"])
            assert (headers[b"x-two"], headers[b"host"]) == (b"3", b"front")
            assert b"x-slipstream-caller" not in headers
            assert here.owner.body == b"x" * 300_000

    run(test)


@pytest.mark.parametrize("body", [b"", b"{}"])
def test_a_body_that_is_whole_keeps_its_length(tmp_path: Path, body: bytes) -> None:
    async def test() -> None:
        async with setting(tmp_path) as here:
            assert (await here.http.post("/control", content=body)).status_code == 202
            assert dict(here.owner.scope["headers"])[b"content-length"] == str(len(body)).encode()
            assert here.owner.body == body

    run(test)


def test_a_front_answers_its_own_routes_while_nothing_is_held(tmp_path: Path) -> None:
    async def test() -> None:
        async with setting(tmp_path) as here:
            assert (await here.http.post("/own", json={})).text == "own"
            here.news.write(News(holds=True))
            assert (await here.http.post("/own", json={})).text == "first,last"
            here.news.write(News())
            assert (await here.http.get("/own")).text == "own"

    run(test)


def test_the_owner_learns_that_a_client_has_left(tmp_path: Path) -> None:
    async def test() -> None:
        async with setting(tmp_path) as here:
            here.owner.waits = True
            left = asyncio.Event()
            sent: list[Any] = []
            given = [{"type": "http.request", "body": b"{}", "more_body": False}]

            async def receive() -> Any:
                if given:
                    return given.pop()
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {"type": "http", "method": "POST", "path": "/control", "query_string": b""}
            scope |= {"headers": [(b"content-length", b"2"), (b"host", b"front")]}
            call = asyncio.create_task(here.client.forward(scope, receive, send))
            await until(lambda: here.owner.body == b"{}")
            assert not here.owner.left
            left.set()
            await call
            await until(lambda: here.owner.left)
            assert sent == []

    run(test)


def test_an_owner_that_is_not_there_is_an_engine_that_is_gone(tmp_path: Path) -> None:
    async def test() -> None:
        news = NewsWriter(tmp_path)
        client = OwnerClient(str(tmp_path / "nobody"))
        app = FrontApp(own, [], NewsReader(news.path), client)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as http:
            reply = await http.post("/pause", json={})
        assert (reply.status_code, reply.json()["error"]["type"]) == (503, "EngineDead")
        await client.close()

    run(test)


def test_a_report_is_no_request(tmp_path: Path) -> None:
    async def test() -> None:
        async with setting(tmp_path) as here:
            found = FinishedSequence(
                reason="stop",
                latency_s=2.0,
                first_s=1.0,
                decode_s=1.0,
                queue_s=0.5,
                num_prompt=3,
                num_output=4,
            )
            report = FrontReport(name="front-1", finished=[found])
            await here.client.report(report)
            assert (here.reports, here.owner.scope) == ([report], {})
            # From outside it is no report.
            for path in (REPORT, "/-/%66ront"):
                assert (await here.http.post(path, content=b"{}")).text == "own"
            assert here.reports == [report]

    run(test)


@pytest.mark.parametrize("path", ["/a/../-/front", "/a/..", "/./a//b/%2e%2e", "//c/d"])
def test_a_path_is_passed_on_as_it_is(tmp_path: Path, path: str) -> None:
    """Whatever it would be for a browser: so it leads to no report either."""

    async def receive() -> Any:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    statuses: list[int] = []
    bodies = [b"{}"]
    scope = {"type": "http", "method": "POST", "path": unquote(path), "query_string": b""}
    scope |= {"raw_path": path.encode(), "headers": [(b"content-length", b"2")], "client": None}

    async def test() -> None:
        async with setting(tmp_path) as here:
            await here.client.forward(scope, receive, send)
            assert statuses == [202]
            assert here.owner.scope["raw_path"] == path.encode()
            scope.update(path=REPORT, raw_path=REPORT.encode())
            bodies.append(b"{}")
            await here.client.forward(scope, receive, send)
            assert (statuses, here.reports) == ([202, 202], [])

    run(test)


def test_what_keeps_nothing_between_calls_is_answered_by_every_front() -> None:
    config = ServeConfig(engine=fake_config())
    services = make_services(config, AsyncEngine(InlineLink(config.engine)), None)
    paths = front_paths(services)
    assert {"/generate", "/v1/chat/completions", "/v1/messages", "/classify"} <= paths
    assert {"/v1/embeddings", "/v1/score", "/v1/rerank", "/tokenize"} <= paths
    assert paths.isdisjoint({"/sessions", "/rollouts", "/v1/responses", "/pause", "/command"})
