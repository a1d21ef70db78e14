"""The tensors that the engine is receiving for callers of this server, and callers that left."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from engine.errors import UpdateOrder
from engine.protocol import Reply
from rollout.http.engine.client import AsyncEngine
from rollout.http.updates.tracked_update import Feed, UpdateCommand

_PATIENCE_S = 2.0
"""For how long whatever cannot run beside tensors that are being received waits for their end."""


class Transfers:
    """Runs the commands of an update that may wait for a sender, and knows which do."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._running: dict[int, asyncio.Future[None]] = {}
        self._abandoned: list[Feed] = []

    async def quiet(self, what: str) -> None:
        """Wait until no tensors are being received, which may take as long as whoever sends
        them likes: raises UpdateOrder after `_PATIENCE_S`. what: is asked for, for the message."""
        if self._running:
            await asyncio.wait(list(self._running.values()), timeout=_PATIENCE_S)
        if self._running:
            raise UpdateOrder(
                f"{what} waits for tensors that are being received, which have not come within "
                f"{_PATIENCE_S:g} s; try again later, or abort the update",
                field="receiving",
            )

    async def run(self, command: UpdateCommand, *, owner: str | None = None) -> Reply:
        """Run a command. owner: of the update that this server opened for its caller; None leaves
        what the caller wrote."""
        sent = command if owner is None else replace(command, owner=owner)
        if not isinstance(command, Feed):
            return await self._engine.send(sent)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running[id(command)] = ended
        try:
            return await self._engine.send(sent)
        finally:
            del self._running[id(command)]
            ended.set_result(None)

    def abandon(self, command: Feed) -> bool:
        """The caller of `command` has left. Whether its turn has not come, so that it is refused
        when it does; else it is for the caller of this to end it."""
        waits = id(command) not in self._running
        if waits:
            self._abandoned.append(command)
        return waits

    def refuse_abandoned(self, command: UpdateCommand) -> None:
        """Raise UpdateOrder for a command whose caller left before its turn came."""
        kept = [other for other in self._abandoned if other is not command]
        left, self._abandoned = len(kept) < len(self._abandoned), kept
        if left:
            raise UpdateOrder("the caller left before its turn came", field="receiving")
