"""The body of a journaled reply: frames of a kind, a length and a payload.

TICKET: name of the ticket that it answers. HEAD: status and headers of the reply, as JSON.
RECORD: what was sampled (`records`). VERSION: label of the weights that sampled what follows.
PIECE: a piece of the reply's body. END: the reply is whole. LOST: it never will be here; ask
another server. A body without one of the last two was cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

HEADER = b"x-slipstream-journal"
"""A request with this header gets a journaled reply. Its value is a `Ticket`."""
CONTENT_TYPE = b"application/vnd.slipstream.journal"
RESUME_PATH = "/internal/resume"

HEAD, RECORD, VERSION, PIECE, END, LOST, TICKET = b"H", b"J", b"V", b"B", b"E", b"L", b"T"
_KINDS = frozenset({HEAD, RECORD, VERSION, PIECE, END, LOST, TICKET})
_NUM_PREFIX = 5
_MOST_BYTES = 1 << 31


class BadFrames(ValueError):
    """Bytes that are no frames."""


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """What makes a call the same wherever it runs. seed: base of the seeds of its samples, where it
    brings none. name: what its ids are made of. created: seconds since 1970, as replies show it."""

    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    name: Annotated[str, Meta(pattern=r"^[0-9A-Za-z_-]{1,128}\Z")]
    created: Annotated[int, Meta(ge=0, lt=1 << 53)]


class Resumed(msgspec.Struct, frozen=True, array_like=True):
    """What is to go on. path: of the route. num_pieces: of the body, that its client has."""

    path: str
    ticket: Ticket
    num_pieces: Annotated[int, Meta(ge=0)]


class Head(msgspec.Struct, frozen=True, array_like=True):
    """Status and headers of a reply."""

    status: int
    headers: list[tuple[str, str]]

    def pairs(self) -> list[tuple[bytes, bytes]]:
        """The headers as bytes."""
        return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self.headers]


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    """One frame."""
    return kind + len(payload).to_bytes(4, "big") + payload


class FrameReader:
    """Takes bytes as they come; gives whole frames."""

    def __init__(self) -> None:
        self._rest = b""
        self._parts: list[bytes] = []
        self._num_rest = 0
        self._wanted = _NUM_PREFIX

    @property
    def has_rest(self) -> bool:
        """Whether part of a frame has come."""
        return bool(self._rest)

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """The frames that `data` completes, as kind and payload. Raises BadFrames."""
        if self._rest:
            # A long frame comes in many parts, which are joined once.
            self._parts.append(data)
            self._num_rest += len(data)
            if self._num_rest < self._wanted:
                return []
            data = b"".join([self._rest, *self._parts])
            self._parts.clear()
        found, at, end, wanted = [], 0, len(data), _NUM_PREFIX
        while end - at >= _NUM_PREFIX:
            kind = data[at : at + 1]
            size = int.from_bytes(data[at + 1 : at + _NUM_PREFIX], "big")
            if kind not in _KINDS or size > _MOST_BYTES:
                raise BadFrames(f"{data[at : at + _NUM_PREFIX]!r} begins no frame")
            if end - at < _NUM_PREFIX + size:
                wanted = _NUM_PREFIX + size
                break
            at += _NUM_PREFIX
            found.append((kind, data[at : at + size]))
            at += size
        self._rest = data[at:]
        self._wanted, self._num_rest = wanted, len(self._rest)
        return found


def whole(data: bytes) -> list[tuple[bytes, bytes]]:
    """The frames of a body that is complete. Raises BadFrames if it is cut."""
    reader = FrameReader()
    found = reader.feed(data)
    if reader.has_rest:
        raise BadFrames("the last frame is cut")
    return found


def resume_body(resumed: Resumed, records: Iterable[bytes], body: bytes) -> bytes:
    """The body of a request to go on: what was sampled, and the request as its client sent it."""
    parts = [frame(TICKET, msgspec.json.encode(resumed))]
    parts += [frame(RECORD, record) for record in records]
    parts.append(frame(PIECE, body))
    return b"".join(parts)
