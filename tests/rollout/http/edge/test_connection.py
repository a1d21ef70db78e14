"""Connections of the server: what arrives too slowly, without an end, or two at once."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from rollout.http.edge.connection import PatientProtocol

HEAD = b" HTTP/1.1\r\nHost: local\r\n"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers /read when the body is there, everything else at once."""
    if scope["path"] == "/read":
        while (await receive()).get("more_body"):
            pass
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


async def exchange(parts: Iterable[bytes], receive_s: float) -> list[bytes]:
    """Statuses of all replies on one connection, to the end that the server puts to it."""
    config = uvicorn.Config(echo, log_config=None, lifespan="off", timeout_keep_alive=60)
    config.load()
    state = ServerState()
    make = partial(PatientProtocol, config, state, {}, receive_s=receive_s)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(make, "127.0.0.1", 0)
    async with server, asyncio.timeout(60):
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def write() -> None:
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.001)

        writing = asyncio.create_task(write())
        received = b""
        try:
            while data := await reader.read(65536):
                received += data
        except ConnectionResetError:
            pass  # Closed with something unread: what it said before has been read.
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        writer.close()
    return re.findall(rb"HTTP/1.1 (\d+) ", received)


@pytest.mark.parametrize(
    ("parts", "statuses"),
    [
        ([], []),
        ([b"POST /gen"], [b"408"]),
        ([b"POST /at-once" + HEAD + b"Content-Length: 50\r\n\r\n{"], [b"200"]),
        ([b"GET /a" + HEAD + b"\r\nGET /b" + HEAD + b"\r\n", b"GET /c"], [b"200", b"200", b"408"]),
        ([b"GET /a" + HEAD + b"\r\nGET /b HT"], [b"200", b"408"]),
    ],
    ids=["nothing", "half of the headers", "half of a body", "a third", "half of a second"],
)
def test_what_does_not_arrive_in_time_ends_the_connection(
    parts: list[bytes], statuses: list[bytes]
) -> None:
    assert asyncio.run(exchange(parts, 0.2)) == statuses


def test_headers_without_an_end_are_refused() -> None:
    endless = [b"GET /a" + HEAD, *(b"x-%d: " % i + b"v" * 1000 + b"\r\n" for i in range(10_000))]
    assert asyncio.run(exchange(endless, 60)) == [b"431"]
    one = [b"GET /a" + HEAD + b"x: ", *(b"v" * 10_000 for _ in range(10_000))]
    assert asyncio.run(exchange(one, 60)) == [b"431"]


def test_what_follows_a_chunked_body_has_an_end() -> None:
    begun = b"POST /read" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n"
    lines = [b"x-%d: " % i + b"v" * 1000 + b"\r\n" for i in range(10_000)]
    assert asyncio.run(exchange([begun, *lines], 60)) == []
    short = [begun + b"x: y\r\n\r\n", b"GET /b" + HEAD + b"Connection: close\r\n\r\n"]
    assert asyncio.run(exchange(short, 60)) == [b"200", b"200"]


def test_a_long_body_is_no_header() -> None:
    body = [b"v" * 10_000 for _ in range(100)]
    head = b"POST /read" + HEAD + b"Connection: close\r\nContent-Length: 1000000\r\n\r\n"
    assert asyncio.run(exchange([head, *body], 60)) == [b"200"]
