"""How the server reaches its engine: messages out, messages in, on one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from engine.errors import EngineDead
from engine.protocol import LeaderMessage, Reply, RequestOutput
from rollout.replica.ipc import encode_parts, frame_of

Message = RequestOutput | Reply
Deliver = Callable[[Sequence[Message]], None]
Fail = Callable[[EngineDead], None]

_LOOK_S = 0.25
_HANDLER_TURNS = 3
"""Turns of the event loop that handlers take to send on what was delivered."""
_REST = 2.0
"""Rest after a delivery, in times of what its handling took: under a load of streams the server
keeps to a third of a core, and what comes meanwhile leaves in one piece a stream."""
_MOST_UNSENT = 16
"""Messages that wait for the end of the turn, while the engine could begin with them: so few that
it steps while the requests behind them are read."""
_LEAST_REST_S, _MOST_REST_S = 0.002, 0.01
"""Tokens of a stream wait for those behind them at most so long."""


class EngineLink(Protocol):
    """An ordered, two-way stream to one engine. All calls come from one event loop."""

    def start(self, deliver: Deliver, fail: Fail) -> None:
        """Call `deliver` with what arrives and, once, `fail` when the engine is gone."""
        ...

    def post(self, messages: Sequence[LeaderMessage]) -> None:
        """Queue messages in order, without waiting. Raises InvalidRequest, having queued none,
        if one cannot be encoded, and EngineDead."""
        ...

    @property
    def late(self) -> str:
        """What the engine takes unusually long for, "" if nothing does."""
        ...

    def kill(self, why: str) -> EngineDead:
        """End an engine that missed its deadline; returns the error that says so."""
        ...

    def stop(self) -> None:
        """Deliver nothing more. Idempotent."""
        ...

    def close(self) -> None:
        """After `stop`: tell the engine to leave and wait until it has. Blocks; idempotent, and
        may be called from another thread."""
        ...


class LeaderEnd(Protocol):
    """This process's end of a channel to a leader, which never waits; see `ProcessReplica`."""

    @property
    def late(self) -> str:
        """What the leader takes unusually long for, "" if nothing does."""
        ...

    def post_frame(self, frame: bytes) -> None:
        """Send what `frame_of` made. Raises EngineDead."""
        ...

    def collect(self) -> list[Message]:
        """The next messages that have arrived; empty when nothing is left. Raises EngineDead."""
        ...

    def fileno(self) -> int:
        """A descriptor to watch before `collect`."""
        ...

    def fail(self, why: str) -> EngineDead:
        """Give the leader up, because it `why`; the error that says so."""
        ...

    def close(self) -> None:
        """Let go of it. Idempotent."""
        ...


class ProcessLink:
    """A link to a leader in another process, woken by its socket; a look every `_LOOK_S` notices a
    leader that left without a word.

    What is posted within one turn of the event loop leaves in one frame, at its end, or in frames
    of some 64 messages: a turn may make a thousand requests, and the engine begins with the first.
    A delivery to streams that keeps the handlers busy is followed by a rest (`_REST`), so that
    hundreds of them do not take the processor from the engine that feeds them. A few streams never
    rest, and last outputs alone ask for none: nothing comes behind them to leave in one piece.
    """

    def __init__(self, leader: LeaderEnd) -> None:
        self._leader = leader
        self._timer: asyncio.TimerHandle | None = None
        self._resting = False
        self._unsent: list[bytes] = []
        self._flushes, self._takes = False, True
        self._deliver: Deliver | None = None
        self._fail: Fail | None = None

    def start(self, deliver: Deliver, fail: Fail) -> None:
        """See `EngineLink`."""
        self._deliver, self._fail = deliver, fail
        asyncio.get_running_loop().add_reader(self._leader.fileno(), self._drain)
        self._look()

    def post(self, messages: Sequence[LeaderMessage]) -> None:
        """See `EngineLink`."""
        parts = encode_parts(messages)
        if not self._flushes:
            self._flushes = True
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent += parts
        if len(self._unsent) >= _MOST_UNSENT and self._takes and self._deliver is not None:
            try:
                self._leader.post_frame(frame_of(self._unsent))
                self._unsent = []
            except EngineDead:
                # Left to the end of the turn: nobody is told in the middle of a call.
                self._takes = False

    @property
    def late(self) -> str:
        """See `EngineLink`."""
        return self._leader.late

    def kill(self, why: str) -> EngineDead:
        """See `EngineLink`."""
        return self._leader.fail(why)

    def close(self) -> None:
        """See `EngineLink`."""
        self._leader.close()

    def stop(self) -> None:
        """See `EngineLink`."""
        if self._deliver is None:
            return
        self._deliver = self._fail = None
        asyncio.get_running_loop().remove_reader(self._leader.fileno())
        if self._timer is not None:
            self._timer.cancel()

    def _flush(self) -> None:
        parts, self._unsent = self._unsent, []
        self._flushes, self._takes = False, True
        if self._deliver is None or self._fail is None:
            return
        try:
            if parts:
                self._leader.post_frame(frame_of(parts))
        except EngineDead as error:
            fail = self._fail
            self.stop()
            fail(error)
            return
        # Sending may use up the one notice that the socket gives of something to read.
        self._drain()

    def _look(self) -> None:
        self._drain()
        if self._deliver is not None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def _drain(self) -> None:
        if self._deliver is None or self._fail is None or self._resting:
            return
        loop = asyncio.get_running_loop()
        started, streams = loop.time(), False
        try:
            while self._deliver is not None and (messages := self._leader.collect()):
                self._deliver(messages)
                streams = streams or any(map(_goes_on, messages))
        except EngineDead as error:
            fail = self._fail
            self.stop()
            fail(error)
            return
        if streams:
            self._resting = True
            loop.call_soon(self._handled, started, _HANDLER_TURNS)

    def _handled(self, started: float, turns: int) -> None:
        """Called turn after turn of the loop until the handlers have had theirs."""
        loop = asyncio.get_running_loop()
        if turns:
            loop.call_soon(self._handled, started, turns - 1)
            return
        busy_s = loop.time() - started
        if busy_s < _LEAST_REST_S or self._deliver is None:
            self._rested()
            return
        # The socket stays readable; a loop that goes on asking it does not rest.
        loop.remove_reader(self._leader.fileno())
        loop.call_later(min(_REST * busy_s, _MOST_REST_S), self._watch_again)

    def _watch_again(self) -> None:
        if self._deliver is not None:
            asyncio.get_running_loop().add_reader(self._leader.fileno(), self._drain)
        self._rested()

    def _rested(self) -> None:
        self._resting = False
        self._drain()


def _goes_on(message: Message) -> bool:
    return isinstance(message, RequestOutput) and message.finish is None
