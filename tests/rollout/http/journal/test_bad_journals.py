"""Tickets and records that no router sends: refused as a whole, before a token is drawn."""

import asyncio
import json
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.protocol import encode
from rollout.http.journal import frames
from rollout.http.journal.frames import frame, whole
from rollout.http.journal.records import Row
from tests.helpers.http_app import Server, serving

NAME = "a" * 32
BODY = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4}}
ROW: dict[str, Any] = {
    "place": 0,
    "start": 0,
    "version": 0,
    "ids": np.array([1, 2], np.int32).tobytes(),
    "logprobs": np.zeros(2, np.float32).tobytes(),
    "prompt_tokens": 3,
    "cached_tokens": 0,
    "num_retractions": 0,
    "num_restarts": 0,
}


@pytest.mark.parametrize(
    "told",
    [
        ["/generate", [1, NAME, 1], -1],
        ["/generate", [-1, NAME, 1], 0],
        ["/generate", [1 << 63, NAME, 1], 0],
        ["/generate", [1, "a" * 1000, 1], 0],
        ["/generate", [1, "a\n", 1], 0],
        ["/generate", [1, NAME, -1], 0],
        ["/generate", [1], 0],
        {},
    ],
)
def test_a_ticket_that_no_router_draws_is_refused(told: Any) -> None:
    async def test(server: Server) -> None:
        parts = [frame(frames.TICKET, json.dumps(told).encode())]
        data = b"".join([*parts, frame(frames.PIECE, json.dumps(BODY).encode())])
        reply = await server.http.post(frames.RESUME_PATH, content=data)
        assert (reply.status_code, reply.json()["error"]["field"]) == (400, "journal")
        good = frame(frames.TICKET, msgspec.json.encode(["/generate", [1, NAME, 1], 0]))
        data = data.replace(parts[0], good)
        assert (await server.http.post(frames.RESUME_PATH, content=data)).status_code == 200
        if isinstance(told, list) and told[2] == 0:
            headers = {frames.HEADER.decode(): json.dumps(told[1])}
            reply = await server.post("/generate", BODY, headers=headers)
            assert (reply.status_code, reply.json()["error"]["field"]) == (400, "journal")

    run(test)


@pytest.mark.parametrize(
    "rows",
    [
        [{"logprobs": np.zeros(3, np.float32).tobytes()}],
        [{"ids": b"abc"}],
        [{"start": 1}],
        [{}, {"start": 3}],
        [{}, {}],
        [{"place": 1}],
    ],
)
def test_records_that_do_not_follow_one_another_are_refused(rows: list[dict[str, Any]]) -> None:
    async def test(server: Server) -> None:
        told = msgspec.json.encode(["/generate", [1, NAME, 1], 0])
        records = [frame(frames.RECORD, encode([Row(**{**ROW, **row})])) for row in rows]
        body = frame(frames.PIECE, json.dumps(BODY).encode())
        data = b"".join([frame(frames.TICKET, told), *records, body])
        found = whole((await server.http.post(frames.RESUME_PATH, content=data)).content)
        (refused,) = [json.loads(payload) for kind, payload in found if kind == frames.PIECE]
        assert refused["error"]["field"] == "journal"
        assert not [kind for kind, _ in found if kind == frames.RECORD]

    run(test)


def run(test: Any) -> None:
    async def within() -> None:
        async with serving() as server:
            await test(server)

    asyncio.run(within())
