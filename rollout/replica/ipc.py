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
from zmq.sugar.poll import Poller

from engine.errors import EngineDead, InvalidRequest
from engine.protocol import decode, decoder, encode


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

    def __init__(self, receive: Any, kind: SocketType = SocketType.PAIR) -> None:
        self._context = Context()
        self._socket = self._context.socket(kind)
        self._socket.set_hwm(0)
        # An end that is dropped without `close` must not keep its process from leaving.
        self._socket.linger = 0
        self._reader = _Reader(receive)

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

    @classmethod
    def join(cls, endpoint: str, receive: Any, name: str) -> Channel:
        """The end of one of the peers of a `Hub`, which knows it by `name`. A name is used once:
        what the hub still has for an earlier peer of that name would come here."""
        channel = cls(receive, SocketType.DEALER)
        channel._socket.routing_id = name.encode()
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
        if not self._has_frame(timeout_s):
            return []
        data = self._socket.recv(Flag.NOBLOCK)
        try:
            messages: list[Any] = self._reader.strictly(data)
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
        while len(messages) < max_messages and self._has_frame(timeout_s):
            messages += self._reader.read(self._socket.recv(Flag.NOBLOCK))
            timeout_s = 0.0
        return messages

    def _has_frame(self, timeout_s: float) -> bool:
        """Whether a frame is there, or comes in time."""
        # A poller is as long in the making as a frame is in the reading.
        if self._socket.get(SocketOption.EVENTS) & PollEvent.POLLIN:
            return True
        return bool(timeout_s and self._socket.poll(timeout_s * 1000, PollEvent.POLLIN))

    def fileno(self) -> int:
        """A descriptor that turns readable when something may have arrived, for an event loop.
        It says so once: the reader has to call `receive` until nothing comes."""
        return int(self._socket.get(SocketOption.FD))

    def close(self, *, linger_s: float = 0.0) -> None:
        """Close; frames not yet sent get `linger_s` to leave. Idempotent."""
        self._socket.close(linger=int(linger_s * 1000))
        self._context.term()


class Hub:
    """One end for any number of peers, each of which came by `Channel.join`: it has a name, and
    gets what is sent to that name.

    What is sent to a peer that is gone is dropped. A peer that takes nothing has what it is sent
    kept for it, so whoever owns the peers ends one that does not come along.
    """

    def __init__(self, endpoint: str, receive: Any) -> None:
        self._context = Context()
        self._socket = self._context.socket(SocketType.ROUTER)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._reader = _Reader(receive)
        self._socket.bind(endpoint)

    def wait(self, channel: Channel, *, timeout_s: float) -> None:
        """Return once a peer, or the peer of `channel`, has sent something, or in time."""
        poller = Poller()
        poller.register(self._socket, PollEvent.POLLIN)
        poller.register(channel._socket, PollEvent.POLLIN)
        poller.poll(timeout_s * 1000)

    def receive_waiting(self, *, max_messages: int) -> list[tuple[str, list[Any]]]:
        """The frames that wait, in the order of each peer: its name, and its structs as in
        `Channel.receive_waiting`. No further frame is taken once there are so many structs."""
        found: list[tuple[str, list[Any]]] = []
        count = 0
        while count < max_messages and self._socket.poll(0, PollEvent.POLLIN):
            name, data = self._socket.recv_multipart(Flag.NOBLOCK)
            found.append((name.decode(errors="replace"), self._reader.read(data)))
            count += len(found[-1][1])
        return found

    def send(self, name: str, messages: Sequence[msgspec.Struct]) -> None:
        """Send one frame to a peer."""
        self._socket.send_multipart([name.encode(), encode_frame(messages)], Flag.NOBLOCK)

    def close(self, *, linger_s: float = 0.0) -> None:
        """Close; frames not yet sent get `linger_s` to leave. Idempotent."""
        self._socket.close(linger=int(linger_s * 1000))
        self._context.term()


class _Reader:
    """Structs of one type, or of a tagged union, from the bytes of a frame."""

    def __init__(self, kind: Any) -> None:
        self._one = decoder(kind)
        self._all = decoder(list[kind])

    def strictly(self, data: bytes) -> list[Any]:
        """All of them. Raises msgspec.DecodeError."""
        messages: list[Any] = self._all.decode(data)
        return messages

    def read(self, data: bytes) -> list[Any]:
        """All of them, `Unreadable` in place of each that is outside the protocol."""
        try:
            return self.strictly(data)
        except (msgspec.DecodeError, ValueError, TypeError, OverflowError):
            return self._read_each(data)

    def _read_each(self, data: bytes) -> list[Any]:
        try:
            parts = decode(data, list[msgspec.Raw])
        except (msgspec.DecodeError, ValueError) as error:
            return [Unreadable(f"a frame outside the protocol: {error}")]
        messages: list[Any] = []
        for part in parts:
            try:
                messages.append(self._one.decode(bytes(part)))
            except (msgspec.DecodeError, ValueError, TypeError, OverflowError) as error:
                messages.append(_unreadable(bytes(part), str(error)))
        return messages


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
    return _encoded(list(messages))


def encode_parts(messages: Sequence[msgspec.Struct]) -> list[bytes]:
    """The messages one by one, for `frame_of`. Raises what `encode_frame` does."""
    return [_encoded(message) for message in messages]


def frame_of(parts: Sequence[bytes]) -> bytes:
    """One frame that holds what `encode_parts` returned, of several calls in their order."""
    # The head of a list of MessagePack, of up to 2**32 - 1 values.
    return b"".join((b"\xdd" + len(parts).to_bytes(4, "big"), *parts))


def _encoded(value: Any) -> bytes:
    try:
        return encode(value)
    except (OverflowError, TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"a value of the message has no form on the wire: {error}; send integers of at most "
            "64 bits and text that is valid Unicode",
            field="message",
        ) from error
