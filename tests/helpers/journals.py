"""Journaled calls of a server, cut where a test likes, and gone on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from rollout.http.journal import frames
from rollout.http.journal.frames import Head, Resumed, Ticket, resume_body, whole
from tests.helpers.http_app import Server

TICKET = Ticket(11, "ab" * 16, 1_700_000_000)
Frames = Sequence[tuple[bytes, bytes]]


@dataclass
class Found:
    """Frames of a reply, of which `cut` may be the first few only."""

    frames: Frames

    @property
    def head(self) -> Head:
        """Status and headers."""
        (payload,) = self.of(frames.HEAD)
        return msgspec.json.decode(payload, type=Head)

    @property
    def streams(self) -> bool:
        """Whether the reply is a stream of events."""
        return dict(self.head.headers)["content-type"].startswith("text/event-stream")

    @property
    def body(self) -> bytes:
        """The pieces of the body."""
        return b"".join(self.of(frames.PIECE))

    def of(self, kind: bytes) -> list[bytes]:
        """The payloads of a kind."""
        return [payload for known, payload in self.frames if known == kind]

    def cut(self, count: int) -> Found:
        """The first frames."""
        return Found(self.frames[:count])


async def journaled(server: Server, path: str, body: Any) -> Found:
    """The frames of the reply to one body."""
    headers = {frames.HEADER.decode(): msgspec.json.encode(TICKET).decode()}
    return _found(await server.post(path, body, headers=headers))


async def resumed(server: Server, path: str, body: Any, before: Found, num_pieces: int) -> Found:
    """Those of a server that goes on behind `before`, of which the client has so many pieces."""
    data = resume_body(
        Resumed(path, TICKET, num_pieces), before.of(frames.RECORD), json.dumps(body).encode()
    )
    return _found(await server.http.post(frames.RESUME_PATH, content=data))


def _found(reply: httpx.Response) -> Found:
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].encode() == frames.CONTENT_TYPE
    return Found(whole(reply.content))
