"""A load generator that costs little: raw sockets on one event loop, in a process of its own.

`benchmarks/serving.py` starts it and writes one job a line to its standard input, a JSON object;
for each it prints one line, a JSON object of what came of it. Jobs:

{"do": "streams", "port", "bodies": [...]}: one POST /generate each, all at once. Gives the seconds
    from the first connection to the last byte, each caller's seconds to its first frame, the
    output tokens of each, and errors.
{"do": "watch", "port", "seconds", "post": [[path, body, length], ...]}: GET /health every few
    milliseconds while the posts run; gives its latencies, and the statuses of the posts.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any, cast

import uvloop

_END = b"\r\n0\r\n\r\n"
_LIMIT_S = 600.0


class Caller(asyncio.Protocol):
    """One POST whose reply is a stream; keeps the bytes, looks at them only afterwards."""

    def __init__(self, request: bytes, done: asyncio.Future[None]) -> None:
        self.request = request
        self.done = done
        self.sent_at = 0.0
        self.first_at = 0.0
        self.chunks: list[bytes] = []
        self.transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        self.transport = transport
        # uvloop's transports are of no class of asyncio's.
        cast(asyncio.WriteTransport, transport).write(self.request)

    def data_received(self, data: bytes) -> None:
        """Keep what came; the last chunk of the body ends the call."""
        if not self.first_at and b"data: " in data:
            self.first_at = time.perf_counter()
        self.chunks.append(data)
        if data.endswith(_END) or (len(data) < len(_END) and self._tail().endswith(_END)):
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        """The server closed before the end, or after it."""
        self._finish()

    def _tail(self) -> bytes:
        return b"".join(self.chunks[-3:])

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)
            assert self.transport is not None
            self.transport.close()

    def num_tokens(self) -> int:
        """Output tokens that the last frame speaks of; -1 for a reply that is none."""
        text = b"".join(self.chunks).decode(errors="replace")
        frames = [line for line in text.splitlines() if line.startswith('data: {"')]
        if not frames or "[DONE]" not in text:
            return -1
        meta = json.loads(frames[-1][6:]).get("meta_info", {})
        return int(meta.get("completion_tokens", -1))


def post(path: str, body: bytes, length: int | None = None) -> bytes:
    """The bytes of one request; `length` in place of the body's own."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body


async def streams(job: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    loop = asyncio.get_running_loop()
    callers = [
        Caller(post("/generate", json.dumps(body).encode()), loop.create_future())
        for body in job["bodies"]
    ]
    start = time.perf_counter()
    gate = asyncio.Semaphore(1024)

    async def connect(caller: Caller) -> None:
        async with gate:
            caller.sent_at = time.perf_counter()
            await loop.create_connection(lambda: caller, "127.0.0.1", job["port"])

    tasks = [asyncio.ensure_future(connect(caller)) for caller in callers]
    refused = [t for t in await asyncio.gather(*tasks, return_exceptions=True) if t is not None]
    waits = [c.done for c in callers if c.transport is not None]
    await asyncio.wait_for(asyncio.gather(*waits), _LIMIT_S)
    seconds = time.perf_counter() - start
    tokens = [caller.num_tokens() for caller in callers]
    wrong = [
        b"".join(c.chunks)[:200].decode() for c, n in zip(callers, tokens, strict=True) if n < 0
    ]
    return {
        "seconds": seconds,
        "first_s": [caller.first_at - start for caller in callers if caller.first_at],
        "tokens": tokens,
        "errors": len(wrong) + len(refused),
        "example": str((wrong or refused or [""])[0]),
    }


async def _exchange(port: int, request: bytes, head_only: bool = False) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        line = await asyncio.wait_for(reader.readline(), _LIMIT_S)
    finally:
        writer.close()
    return line.decode().strip()


async def _aborts(port: int, count: int) -> str:
    """Streams whose client leaves after the first bytes."""
    body = {"input_ids": [5] * 16, "sampling_params": {"max_new_tokens": 1000, "ignore_eos": True}}
    request = post("/generate", json.dumps({**body, "stream": True}).encode())

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        await reader.read(1)
        writer.close()

    for _ in range(0, count, 100):
        await asyncio.gather(*(one() for _ in range(100)), return_exceptions=True)
    return f"{count} left"


async def watch(job: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    port, stop = job["port"], asyncio.Event()
    latencies: list[float] = []
    # Made before anything is timed: this process is the one that waits for /health, too.
    posts = [
        post(path, text.replace("@", "a" * fill).encode())
        for path, text, fill in job.get("post", [])
    ]

    async def health() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while not stop.is_set():
            start = time.perf_counter()
            writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            latencies.append(time.perf_counter() - start)
            await asyncio.sleep(0.005)
        writer.close()

    watching = asyncio.ensure_future(health())
    await asyncio.sleep(0.3)
    work: list[Any] = []
    if job.get("aborts"):
        work.append(_aborts(port, job["aborts"]))
    work += [_exchange(port, request) for request in posts]
    replies = asyncio.gather(*work, return_exceptions=True)
    _, pending = await asyncio.wait([replies], timeout=job["seconds"])
    await asyncio.sleep(0.3)
    stop.set()
    await asyncio.wait_for(watching, 60)
    found = [] if pending else [str(reply) for reply in replies.result()]
    if pending:
        replies.cancel()
        await asyncio.wait([replies])
        replies.cancelled() or replies.exception()
    return {"latencies_s": latencies, "replies": found}


def main() -> None:
    """Jobs in, results out, until the input ends."""
    jobs = {"streams": streams, "watch": watch}
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(uvloop.run(jobs[job["do"]](job))), flush=True)


if __name__ == "__main__":
    main()
