"""Typed messages between two processes of one host: ZMQ carries MessagePack.

The only file that imports zmq. A frame is a list of protocol structs; every wait has a
deadline, and what a missed one means is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from zmq.constants import Flag, PollEvent, SocketOption, SocketType
from zmq.error import Again
from zmq.sugar.context import Context

from engine.errors import EngineDead, InvalidRequest
from engine.protocol import decode, encode


@dataclass(frozen=True)
class Unreadable:
    """A message outside the protocol. call, rid: whom it names, where that can be read."""

    why: str
    call: int | None = None
    rid: str = ""


class _Named(msgspec.Struct):
    """As much of a message as an answer to it needs."""

    id: Any = None
    rid: Any = None


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
        self._kind = receive
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
        """Send one frame. Raises InvalidRequest, having sent nothing, if a message cannot be
        encoded; EngineDead if nobody takes it in time."""
        self.send_frame(encode_frame(messages), timeout_s=timeout_s)

    def send_frame(self, frame: bytes, *, timeout_s: float) -> None:
        """`send` of what `encode_frame` returned, such as for several peers to get. Raises
        EngineDead if nobody takes it in time."""
        if not self.sent_at_once(frame):
            if not self.can_send(timeout_s=timeout_s):
                raise EngineDead(f"no peer took a message within {timeout_s:g} s", field="channel")
            self._socket.send(frame, Flag.NOBLOCK)

    def sent_at_once(self, frame: bytes) -> bool:
        """Send a frame if a peer takes it without a wait; whether one did."""
        try:
            self._socket.send(frame, Flag.NOBLOCK)
        except Again:
            return False
        return True

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

    def receive_waiting(self, *, timeout_s: float, max_messages: int) -> list[Any]:
        """The structs of every frame that waits, in order, and `Unreadable` in place of each
        that is outside the protocol; empty if none comes in time.

        max_messages: no further frame is taken once there are as many, so that a flood of
        messages cannot keep its reader for ever.
        """
        messages: list[Any] = []
        while len(messages) < max_messages and self._socket.poll(
            timeout_s * 1000, PollEvent.POLLIN
        ):
            messages += self._read(self._socket.recv(Flag.NOBLOCK))
            timeout_s = 0.0
        return messages

    def _read(self, data: bytes) -> list[Any]:
        try:
            messages: list[Any] = decode(data, self._receive_type)
        except (msgspec.DecodeError, ValueError, TypeError, OverflowError):
            return self._read_each(data)
        return messages

    def _read_each(self, data: bytes) -> list[Any]:
        """The messages of a frame some of which are outside the protocol."""
        try:
            parts = decode(data, list[msgspec.Raw])
        except (msgspec.DecodeError, ValueError) as error:
            return [Unreadable(f"a frame outside the protocol: {error}")]
        messages: list[Any] = []
        for part in parts:
            try:
                messages.append(decode(bytes(part), self._kind))
            except (msgspec.DecodeError, ValueError, TypeError, OverflowError) as error:
                messages.append(_unreadable(bytes(part), str(error)))
        return messages

    def fileno(self) -> int:
        """A descriptor that turns readable when something may have arrived, for an event loop.
        It says so once: the reader has to call `receive` until nothing comes."""
        return int(self._socket.get(SocketOption.FD))

    def close(self, *, linger_s: float = 0.0) -> None:
        """Close; frames not yet sent get `linger_s` to leave. Idempotent."""
        self._socket.close(linger=int(linger_s * 1000))
        self._context.term()


def _unreadable(data: bytes, error: str) -> Unreadable:
    why = f"a message outside the protocol: {error}"
    try:
        named = msgspec.msgpack.decode(data, type=_Named)
    except (msgspec.DecodeError, ValueError):
        return Unreadable(why)
    call = named.id if isinstance(named.id, int) else None
    return Unreadable(why, call, named.rid if isinstance(named.rid, str) else "")


def encode_frame(messages: Sequence[msgspec.Struct]) -> bytes:
    """One frame that holds the messages. Raises InvalidRequest if one of them holds a value that
    MessagePack has no form for, such as an integer of 65 bits or half a surrogate pair."""
    try:
        return encode(list(messages))
    except (OverflowError, TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"a value of the message has no form on the wire: {error}; send integers of at most "
            "64 bits and text that is valid Unicode",
            field="message",
        ) from error
