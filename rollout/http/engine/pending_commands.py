"""Commands that were sent and not yet answered, and which of them are late.

`AsyncEngine` adds a command when it is sent, takes it out by the id of its reply, and asks once a
second which are late.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from engine.errors import SlipstreamError
from engine.protocol import Command, EngineCommand, Reply


@dataclass(kw_only=True)
class AwaitedReply:
    """A command whose reply has not come.

    since: when its time began: when it was sent or, if others were ahead of it, when the last of
    those was answered. limit_s: how long the reply may take from then on.
    """

    command: Command
    future: asyncio.Future[Reply]
    since: float
    limit_s: float

    def fail(self, error: SlipstreamError) -> None:
        """Give whoever waits a copy of `error` in place of the reply."""
        if not self.future.done():
            self.future.set_exception(error.copy())


class AwaitedReplies:
    """The unanswered commands of one engine by id, in the order of sending. Ids grow.

    A leader answers in order, but for commands that it runs beside its steps: those are
    overtaken by later ones. Times are of `time.monotonic`, given by the caller.
    """

    def __init__(self) -> None:
        self._entries: dict[int, AwaitedReply] = {}
        self._lowest_answered: int | None = None
        self._highest_answered = -1

    def __len__(self) -> int:
        return len(self._entries)

    def add(
        self, call_id: int, command: Command, now: float, limit_s: float
    ) -> asyncio.Future[Reply]:
        """A command was sent as `Call.id`; what becomes its reply."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        # A failure nobody waits for is told to everyone else by the engine's `dead`.
        future.add_done_callback(_look_at)
        entry = AwaitedReply(command=command, future=future, since=now, limit_s=limit_s)
        self._entries[call_id] = entry
        return future

    def last_of(self, kind: type[Command]) -> asyncio.Future[Reply] | None:
        """What becomes the reply to the last command of a kind that is under way."""
        found = (e.future for e in reversed(self._entries.values()) if isinstance(e.command, kind))
        return next(found, None)

    def answered(self, call_id: int) -> AwaitedReply | None:
        """Take out the command that a reply belongs to; None for an id that nobody waits for."""
        entry = self._entries.pop(call_id, None)
        if entry is not None:
            lowest = self._lowest_answered
            self._lowest_answered = call_id if lowest is None else min(lowest, call_id)
            self._highest_answered = max(self._highest_answered, call_id)
        return entry

    def take_late(self, now: float) -> list[AwaitedReply]:
        """Take out the commands whose own time is up.

        The time of a command begins anew while one that was sent before it is answered, or runs
        within its own deadline where the leader can do nothing else: so no command is late
        because of those ahead of it.
        """
        lowest, self._lowest_answered = self._lowest_answered, None
        late: dict[int, AwaitedReply] = {}
        waits = False
        for call_id, entry in self._entries.items():
            if waits or (lowest is not None and lowest < call_id):
                entry.since = now
            elif now - entry.since > entry.limit_s:
                late[call_id] = entry
                continue
            overtaken = call_id < self._highest_answered
            waits = waits or (isinstance(entry.command, EngineCommand) and not overtaken)
        for call_id in late:
            del self._entries[call_id]
        return list(late.values())

    def fail(self, error: SlipstreamError) -> None:
        """Give every command a copy of `error` in place of its reply, and forget them."""
        for entry in self._entries.values():
            entry.fail(error)
        self._entries.clear()
        self._lowest_answered = None


def _look_at(future: asyncio.Future[Reply]) -> None:
    if not future.cancelled():
        future.exception()
