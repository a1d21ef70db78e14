"""Workers that say what cannot be: of themselves, and in replies. Nobody waits for ever for it."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from rollout.http.journal import frames
from rollout.http.journal.frames import Head, frame
from tests.helpers.routers import Answer, FakeWorker, Line, Seen, routing, run

STREAM = msgspec.json.encode(Head(200, [("content-type", "text/event-stream")]))
BODY = {"text": "a"}


class Boaster(FakeWorker):
    """A worker of whose `/server_info` a test says something itself."""

    facts: Mapping[str, Any] = {}

    def _info(self) -> dict[str, Any]:
        return {**super()._info(), **self.facts}


def framed(*parts: bytes) -> Answer:
    """A journaled reply of these frames, by a worker that stays there."""

    async def answer(seen: Seen, line: Line) -> None:
        data = b"".join(parts)
        head = f"content-type: {frames.CONTENT_TYPE.decode()}\r\ncontent-length: {len(data)}"
        line.send(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode() + data)

    return answer


@pytest.mark.parametrize(
    "facts, field",
    [
        ({"num_gpus": "eight"}, "num_gpus"),
        ({"tp_size": -1}, "tp_size"),
        ({"internal_states": 5}, "internal_states"),
        ({"internal_states": {"refusal": ""}}, "internal_states"),
        ({"served_model_name": ["a"]}, "served_model_name"),
        ({"weight_version": {}}, "weight_version"),
    ],
)
def test_what_a_worker_says_of_itself_is_looked_at(facts: dict[str, Any], field: str) -> None:
    async def test() -> None:
        honest, boaster = FakeWorker(), Boaster()
        boaster.facts = facts
        async with routing(honest) as routed:
            await boaster.start()
            await routed.http.post("/workers", json={"url": boaster.url})
            known = routed.router.fleet.find(boaster.url)
            await routed.until(lambda: known.why)
            assert field in known.state and not known.joined
            # Nobody else is kept from anything by it.
            assert (await routed.http.get("/get_world_size")).json() == {"world_size": 1}
            assert (await routed.http.post("/flush_cache", json={})).status_code == 200
            # One that says it later, when it has joined, is asked no more.
            boaster.facts = {}
            await routed.until_ready(2)
            boaster.facts = facts
            reply = await routed.http.post("/update_weight_version", json={"new_version": "1"})
            assert reply.status_code == 200
            assert not known.in_rotation
        await boaster.stop()

    run(test)


@pytest.mark.parametrize(
    "parts",
    [
        [frame(frames.END)],
        [frame(frames.PIECE, b"x"), frame(frames.END)],
        [frame(frames.HEAD, b"[200,[]]")],
        [frame(frames.HEAD, b"nonsense"), frame(frames.END)],
        [frame(frames.VERSION, b"\xff"), frame(frames.END)],
        [frame(frames.HEAD, '[200,[["a","\u20ac"]]]'.encode()), frame(frames.END)],
        [frame(frames.HEAD, b'[200,[["a","b\\r\\nc: d"]]]'), frame(frames.END)],
        [frame(frames.HEAD, b"[9999,[]]"), frame(frames.END)],
    ],
    ids=["no-head", "piece-first", "no-end", "garbled", "text", "symbol", "injected", "status"],
)
def test_a_journal_that_cannot_be_is_a_worker_lost(parts: list[bytes]) -> None:
    async def test() -> None:
        liar, honest = FakeWorker(framed(*parts)), FakeWorker()
        async with routing(liar, honest) as routed:
            for _ in range(2):
                reply = await routed.http.post("/generate", json=BODY)
                assert reply.json()["worker"] == honest.url
            assert all(worker.num_open == 0 for worker in routed.router.fleet)

    run(test)


def test_a_stream_whose_head_cannot_be_sent_has_that_of_the_next_worker() -> None:
    async def test() -> None:
        bad = frame(
            frames.HEAD, '[200,[["content-type","text/event-stream"],["a","\u20ac"]]]'.encode()
        )
        good = [frame(frames.HEAD, STREAM), frame(frames.PIECE, b"data: 1\n\n"), frame(frames.END)]
        async with routing(FakeWorker(framed(bad)), FakeWorker(framed(*good))) as routed:
            for _ in range(2):
                reply = await routed.http.post("/generate", json=BODY)
                assert (reply.status_code, reply.text) == (200, "data: 1\n\n")

    run(test)


def test_the_error_that_ends_a_stream_of_named_events_has_a_name() -> None:
    async def test() -> None:
        async def dying(seen: Seen, line: Line) -> None:
            begun = frame(frames.HEAD, STREAM) + frame(frames.RECORD, b"r")
            await framed(begun, frame(frames.PIECE, b"event: a\ndata: {}\n\n"))(seen, line)

        async def behind(seen: Seen, line: Line) -> None:
            line.reply(b'{"error":{"type":"WorkerBehind","message":"older"}}', 503)

        async with routing(FakeWorker(dying), FakeWorker(behind)) as routed:
            text = (await routed.http.post("/v1/messages", json=BODY)).text
            assert text.startswith("event: a\n")
            name, data = text.strip().split("\n")[-2:]
            assert name == "event: error"
            assert "older" in json.loads(data.removeprefix("data: "))["error"]["message"]

    run(test)


@pytest.mark.parametrize("size", ["content-length: 100", "transfer-encoding: chunked"])
def test_a_reply_that_ends_before_its_length_is_none(size: str) -> None:
    async def test() -> None:
        async def short(seen: Seen, line: Line) -> None:
            # As a server does that is told to leave, and killed in the middle.
            line.send(f"HTTP/1.1 200 OK\r\nconnection: close\r\n{size}\r\n\r\n".encode())
            line.send(b"9\r\n123456789" if "chunked" in size else b"123456789")
            await line.writer.drain()
            line.writer.close()

        async with routing(FakeWorker(short), journal=False, patience_s=0.2) as routed:
            reply = await routed.http.post("/sessions", json={})
            assert reply.status_code == 503
            assert json.loads(reply.text)["error"]["type"] == "WorkerLost"

    run(test)


def test_who_joins_during_an_update_is_judged_by_what_came_of_it() -> None:
    async def test() -> None:
        release, updating = asyncio.Event(), asyncio.Event()

        async def updated(seen: Seen, line: Line) -> None:
            if seen.target == "/update_weight_version":
                updating.set()
                await release.wait()
                first.version = "1"
            line.reply(b"{}")

        first, joiner = FakeWorker(updated), FakeWorker()
        async with routing(first) as routed:
            call = routed.http.post("/update_weight_version", json={"new_version": "1"})
            update = asyncio.create_task(call)
            await updating.wait()
            await joiner.start()
            await routed.http.post("/workers", json={"url": joiner.url})
            await routed.until_ready(2)
            release.set()
            assert joiner.url in (await update).json()["out_of_rotation"]
            known = routed.router.fleet.find(joiner.url)
            assert "the fleet serves '1'" in known.state
        await joiner.stop()

    run(test)
