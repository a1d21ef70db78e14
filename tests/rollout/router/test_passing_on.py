"""Requests through a router: bytes as they came, workers in turn, errors in the one shape."""

import asyncio
import json
import socket

import httpx
import pytest

from tests.helpers.routers import FakeWorker, Line, Routed, Seen, routing, run

BODY = b'{ "input_ids" : [1,2,  3], "sampling_params": {"n": 1}, "unknown":"\\u00e9" }'
JSON = {"content-type": "application/json"}


async def post(routed: Routed, path: str = "/generate", body: bytes = BODY) -> httpx.Response:
    return await routed.http.post(path, content=body, headers=JSON)


def test_a_body_and_its_target_reach_a_worker_byte_for_byte() -> None:
    async def test() -> None:
        worker = FakeWorker()
        async with routing(worker, journal=False) as routed:
            reply = await routed.http.post(
                "/generate?x=%41", content=BODY, headers={**JSON, "x-own": "a, b"}
            )
            (seen,) = worker.seen
            assert (seen.method, seen.target, seen.body) == ("POST", "/generate?x=%41", BODY)
            assert seen.headers["x-own"] == "a, b"
            assert seen.headers["host"] == worker.url.removeprefix("http://")
            assert reply.json()["body"] == BODY.decode()

    run(test)


def test_workers_take_turns_and_a_connection_serves_many_requests() -> None:
    async def test() -> None:
        first, second = FakeWorker(), FakeWorker()
        async with routing(first, second) as routed:
            for _ in range(6):
                assert (await post(routed)).status_code == 200
            assert (len(first.seen), len(second.seen)) == (3, 3)

    run(test)


def test_the_least_loaded_worker_is_asked() -> None:
    async def test() -> None:
        release = asyncio.Event()

        async def held(seen: Seen, line: Line) -> None:
            await release.wait()
            line.reply(b"{}")

        slow, quick = FakeWorker(held), FakeWorker()
        async with routing(slow, quick, policy="least_load") as routed:
            # Whichever the first goes to, one of two is on the slow one.
            waiting = [asyncio.create_task(post(routed)) for _ in range(2)]
            await routed.until(lambda: slow.seen)
            for _ in range(4):
                await post(routed)
            assert len(slow.seen) == 1
            release.set()
            await asyncio.gather(*waiting)

    run(test)


def test_a_stream_comes_in_the_pieces_it_was_sent_in() -> None:
    async def test() -> None:
        more = asyncio.Event()

        async def stream(seen: Seen, line: Line) -> None:
            line.send(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                b"transfer-encoding: chunked\r\n\r\n8\r\ndata: 1\n\r\n"
            )
            await more.wait()
            line.send(b"8\r\ndata: 2\n\r\n0\r\n\r\n")

        async with (
            routing(FakeWorker(stream)) as routed,
            routed.http.stream("POST", "/generate", content=BODY, headers=JSON) as got,
        ):
            parts = got.aiter_bytes()
            assert await anext(parts) == b"data: 1\n"
            more.set()
            assert await anext(parts) == b"data: 2\n"

    run(test)


def test_a_client_that_leaves_takes_its_request_with_it() -> None:
    async def test() -> None:
        left = asyncio.Event()

        async def hang(seen: Seen, line: Line) -> None:
            await line.writer.wait_closed()
            left.set()

        worker = FakeWorker(hang)
        async with routing(worker) as routed:
            task = asyncio.create_task(post(routed))
            await routed.until(lambda: worker.seen)
            assert [one.num_open for one in routed.router.fleet] == [1]
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await routed.until(lambda: [one.num_open for one in routed.router.fleet] == [0])
            for writer in list(worker.writers):
                writer.close()

    run(test)


def test_without_a_worker_the_error_has_the_form_of_its_dialect() -> None:
    async def test() -> None:
        async with routing() as routed:
            reply = await post(routed)
            assert reply.status_code == 503
            assert reply.json()["error"]["type"] == "NoWorker"
            assert "--router" in reply.json()["error"]["message"]
            named = await post(routed, "/v1/messages")
            assert named.json()["type"] == "error"
            assert named.json()["error"]["type"] == "overloaded_error"
            assert (await routed.http.get("/ready")).status_code == 503
            assert (await routed.http.get("/health")).status_code == 200

    run(test)


def test_one_that_refuses_connections_is_passed_over_and_comes_back() -> None:
    async def test() -> None:
        first, second = FakeWorker(), FakeWorker()
        async with routing(first, second) as routed:
            await first.stop()
            for _ in range(4):
                assert (await post(routed)).json()["worker"] == second.url
            await first.start(first.port)
            await routed.until_ready(2)
            answered = {(await post(routed)).json()["worker"] for _ in range(4)}
            assert answered == {first.url, second.url}

    run(test)


def test_one_that_takes_nothing_now_is_not_the_last_word() -> None:
    async def test() -> None:
        async def full(seen: Seen, line: Line) -> None:
            line.reply(b'{"error":{"type":"QueueFull","message":"full"}}', 503)

        async with routing(FakeWorker(full), FakeWorker()) as routed:
            for _ in range(4):
                assert (await post(routed)).status_code == 200
        async with routing(FakeWorker(full), FakeWorker(full)) as routed:
            reply = await post(routed)
            assert (reply.status_code, reply.json()["error"]["type"]) == (503, "QueueFull")

    run(test)


