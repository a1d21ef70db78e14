"""A client that leaves, and an abort, free the KV of what they end within one step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.config import CacheConfig, EngineConfig
from engine.executor import build_executor
from engine.protocol import Abort, Call
from rollout.ranks.step_executor import StepExecutor
from tests.helpers.fake_executor import FakeExecutor
from tests.helpers.http_app import Server, run, serving, until
from tests.helpers.replicas import fake_config
from tests.helpers.tiny_models import write_tiny

STEPS_BEFORE = 5


def tiny_config(folder: Path) -> EngineConfig:
    write_tiny(folder, "qwen3", vocab_size=300, max_position_embeddings=512)
    small = CacheConfig(page_size=4, num_pages=256)
    fake = fake_config()
    return replace(fake, model=str(folder), device="cpu", dtype="float32", cache=small)


class Watch:
    """The pages that requests hold right after every step, and the step before which the first
    abort reached the engine."""

    def __init__(self, server: Server) -> None:
        self.held: dict[int, int] = {}
        self.aborted_at: int | None = None
        self._leader = server.link.leader
        step, post = self._leader.step, server.link.post

        def stepped() -> Any:
            outputs = step()
            state = self._leader.state()
            held = state.total_pages - state.free_pages - state.cached_pages
            self.held.setdefault(state.num_steps, held)
            return outputs

        def posted(messages: Any) -> None:
            aborts = any(isinstance(m, Call) and isinstance(m.command, Abort) for m in messages)
            if aborts and self.aborted_at is None:
                self.aborted_at = self._leader.state().num_steps
            post(messages)

        self._leader.step, server.link.post = stepped, posted  # type: ignore[method-assign]

    @property
    def num_steps(self) -> int:
        return max(self.held, default=0)


async def call(server: Server, body: Any, left: asyncio.Event) -> None:
    """POST /generate as a client that closes its connection once `left` is set."""
    messages = [{"type": "http.request", "body": msgspec.json.encode(body)}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        return

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/generate",
        "raw_path": b"/generate",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
    }
    await server.app(scope, receive, send)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["leaves", "aborts"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("model", ["fake", "tiny"])
def test_kv_is_free_within_one_step(
    model: str, overlap: bool, how: str, stream: bool, tmp_path: Path
) -> None:
    make: Callable[[EngineConfig], StepExecutor] = FakeExecutor
    config = fake_config()
    if model == "tiny":
        config, make = tiny_config(tmp_path), build_executor
    config = replace(config, scheduler=replace(config.scheduler, overlap=overlap))

    async def test() -> None:
        async with serving(engine=config, executor=make, ids_only=True) as server:
            watch, left = Watch(server), asyncio.Event()
            sampling = {"max_new_tokens": 400, "ignore_eos": True, "n": 2}
            body = {"input_ids": [5, 6, 7], "sampling_params": sampling, "stream": stream}
            open_call = asyncio.create_task(call(server, {**body, "rid": "it"}, left))
            await until(lambda: watch.num_steps >= STEPS_BEFORE)
            if how == "leaves":
                left.set()
            else:
                await server.post("/abort_request", {"rid": "it"})
            await open_call
            await until(lambda: not server.link.leader.can_step())
            assert watch.aborted_at is not None
            assert watch.held[watch.aborted_at] > 0
            after = {steps: held for steps, held in watch.held.items() if steps > watch.aborted_at}
            assert server.link.leader.state().free_pages + _cached(server) == 256
            assert all(held == 0 for held in after.values()), after
            assert len(after) <= 1

    run(test)


def _cached(server: Server) -> int:
    return server.link.leader.state().cached_pages
