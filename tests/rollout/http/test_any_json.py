"""Any JSON value at any field of a route or a message: 2xx or 4xx, and the engine lives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.protocol import Control, GenerateRequest, GetState, Resume, Shutdown
from rollout.http.dialects.openai_bodies import ChatBody, CompletionBody
from tests.helpers.any_json import EXTREMES, example, fragments, paths, replaced
from tests.helpers.http_app import Server, serving
from tests.helpers.replicas import fake_config

BOUNDED = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
COMMANDS = [kind for kind in get_args(Control) if kind is not Shutdown]
ROUTES: dict[str, tuple[dict[str, Any], type[msgspec.Struct]]] = {
    "/generate": (
        {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 3}},
        GenerateRequest,
    ),
    "/v1/completions": ({"prompt": "ab", "max_tokens": 3}, CompletionBody),
    "/v1/chat/completions": (
        {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 3},
        ChatBody,
    ),
}


class Driver:
    """A server on a loop of its own, driven from tests that are no coroutines."""

    def __init__(self, runner: asyncio.Runner, server: Server) -> None:
        self._runner = runner
        self._server = server

    def post(self, path: str, body: str) -> int:
        """Status of a POST; the engine must answer a control request afterwards."""
        return self._runner.run(asyncio.wait_for(self._post(path, body), 60))

    async def _post(self, path: str, body: str) -> int:
        reply = await self._server.http.post(path, content=body.encode())
        if reply.status_code >= 400:
            assert set(reply.json()["error"]) >= {"type", "message", "field"}, body[:200]
        await self._server.engine.send(Resume())
        state = (await self._server.engine.send(GetState())).state
        assert state is not None and not state.paused
        return reply.status_code


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    config = fake_config(max_waiting=64)
    config = replace(config, scheduler=replace(config.scheduler, max_samples=16))
    with asyncio.Runner() as runner:
        context = serving(engine=config)
        server = runner.run(context.__aenter__())
        yield Driver(runner, server)
        runner.run(context.__aexit__(None, None, None))


def route_fields() -> list[tuple[str, tuple[str, ...]]]:
    return [(path, field) for path, (_, kind) in ROUTES.items() for field in paths(kind)]


def refused_or_served(status: int) -> bool:
    return 200 <= status < 300 or 400 <= status < 500


@pytest.mark.parametrize("path", ROUTES)
@BOUNDED
@given(data=st.data())
def test_any_value_at_any_field_of_a_route(driver: Driver, path: str, data: st.DataObject) -> None:
    base, kind = ROUTES[path]
    field = data.draw(st.sampled_from(list(paths(kind))))
    body = replaced(base, field, data.draw(fragments()))
    assert refused_or_served(driver.post(path, body)), body[:300]


@pytest.mark.parametrize("path", ROUTES)
def test_every_extreme_at_every_field_of_a_route(driver: Driver, path: str) -> None:
    base, kind = ROUTES[path]
    for number, field in enumerate(paths(kind)):
        # Every third, shifted by the field: all of them meet each kind of field.
        for fragment in EXTREMES[number % 3 :: 3]:
            body = replaced(base, field, fragment)
            assert refused_or_served(driver.post(path, body)), (field, fragment[:80])


@BOUNDED
@given(data=st.data())
def test_any_value_at_any_field_of_a_command(driver: Driver, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(COMMANDS))
    fields = [("type",), *paths(kind)]
    body = replaced(example(kind), data.draw(st.sampled_from(fields)), data.draw(fragments()))
    assert refused_or_served(driver.post("/command", body)), body[:300]


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_every_extreme_at_every_field_of_a_command(driver: Driver, kind: Any) -> None:
    for field in paths(kind):
        for fragment in EXTREMES:
            body = replaced(example(kind), field, fragment)
            assert refused_or_served(driver.post("/command", body)), (field, fragment[:80])


@pytest.mark.parametrize("path", [*ROUTES, "/command"])
@pytest.mark.parametrize("body", [*EXTREMES, "\ufeff{}", "{" * 3000, '{"a": 1}' * 2])
def test_any_value_as_the_body(driver: Driver, path: str, body: str) -> None:
    assert refused_or_served(driver.post(path, body))
