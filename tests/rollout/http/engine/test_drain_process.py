"""SIGTERM to a server as a process: what runs ends as it would have, and nothing new begins."""

from __future__ import annotations

import asyncio
import signal

import httpx
import pytest

from tests.helpers.fake_executor import expected_tokens
from tests.helpers.serve_process import ServerProcess, fake_server, gone

pytestmark = pytest.mark.slow

PACED = "tests.helpers.paced_executor:build"
NUM_TOKENS = 300


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_lets_requests_finish_and_refuses_new_ones(processes: int) -> None:
    code = fake_server(server=f"http_processes={processes}, drain_timeout_s=60", factory=PACED)
    with ServerProcess(["-c", code]) as server:
        children = server.children()
        asyncio.run(_drained(server))
        assert server.process.wait(60) == 0
        assert all(gone(pid) for pid in children)


async def _drained(server: ServerProcess) -> None:
    sampling = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    body = {"input_ids": [4, 5], "sampling_params": sampling, "stream": True}
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=60) as http,
        http.stream("POST", "/generate", json=body) as reply,
    ):
        lines = reply.aiter_lines()
        await anext(lines)
        server.process.send_signal(signal.SIGTERM)
        refused = await _refused(http)
        assert refused.json()["error"]["type"] == "Draining"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        last = [line async for line in lines if line.startswith("data: {")][-1]
    tokens = expected_tokens([4, 5], NUM_TOKENS)
    assert f'"output_ids":{tokens}'.replace(" ", "") in last.replace(" ", "")


async def _refused(http: httpx.AsyncClient) -> httpx.Response:
    """The first refusal of a short request: the signal may not have arrived before."""
    while True:
        asked = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
        reply = await http.post("/generate", json=asked)
        if reply.status_code == 503:
            return reply
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("processes", [1, 2])
def test_sigint_does_not_wait_and_its_code_is_its_own(processes: int) -> None:
    code = fake_server(server=f"drain_timeout_s=600, http_processes={processes}", factory=PACED)
    with ServerProcess(["-c", code]) as server:
        asyncio.run(_cut(server))
        assert server.process.wait(60) != 0


def test_a_terminal_that_closes_is_as_sigterm() -> None:
    code = fake_server(server="drain_timeout_s=0.3", factory=PACED)
    with ServerProcess(["-c", code]) as server:
        children = server.children()
        asyncio.run(_cut(server, signal.SIGHUP))
        assert server.process.wait(60) == 0
        assert all(gone(pid) for pid in children)


async def _cut(server: ServerProcess, sent: signal.Signals = signal.SIGINT) -> None:
    body = {"input_ids": [4], "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=60) as http,
        http.stream("POST", "/generate", json={**body, "stream": True}) as reply,
    ):
        lines = reply.aiter_lines()
        await anext(lines)
        server.process.send_signal(sent)
        last = [line async for line in lines if line.startswith("data: {")][-1]
    assert '"type":"abort"' in last
