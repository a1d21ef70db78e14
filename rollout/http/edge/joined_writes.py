"""The head of a reply and what follows it, sent as one piece.

A server writes the two one after the other, and a transport that sends each at once makes two calls
of the system of them, and wakes the client twice.
"""

from __future__ import annotations

import asyncio

_HEAD = b"HTTP/1.1 "
_MOST_JOINED = 64 << 10
"""Bytes from which on a copy costs more than a call."""


class JoinedWrites:
    """The transport that the replies of one connection are written to. A head waits for the next
    write, at most to the end of the event loop's turn: nobody waits for the head of a stream."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""

    def write(self, data: bytes) -> None:
        """As `asyncio.WriteTransport.write`."""
        head, self._head = self._head, b""
        if head and len(data) <= _MOST_JOINED:
            self._transport.write(head + data)
            return
        if head:
            self._transport.write(head)
        if data.startswith(_HEAD):
            self._head = data
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def close(self) -> None:
        """As `asyncio.BaseTransport.close`; what was written leaves before."""
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """As `asyncio.BaseTransport.is_closing`."""
        return self._transport.is_closing()

    def _flush(self) -> None:
        head, self._head = self._head, b""
        if head and not self._transport.is_closing():
            self._transport.write(head)
