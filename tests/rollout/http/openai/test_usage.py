"""`usage` adds up: prompts once, cached tokens at most those of the prompts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.http_app import Server, run, serving


async def usage_of(server: Server, path: str, body: dict[str, Any], stream: bool) -> Any:
    if not stream:
        reply = await server.post(path, body)
        assert reply.status_code == 200, reply.text
        return reply.json()["usage"]
    more = {"stream": True, "stream_options": {"include_usage": True}}
    text = (await server.post(path, {**body, **more})).text
    last = [line for line in text.split("\n\n") if line][-2]
    return json.loads(last.removeprefix("data: "))["usage"]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("prompts", [["a" * 20], ["a" * 20, "b" * 9, "a" * 20]], ids=len)
def test_completions(prompts: list[str], n: int, stream: bool, echo: bool) -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"prompt": prompts, "n": n, "max_tokens": 5, "echo": echo}
            size = sum(map(len, prompts))
            cached = []
            for _ in range(2):
                usage = await usage_of(server, "/v1/completions", body, stream)
                assert usage["prompt_tokens"] == size
                assert usage["completion_tokens"] == 5 * n * len(prompts)
                assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
                cached.append(usage["prompt_tokens_details"]["cached_tokens"])
                assert 0 <= cached[-1] <= size
            # The second time every full page of every prompt is there.
            assert cached[1] >= sum((len(prompt) - 1) // 4 * 4 for prompt in prompts)

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_chat(stream: bool) -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 3, "n": 3}
            for _ in range(2):
                usage = await usage_of(server, "/v1/chat/completions", body, stream)
                assert usage["completion_tokens"] == 9
                assert usage["total_tokens"] == usage["prompt_tokens"] + 9
                details = usage["prompt_tokens_details"]
                assert 0 <= details["cached_tokens"] <= usage["prompt_tokens"]
            assert details["cached_tokens"] > 0

    run(test)
