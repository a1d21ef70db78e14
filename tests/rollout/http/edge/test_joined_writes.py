"""What a client gets of a reply, and in how many pieces."""

from __future__ import annotations

import asyncio
from typing import Any

from rollout.http.edge.joined_writes import JoinedWrites

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


class Pieces:
    """A transport that notes what is written to it."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.sent.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


def joined(pieces: Pieces) -> JoinedWrites:
    transport: Any = pieces
    return JoinedWrites(transport, asyncio.get_running_loop())


def test_a_short_reply_is_one_piece_and_the_next_another() -> None:
    async def test() -> None:
        pieces = Pieces()
        writes = joined(pieces)
        for body in (b"one", b"two"):
            writes.write(HEAD)
            writes.write(body)
        await asyncio.sleep(0)
        assert pieces.sent == [HEAD + b"one", HEAD + b"two"]

    asyncio.run(test())


def test_nobody_waits_for_the_head_of_a_stream() -> None:
    async def test() -> None:
        pieces = Pieces()
        writes = joined(pieces)
        writes.write(HEAD)
        assert pieces.sent == []
        await asyncio.sleep(0)
        assert pieces.sent == [HEAD]
        writes.write(b"frame")
        assert pieces.sent == [HEAD, b"frame"]

    asyncio.run(test())


def test_a_long_body_is_not_copied_and_a_close_leaves_nothing_behind() -> None:
    async def test() -> None:
        pieces, body = Pieces(), b"x" * (1 << 20)
        writes = joined(pieces)
        writes.write(HEAD)
        writes.write(body)
        assert pieces.sent[0] == HEAD and pieces.sent[1] is body
        writes.write(HEAD)
        writes.close()
        assert pieces.sent[2:] == [HEAD] and writes.is_closing()
        await asyncio.sleep(0)

    asyncio.run(test())
