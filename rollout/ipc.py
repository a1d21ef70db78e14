"""Typed messages between two processes of one host: ZMQ carries MessagePack.

The only file that imports zmq. A frame is a list of protocol structs; every wait has a
deadline, and what a missed one means is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from zmq.constants import Flag, PollEvent, SocketOption, SocketType
from zmq.sugar.context import Context

from engine.errors import EngineDead
from engine.protocol import decode, encode


class Channel:
    """One end of a two-way, ordered channel; made by `listen` or `connect`.

    receive: type of the structs that arrive, a struct or a tagged union of them.
    """

    def __init__(self, receive: Any) -> None:
        self._context = Context()
        self._socket = self._context.socket(SocketType.PAIR)
        self._socket.set_hwm(0)
        # An end that is dropped without `close` must not keep its process from leaving.
        self._socket.linger = 0
        self._receive_type = list[receive]

    @classmethod
    def listen(cls, endpoint: str, receive: Any) -> Channel:
        """The end that makes `endpoint`, such as "ipc:///run/slipstream/leader"."""
        channel = cls(receive)
        channel._socket.bind(endpoint)
        return channel

    @classmethod
    def connect(cls, endpoint: str, receive: Any) -> Channel:
        """The other end; it may connect before the first listens."""
        channel = cls(receive)
        channel._socket.connect(endpoint)
        return channel

    def send(self, messages: Sequence[msgspec.Struct], *, timeout_s: float) -> None:
        """Send one frame. Raises EngineDead if nobody takes it in time."""
        self.send_frame(encode(list(messages)), timeout_s=timeout_s)

    def send_frame(self, frame: bytes, *, timeout_s: float) -> None:
        """`send` of a list that is encoded already, for several peers to get."""
        if not self.can_send(timeout_s=timeout_s):
            raise EngineDead(f"no peer took a message within {timeout_s:g} s", field="channel")
        self._socket.send(frame, Flag.NOBLOCK)

    def can_send(self, *, timeout_s: float) -> bool:
        """Whether a peer takes a frame, or does so in time."""
        return bool(self._socket.poll(timeout_s * 1000, PollEvent.POLLOUT))

    def receive(self, *, timeout_s: float) -> list[Any]:
        """The next frame's structs; empty if none comes in time. Raises EngineDead on bytes
        that are not the protocol."""
        if not self._socket.poll(timeout_s * 1000, PollEvent.POLLIN):
            return []
        data = self._socket.recv(Flag.NOBLOCK)
        try:
            messages: list[Any] = decode(data, self._receive_type)
        except msgspec.DecodeError as error:
            raise EngineDead(f"message outside the protocol: {error}", field="channel") from error
        return messages

    def fileno(self) -> int:
        """A descriptor that turns readable when something may have arrived, for an event loop.
        It says so once: the reader has to call `receive` until nothing comes."""
        return int(self._socket.get(SocketOption.FD))

    def close(self, *, linger_s: float = 0.0) -> None:
        """Close; frames not yet sent get `linger_s` to leave. Idempotent."""
        self._socket.close(linger=int(linger_s * 1000))
        self._context.term()
