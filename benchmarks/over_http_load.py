"""The clients of `benchmarks/over_http.py`: raw sockets on one event loop, in a process of its own.

One job a line on standard input, a JSON object; one line with what came of it on standard output:

{"do": "closed", "port", "path", "body", "connections", "count"}: each connection sends the body
    again as soon as it has the reply, until there were `count` replies together. Gives the
    seconds, and the seconds that replies took.
{"do": "at_once", "port", "bodies"}: one POST /generate each, all at once. Gives the seconds from
    the first to the last byte, processor time of the client meanwhile, the output tokens of the
    replies, and seconds to each first byte of a body.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import uvloop

_LIMIT_S = 550.0
_END = b"\r\n0\r\n\r\n"


def post(path: str, body: bytes) -> bytes:
    """The bytes of one request."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Replies(asyncio.Protocol):
    """One connection; calls `replied` with every whole reply, which keeps its bytes."""

    def __init__(self, replied: Callable[[Replies, bytes], None]) -> None:
        self._replied = replied
        self._parts: list[bytes] = []
        self._size = 0
        self._wanted = -1
        self._chunked = False
        self._tail = b""
        self.sent_at = 0.0
        self.first_at = 0.0
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def send(self, request: bytes) -> None:
        """Send the next request."""
        assert self._transport is not None
        self.sent_at, self.first_at = time.perf_counter(), 0.0
        self._transport.write(request)

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        self._size += len(data)
        if self._wanted < 0 and not self._chunked:
            self._read_head()
        if not self.first_at and (self._chunked or self._wanted >= 0):
            head = self._parts[0].find(b"\r\n\r\n")
            if self._size > head + 4:
                self.first_at = time.perf_counter()
        whole = self._size >= self._wanted >= 0
        self._tail = (self._tail + data)[-len(_END) :] if len(data) < len(_END) else data
        if self._chunked:
            whole = self._tail.endswith(_END)
        if whole:
            reply, self._parts = b"".join(self._parts), []
            self._size, self._wanted, self._chunked, self._tail = 0, -1, False, b""
            self._replied(self, reply)

    def _read_head(self) -> None:
        if len(self._parts) > 1:
            self._parts = [b"".join(self._parts)]
        head, found, _ = self._parts[0].partition(b"\r\n\r\n")
        if not found:
            return
        lower = head.lower()
        self._chunked = b"transfer-encoding: chunked" in lower
        if not self._chunked:
            length = lower.partition(b"content-length:")[2].partition(b"\r\n")[0]
            self._wanted = len(head) + 4 + int(length or 0)


async def closed(job: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    request = post(job["path"], job["body"].encode())
    count, latencies, statuses = job["count"], [], set()
    left = count
    done = asyncio.get_running_loop().create_future()

    def replied(connection: Replies, reply: bytes) -> None:
        nonlocal left
        latencies.append(time.perf_counter() - connection.sent_at)
        statuses.add(reply[9:12].decode())
        if len(latencies) == count:
            done.set_result(None)
        elif left > 0:
            left -= 1
            connection.send(request)

    connections = await _connect(job["port"], job["connections"], replied)
    start = time.perf_counter()
    for connection in connections:
        left -= 1
        connection.send(request)
    await asyncio.wait_for(done, _LIMIT_S)
    seconds = time.perf_counter() - start
    for connection in connections:
        connection.close()
    latencies.sort()
    return {
        "seconds": seconds,
        "statuses": sorted(statuses),
        "p50_s": latencies[count // 2],
        "p99_s": latencies[count * 99 // 100],
    }


async def at_once(job: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    requests = [post("/generate", json.dumps(body).encode()) for body in job["bodies"]]
    replies: list[bytes] = []
    first_s: list[float] = []
    done = asyncio.get_running_loop().create_future()

    def replied(connection: Replies, reply: bytes) -> None:
        replies.append(reply)
        first_s.append(connection.first_at - connection.sent_at)
        if len(replies) == len(requests):
            done.set_result(None)

    connections = await _connect(job["port"], len(requests), replied)
    start, busy_s = time.perf_counter(), time.process_time()
    for connection, request in zip(connections, requests, strict=True):
        connection.send(request)
    await asyncio.wait_for(done, _LIMIT_S)
    seconds, busy_s = time.perf_counter() - start, time.process_time() - busy_s
    for connection in connections:
        connection.close()
    tokens = [num_tokens(reply) for reply in replies]
    return {
        "seconds": seconds,
        "tokens": sum(tokens),
        "client_s": busy_s,
        "bytes": sum(map(len, replies)),
        "frames": sum(reply.count(b"data: {") for reply in replies),
        "first_s": first_s,
    }


def num_tokens(reply: bytes) -> int:
    """Output tokens that a reply to /generate brought, of which each has its logprob. A stream
    brings increments."""
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), reply[:500]
    if b"chunked" not in head.lower():
        found = json.loads(body)
        return sum(map(_num_tokens, found if isinstance(found, list) else [found]))
    lines = _without_chunks(body).split(b"\n\n")
    assert lines[-2] == b"data: [DONE]", lines[-2:]
    return sum(_num_tokens(json.loads(line[6:])) for line in lines[:-2])


def _num_tokens(reply: dict[str, Any]) -> int:
    count = len(reply["output_ids"])
    scores = reply["meta_info"].get("output_token_logprobs")
    assert scores is None or len(scores) == count
    return count


def _without_chunks(body: bytes) -> bytes:
    found, at = [], 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end], 16)
        if size == 0:
            return b"".join(found)
        found.append(body[end + 2 : end + 2 + size])
        at = end + 4 + size


async def _connect(
    port: int, count: int, replied: Callable[[Replies, bytes], None]
) -> list[Replies]:
    loop = asyncio.get_running_loop()
    found = []
    for _ in range(count):
        connected = await loop.create_connection(lambda: Replies(replied), "127.0.0.1", port)
        found.append(connected[1])
    return found


def main() -> None:
    """Jobs in, results out, until the input ends."""
    jobs = {"closed": closed, "at_once": at_once}
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(uvloop.run(jobs[job["do"]](job))), flush=True)


if __name__ == "__main__":
    main()