def test_a_reply_that_is_cut_is_asked_for_again() -> None:
    async def test() -> None:
        async def cut(seen: Seen, line: Line) -> None:
            line.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
            await line.writer.drain()
            line.cut()

        broken, whole = FakeWorker(cut), FakeWorker()
        async with routing(broken, whole) as routed:
            replies = [await post(routed) for _ in range(2)]
            assert {reply.json()["worker"] for reply in replies} == {whole.url}

    run(test)


def test_a_request_that_ends_every_worker_ends_after_three() -> None:
    async def test() -> None:
        async def dies(seen: Seen, line: Line) -> None:
            line.cut()

        workers = [FakeWorker(dies) for _ in range(6)]
        async with routing(*workers, patience_s=0.05) as routed:
            reply = await post(routed)
            assert (reply.status_code, reply.json()["error"]["type"]) == (503, "WorkerLost")
            assert sum(len(worker.seen) for worker in workers) == 4

    run(test)


def test_a_plain_stream_that_is_cut_says_so_at_its_end() -> None:
    async def test() -> None:
        async def cut(seen: Seen, line: Line) -> None:
            line.send(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                b"transfer-encoding: chunked\r\n\r\n8\r\ndata: 1\n\r\n"
            )
            await line.writer.drain()
            line.cut()

        async with routing(FakeWorker(cut), journal=False) as routed:
            text = (await post(routed)).text
            assert text.startswith("data: 1\n")
            assert json.loads(text.partition("\n")[2].removeprefix("data: "))["error"]["type"] == (
                "WorkerLost"
            )

    run(test)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9999999999\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        (b"POST /generate HTTP/1.1\r\nhost: evil.example\r\ncontent-length: 2\r\n\r\n{}", 403),
        (
            b"POST /generate HTTP/1.1\r\nhost: localhost\r\norigin: http://evil.example\r\n"
            b"content-length: 2\r\n\r\n{}",
            403,
        ),
    ],
)
def test_what_no_worker_should_see_is_refused_here(data: bytes, status: int) -> None:
    async def test() -> None:
        worker = FakeWorker()
        async with routing(worker) as routed:
            _, _, address = routed.url.partition("//")
            host, _, port = address.partition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(data)
            reply = await reader.read()
            writer.close()
            assert reply.startswith(b"HTTP/1.1 %d " % status), reply
            assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == status
            assert worker.seen == []
            assert routed.router.budget._held == 0

    run(test)


def test_requests_sent_ahead_are_answered_in_their_order() -> None:
    async def test() -> None:
        async with routing(FakeWorker(), FakeWorker()) as routed:
            _, _, address = routed.url.partition("//")
            host, _, port = address.partition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            for number in range(40):
                body = b'{"text":"%d"}' % number
                head = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
                writer.write(head % len(body) + body)
            for number in range(40):
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                found = json.loads(await reader.readexactly(size))
                assert json.loads(found["body"])["text"] == str(number)
            writer.close()

    run(test)


def test_keys_are_asked_for_and_workers_get_their_own() -> None:
    async def test() -> None:
        worker = FakeWorker()
        options = {"api_key": "k", "admin_api_key": "a", "worker_api_key": "w"}
        async with routing(worker, **options) as routed:
            assert (await post(routed)).status_code == 401
            key = {**JSON, "authorization": "Bearer k"}
            reply = await routed.http.post("/generate", content=BODY, headers=key)
            assert reply.status_code == 200
            assert worker.seen[0].headers["authorization"] == "Bearer w"
            assert (await routed.http.get("/workers", headers=key)).status_code == 401
            admin = {"authorization": "Bearer a"}
            assert (await routed.http.get("/workers", headers=admin)).status_code == 200

    run(test)


def test_metrics_count_replies_and_show_workers() -> None:
    async def test() -> None:
        worker = FakeWorker()
        async with routing(worker) as routed:
            await post(routed)
            text = (await routed.http.get("/metrics")).text
            assert 'slipstream_router_replies_total{status="200"} 1.0' in text
            assert f'slipstream_router_worker_in_rotation{{worker="{worker.url}"}} 1.0' in text

    run(test)


def test_connections_to_workers_end_when_their_machine_was_started_again() -> None:
    async def test() -> None:
        worker = FakeWorker()
        async with routing(worker) as routed:
            await post(routed)
            (known,) = routed.router.fleet
            (connection,) = known._all
            opened = connection._transport.get_extra_info("socket")
            # Without a request on its way nothing else would tell that nobody is there.
            assert opened.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1

    run(test)


@pytest.mark.parametrize("given", [b"mine-1", b"", b"a b"])
def test_a_request_has_one_id_on_its_whole_way(given: bytes) -> None:
    async def test() -> None:
        worker = FakeWorker()
        async with routing(worker) as routed:
            reply = await routed.http.post("/generate", json={}, headers={"x-request-id": given})
            (name,) = reply.headers.get_list("x-request-id")
            assert worker.seen[0].headers["x-request-id"] == name
            assert (name == given.decode()) == (given == b"mine-1")
            health = await routed.http.get("/health", headers={"x-request-id": "h"})
            assert health.headers["x-request-id"] == "h"

    run(test)
