"""What a router makes of journaled replies: whole, cut, garbled, refused."""

import asyncio
import json

import httpx
import msgspec
import pytest

from rollout.http.journal import frames
from rollout.http.journal.frames import Head, Resumed, Ticket, frame, whole
from tests.helpers.routers import Answer, FakeWorker, Line, Routed, Seen, routing, run

STREAM = Head(200, [("content-type", "text/event-stream")])
PLAIN = Head(200, [("content-type", "application/json")])
BODY = b'{"text": "a", "stream": true}'


def begin(line: Line) -> None:
    line.send(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/vnd.slipstream.journal\r\n"
        b"transfer-encoding: chunked\r\n\r\n"
    )


def chunk(line: Line, *parts: bytes) -> None:
    data = b"".join(parts)
    line.send(b"%x\r\n%b\r\n" % (len(data), data))


def end(line: Line) -> None:
    line.send(b"0\r\n\r\n")


def head(found: Head) -> bytes:
    return frame(frames.HEAD, msgspec.json.encode(found))


def finishes(seen: Seen, line: Line, piece: bytes = b"two") -> None:
    begin(line)
    resumes = seen.target == frames.RESUME_PATH
    first = [] if resumes else [frame(frames.PIECE, b"one")]
    chunk(line, head(STREAM), *first, frame(frames.PIECE, piece), frame(frames.END))
    end(line)


async def whole_reply(seen: Seen, line: Line) -> None:
    finishes(seen, line)


def one_piece(*last: bytes, cut: bool = True) -> Answer:
    """An answer of one record and one piece, which then ends by `last`."""

    async def answer(seen: Seen, line: Line) -> None:
        begin(line)
        chunk(line, frame(frames.VERSION, b"7"), frame(frames.RECORD, b"first"), head(STREAM))
        chunk(line, frame(frames.PIECE, b"one"))
        if last:
            chunk(line, *last)
        await line.writer.drain()
        # What is sent before a reset may be dropped by it.
        await asyncio.sleep(0.05)
        if cut:
            line.cut()
        else:
            end(line)

    return answer


async def ask(routed: Routed) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return await routed.http.post("/generate", content=BODY, headers=headers)


@pytest.mark.parametrize(
    "answer",
    [
        one_piece(),
        one_piece(frame(frames.PIECE, b"tw")[:-1]),
        one_piece(frame(frames.LOST, b"the engine died"), cut=False),
        one_piece(b"garbage, and no frame", cut=False),
        one_piece(cut=False),
    ],
    ids=["cut", "in-a-frame", "given-up", "garbled", "without-an-end"],
)
def test_a_stream_goes_on_behind_the_last_whole_piece(answer: Answer) -> None:
    async def test() -> None:
        dying, other = FakeWorker(answer), FakeWorker(whole_reply)
        async with routing(dying, other) as routed:
            assert (await ask(routed)).text == "onetwo"
            (first,) = dying.seen
            assert first.body == BODY
            ticket = msgspec.json.decode(first.headers[frames.HEADER.decode()], type=Ticket)
            (second,) = other.calls(frames.RESUME_PATH)
            (_, resumed), (kind, record), (_, body) = whole(second.body)
            assert msgspec.json.decode(resumed, type=Resumed) == Resumed("/generate", ticket, 1)
            assert (kind, record, body) == (frames.RECORD, b"first", BODY)

    run(test)


def test_a_reply_that_is_no_stream_is_sent_once_it_is_whole() -> None:
    async def test() -> None:
        async def half(seen: Seen, line: Line) -> None:
            begin(line)
            chunk(line, frame(frames.RECORD, b"r"), head(PLAIN), frame(frames.PIECE, b'{"a":'))
            await line.writer.drain()
            await asyncio.sleep(0.05)
            line.cut()

        async def all_of_it(seen: Seen, line: Line) -> None:
            begin(line)
            chunk(line, head(PLAIN), frame(frames.PIECE, b'{"a":1}'), frame(frames.END))
            end(line)

        async with routing(FakeWorker(half), FakeWorker(all_of_it)) as routed:
            reply = await ask(routed)
            assert (reply.status_code, reply.json()) == (200, {"a": 1})
            assert reply.headers["content-type"] == "application/json"

    run(test)


def test_the_one_that_has_the_weights_of_the_last_token_is_asked_first() -> None:
    async def test() -> None:
        dying, old, same = (
            FakeWorker(one_piece(), version="7"),
            FakeWorker(whole_reply, version="6"),
            FakeWorker(whole_reply, version="7"),
        )
        async with routing(dying, old, same) as routed:
            assert (await ask(routed)).text == "onetwo"
            assert (len(old.seen), len(same.seen)) == (0, 1)

    run(test)


