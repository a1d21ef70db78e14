"""A reply that was cut at any frame, and goes on at another server: as if nothing had been."""

import asyncio
import dataclasses
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from rollout.http.journal import frames
from tests.helpers.http_app import Server, serving
from tests.helpers.journals import Found, journaled, resumed
from tests.helpers.replicas import fake_config

SAMPLING = {"max_new_tokens": 14, "temperature": 0.0, "ignore_eos": True}
IDS = [5, 6, 7, 8]
CHAT = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 12}

CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/generate", {"input_ids": IDS, "sampling_params": SAMPLING}),
    "generate-scores": (
        "/generate",
        {
            "input_ids": IDS,
            "sampling_params": SAMPLING,
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": 2,
            "return_entropy": True,
        },
    ),
    "generate-n": ("/generate", {"text": "abc", "sampling_params": {**SAMPLING, "n": 4}}),
    "generate-batch": (
        "/generate",
        {"text": ["abc", "de"], "sampling_params": [SAMPLING, {**SAMPLING, "max_new_tokens": 5}]},
    ),
    "generate-stop": (
        "/generate",
        {"text": "abc", "sampling_params": {**SAMPLING, "stop": ["ab", "1"], "max_new_tokens": 60}},
    ),
    "generate-penalties": (
        "/generate",
        {
            "input_ids": IDS,
            "sampling_params": {**SAMPLING, "frequency_penalty": 0.5, "min_new_tokens": 6},
        },
    ),
    "generate-given": (
        "/generate",
        {"input_ids": IDS, "output_ids": [9, 10, 11], "sampling_params": SAMPLING},
    ),
    "completions": ("/v1/completions", {"prompt": "abc", "max_tokens": 12, "n": 2, "logprobs": 1}),
    "chat": ("/v1/chat/completions", {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 1}),
    "messages": ("/v1/messages", {**CHAT, "model": "fake"}),
    "responses": ("/v1/responses", {"input": "abc", "max_output_tokens": 12}),
    "tokens": (
        "/inference/v1/generate",
        {"token_ids": IDS, "sampling_params": {"max_tokens": 12, "logprobs": 0}},
    ),
}


def run(test: Callable[[Server], Awaitable[None]], **options: Any) -> None:
    """Without a prefix cache, so that the same request finds the same every time."""

    async def within() -> None:
        config = fake_config(max_waiting=4000)
        cache = dataclasses.replace(config.cache, prefix_cache=False)
        async with serving(engine=dataclasses.replace(config, cache=cache), **options) as server:
            await test(server)

    asyncio.run(within())


def plain(body: bytes) -> Any:
    """A reply without what a clock says; a stream of several samples, whose events come in any
    order, as what each of them got."""
    body = re.sub(rb'"(e2e_latency|completed_at)":[^,}]+', rb'"\1":0', body)
    if not body.startswith(b"data: "):
        return body
    events = [json.loads(line[6:]) for line in body.split(b"\n\n") if line.startswith(b"data: {")]
    parts = [part for event in events for part in event.get("choices", [event])]
    if not any(part.get("index") for part in parts):
        return body
    found: dict[int, list[Any]] = {}
    for part in parts:
        ids, text = part.get("output_ids", []), part.get("text") or part.get("delta") or ""
        if isinstance(text, dict):
            text = text.get("content") or ""
        seen = found.setdefault(part["index"], [[], "", None])
        whole = bool(seen[0]) and ids[: len(seen[0])] == seen[0]
        seen[0] = ids if whole else seen[0] + ids
        seen[1] = text if whole else seen[1] + text
        seen[2] = part.get("finish_reason") or part.get("meta_info", {}).get("finish_reason")
    return found


async def every_cut(server: Server, path: str, body: dict[str, Any]) -> Found:
    undisturbed = await journaled(server, path, body)
    count = len(undisturbed.frames)
    assert undisturbed.frames[-1][0] == frames.END
    for cut in {*range(0, count, max(1, count // 6)), count - 2, count - 1}:
        before = undisturbed.cut(cut)
        pieces = before.of(frames.PIECE) if undisturbed.streams else []
        after = await resumed(server, path, body, before, len(pieces))
        assert after.frames[-1][0] == frames.END
        assert after.head == undisturbed.head
        assert plain(b"".join(pieces) + after.body) == plain(undisturbed.body), cut
        new = undisturbed.frames[cut:]
        recorded = [payload for kind, payload in new if kind == frames.RECORD]
        # What was known is not told again.
        assert bool(after.of(frames.RECORD)) <= bool(recorded)
    return undisturbed


def _keys(reply: Any) -> list[str]:
    return list(reply[0] if isinstance(reply, list) else reply)


@pytest.mark.parametrize("name", CALLS)
def test_a_reply_goes_on_from_any_record(name: str) -> None:
    path, body = CALLS[name]

    async def test(server: Server) -> None:
        found = await every_cut(server, path, body)
        assert found.head.status == 200, found.body
        assert len(found.of(frames.PIECE)) == 1
        ordinary = json.loads((await server.post(path, body)).content)
        assert _keys(ordinary) == _keys(json.loads(found.body))

    run(test)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("increments", [False, True])
def test_a_stream_goes_on_from_any_piece(name: str, increments: bool) -> None:
    path, body = CALLS[name]
    if increments and path != "/generate":
        pytest.skip("only native streams have two forms")

    async def test(server: Server) -> None:
        found = await every_cut(server, path, {**body, "stream": True})
        assert found.streams, found.body
        assert len(found.of(frames.PIECE)) > 3

    run(test, incremental_streaming_output=increments)
