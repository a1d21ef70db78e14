"""The frames of one journaled reply (`rollout.http.journal.frames`), in an order that can be."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from rollout.http.journal import frames
from rollout.http.journal.frames import BadFrames, FrameReader, Head

_NOT_IN_A_HEADER = ("\r", "\n", "\0")


class FramedReply:
    """Reads the reply to the ticket `name`. ended: it is whole."""

    def __init__(self, name: str) -> None:
        self._reader = FrameReader()
        self._name = name.encode()
        self._has_head = False
        self.ended = False

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes | Head]]:
        """What `data` completes: heads as such, records, versions and pieces as their bytes. Raises
        BadFrames for what is out of order, of another request, or given up."""
        for kind, payload in self._reader.feed(data):
            if self.ended:
                raise BadFrames("more came behind the end")
            if kind == frames.HEAD:
                yield kind, self._head(payload)
            elif kind in (frames.PIECE, frames.END) and not self._has_head:
                raise BadFrames("a reply without a head")
            elif kind == frames.END:
                self.ended = True
            elif kind == frames.TICKET:
                self._check_name(payload)
            elif kind == frames.LOST:
                raise BadFrames(f"gave it up: {payload.decode(errors='replace')}")
            else:
                yield kind, payload

    def _check_name(self, name: bytes) -> None:
        if name != self._name:
            raise BadFrames(f"answered another request, {name[:64].decode(errors='replace')!r}")

    def _head(self, payload: bytes) -> Head:
        if self._has_head:
            raise BadFrames("a reply with two heads")
        try:
            head = msgspec.json.decode(payload, type=Head)
            head.pairs()
        except (msgspec.DecodeError, UnicodeError) as error:
            raise BadFrames(f"a head that cannot be read: {error}") from error
        texts = [text for pair in head.headers for text in pair]
        if not 200 <= head.status <= 599 or any(
            mark in text for text in texts for mark in _NOT_IN_A_HEADER
        ):
            raise BadFrames(f"a head that no reply has, of status {head.status}")
        self._has_head = True
        return head
