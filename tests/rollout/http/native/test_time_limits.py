"""`timeout_s`, and a server's own limits: a reply with what there is, and nothing left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.protocol import Pause
from tests.helpers.http_app import Server, events, run, serving, until

SAMPLING = {"max_new_tokens": 400, "ignore_eos": True}


async def cut_after(server: Server, path: str, body: dict[str, Any], num_tokens: int) -> Any:
    """The reply to a request that gets so many tokens and then waits for its limit."""
    seen = server.link.leader.step

    def step() -> Any:
        found = seen()
        if server.link.leader.state().num_output_tokens >= num_tokens:
            server.link.leader.handle(Pause())
        return found

    server.link.leader.step = step  # type: ignore[method-assign]
    return await server.post(path, body)


def test_a_request_ends_at_its_limit_with_the_tokens_that_it_has() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"input_ids": [1, 2], "sampling_params": SAMPLING, "timeout_s": 0.3}
            reply = (await cut_after(server, "/generate", body, 5)).json()
            reason = reply["meta_info"]["finish_reason"]
            assert reason["type"] == "abort" and "0.3 s is over" in reason["message"]
            assert 5 <= len(reply["output_ids"]) < 400
            state = await server.engine.state(max_age_s=0.0)
            assert (state.num_running, state.num_waiting) == (0, 0)
            assert state.free_pages + state.cached_pages == state.total_pages

    run(test)


def test_of_a_batch_each_has_its_own() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {
                "input_ids": [[1], [2]],
                "sampling_params": [SAMPLING, {"max_new_tokens": 2, "ignore_eos": True}],
                "timeout_s": [0.3, None],
            }
            cut, whole = (await cut_after(server, "/generate", body, 8)).json()
            assert cut["meta_info"]["finish_reason"]["type"] == "abort"
            assert whole["meta_info"]["finish_reason"]["type"] == "length"

    run(test)


@pytest.mark.parametrize(
    "flags,asked",
    [
        ({"request_timeout_s": 0.3}, None),
        ({"max_request_timeout_s": 0.3}, None),
        ({"max_request_timeout_s": 0.3}, 600.0),
        ({"request_timeout_s": 600.0, "max_request_timeout_s": 0.3}, None),
    ],
)
def test_a_servers_limits_hold_for_every_dialect(
    flags: dict[str, float], asked: float | None
) -> None:
    async def test() -> None:
        async with serving(**flags) as server:
            more = {"timeout_s": asked, "ignore_eos": True, "max_tokens": 300}
            body = {"prompt": [1, 2], **more}
            (choice,) = (await cut_after(server, "/v1/completions", body, 5)).json()["choices"]
            assert choice["finish_reason"] == "abort"
            reply = await server.post("/inference/v1/generate", {"token_ids": [1]})
            assert reply.json()["choices"][0]["finish_reason"] == "abort"

    run(test)


def test_a_stream_ends_by_it_too() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"input_ids": [1], "sampling_params": SAMPLING, "stream": True}
            reply = await cut_after(server, "/generate", {**body, "timeout_s": 0.3}, 5)
            *_, last, end = events(reply.text)
            assert end is None and last["meta_info"]["finish_reason"]["type"] == "abort"
            assert len(last["output_ids"]) >= 5

    run(test)


def test_a_request_that_ends_before_leaves_no_timer() -> None:
    async def test() -> None:
        async with serving(request_timeout_s=3600.0) as server:
            await server.post("/generate", {"input_ids": [1]})
            assert not server.engine.num_open
            assert server.commands() == []
            task = asyncio.create_task(server.post("/generate", {"input_ids": [1]}))
            await until(lambda: bool(server.link.requests))
            assert (await task).json()["meta_info"]["finish_reason"]["type"] != "abort"

    run(test)


@pytest.mark.parametrize("value", [0, -1, "soon"])
def test_a_limit_that_is_none_is_refused_by_name(value: Any) -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.post("/generate", {"input_ids": [1], "timeout_s": value})
            assert reply.status_code == 400
            assert "timeout_s" in reply.json()["error"]["message"]

    run(test)
