"""Commands that were sent and not yet answered, and which of them are late.

`client` adds a command when it is sent, takes it out by the id of its reply, and asks once
a second which are late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from engine.errors import SlipstreamError
from engine.protocol import Control, EngineCommand, Reply


@dataclass(kw_only=True)
class PendingCommand:
    """A command whose reply has not come.

    since: when its time began: when it was sent or, if others were ahead of it, when the last of
    those was answered. limit_s: how long the reply may take from then on.
    """

    command: Control
    future: asyncio.Future[Reply]
    since: float
    limit_s: float


class PendingCommands:
    """The unanswered commands of one engine by id, in the order of sending. Ids grow.

    A leader answers in order, but for commands that it runs beside its steps: those are
    overtaken by later ones. Times are of `time.monotonic`, given by the caller.
    """

    def __init__(self) -> None:
        self._entries: dict[int, PendingCommand] = {}
        self._lowest_answered: int | None = None
        self._highest_answered = -1

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[PendingCommand]:
        return iter(self._entries.values())

    def add(self, call_id: int, entry: PendingCommand) -> None:
        """A command was sent as `Call.id`."""
        self._entries[call_id] = entry

    def answered(self, call_id: int) -> PendingCommand | None:
        """Take out the command that a reply belongs to; None for an id that nobody waits for."""
        entry = self._entries.pop(call_id, None)
        if entry is not None:
            lowest = self._lowest_answered
            self._lowest_answered = call_id if lowest is None else min(lowest, call_id)
            self._highest_answered = max(self._highest_answered, call_id)
        return entry

    def take_late(self, now: float) -> list[PendingCommand]:
        """Take out the commands whose own time is up.

        The time of a command begins anew while one that was sent before it is answered, or runs
        within its own deadline where the leader can do nothing else: so no command is late
        because of those ahead of it.
        """
        lowest, self._lowest_answered = self._lowest_answered, None
        late: dict[int, PendingCommand] = {}
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
            if not entry.future.done():
                entry.future.set_exception(type(error)(error.message, field=error.field))
        self._entries.clear()
        self._lowest_answered = None