def test_one_that_cannot_go_on_is_not_the_last() -> None:
    async def test() -> None:
        async def behind(seen: Seen, line: Line) -> None:
            begin(line)
            error = {"error": {"type": "WorkerBehind", "message": "older"}}
            refused = Head(503, [("content-type", "application/json")])
            body = frame(frames.PIECE, json.dumps(error).encode())
            chunk(line, head(refused), body, frame(frames.END))
            end(line)

        async with routing(
            FakeWorker(one_piece()), FakeWorker(behind), FakeWorker(whole_reply)
        ) as routed:
            assert (await ask(routed)).text == "onetwo"
        async with routing(FakeWorker(one_piece()), FakeWorker(behind)) as routed:
            text = (await ask(routed)).text
            assert text.startswith("one") and "WorkerBehind" in text

    run(test)


def test_where_all_are_dead_a_request_waits_for_one_that_comes_back() -> None:
    async def test() -> None:
        worker = FakeWorker(one_piece())
        async with routing(worker) as routed:
            waiting = asyncio.create_task(ask(routed))
            await routed.until(lambda: worker.seen)
            await worker.stop()
            await routed.until(lambda: routed.router._parts.parked)
            refused = await ask(routed)
            assert refused.json()["error"]["type"] == "NoWorker"
            worker.answer = whole_reply
            await worker.start(worker.port)
            assert (await waiting).text == "onetwo"
            assert (await ask(routed)).text == "onetwo"

    run(test)


def test_a_request_that_waits_in_vain_is_told_so() -> None:
    async def test() -> None:
        worker = FakeWorker(one_piece())
        async with routing(worker, patience_s=0.2) as routed:
            waiting = asyncio.create_task(ask(routed))
            await routed.until(lambda: worker.seen)
            await worker.stop()
            text = (await waiting).text
            assert text.startswith("one") and "NoWorker" in text

    run(test)


def test_two_routers_may_have_one_fleet() -> None:
    async def test() -> None:
        workers = FakeWorker(whole_reply), FakeWorker(whole_reply)
        async with routing(*workers) as first, routing(*workers) as second:
            replies = await asyncio.gather(*(ask(one) for one in (first, second) * 4))
            assert {reply.text for reply in replies} == {"onetwo"}
            tickets = {seen.headers[frames.HEADER.decode()] for one in workers for seen in one.seen}
            assert len(tickets) == 8

    run(test)


def test_a_worker_that_is_silent_and_not_well_loses_its_requests() -> None:
    async def test() -> None:
        async def hang(seen: Seen, line: Line) -> None:
            await asyncio.sleep(60)

        silent, other = FakeWorker(hang), FakeWorker(whole_reply)
        async with routing(silent, other) as routed:
            waiting = asyncio.create_task(ask(routed))
            await routed.until(lambda: silent.seen)
            # Nobody asks a worker whose time has not come, nor one that is being steered.
            (worker, _) = routed.router.fleet
            routed.router.tick(worker.heard_at + 20)
            worker.num_controls = 1
            routed.router.tick(worker.heard_at + 31)
            assert not waiting.done()
            worker.num_controls, silent.well = 0, False
            routed.router.tick(worker.heard_at + 31)
            assert (await waiting).text == "onetwo"

    run(test)


def test_a_session_whose_worker_died_is_not_sent_to_it_again_and_again() -> None:
    async def test() -> None:
        workers = [FakeWorker(whole_reply) for _ in range(3)]
        async with routing(*workers, policy="cache_aware") as routed:
            headers = {"content-type": "application/json", "x-smg-routing-key": "a-session"}

            async def turn() -> str:
                return (await routed.http.post("/generate", content=BODY, headers=headers)).text

            for _ in range(3):
                assert await turn() == "onetwo"
            (home,) = [worker for worker in workers if worker.seen]
            assert len(home.seen) == 3
            home.answer = one_piece()
            assert await turn() == "onetwo"
            await home.stop()
            assert [await turn() for _ in range(6)] == ["onetwo"] * 6
            # All of them at one of the others, and home again once it is back.
            assert sorted(len(worker.seen) for worker in workers if worker is not home) == [0, 7]
            home.answer = whole_reply
            await home.start(home.port)
            await routed.until_ready(3)
            before = len(home.seen)
            assert await turn() == "onetwo"
            assert len(home.seen) == before + 1

    run(test)
