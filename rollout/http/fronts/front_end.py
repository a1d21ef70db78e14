"""A front's end of the engine: messages to the leader and back, and how it learns of its death."""

from __future__ import annotations

import asyncio
import contextlib

from engine.errors import EngineDead
from engine.protocol import Call, GetState, Reply, RequestOutput, TokenRows
from rollout.http.engine.client import AsyncEngine
from rollout.http.engine.link import ProcessLink
from rollout.http.fronts.news import NewsReader
from rollout.replica.columns import from_columns
from rollout.replica.fronts.askers import channel_name
from rollout.replica.ipc import Channel

_POST_S = 1.0
_LOOK_S = 0.05
FOREVER_S = float("inf")
"""What a front allows the engine for an answer: its owner judges whether it is alive."""


class FrontEnd:
    """What `ProcessLink` needs of an engine that another process owns. hub: where it is joined.
    name: of this front, used once.

    The engine is gone as soon as the news say so, with the reason that they give.
    """

    def __init__(self, hub: str, name: str, reader: NewsReader) -> None:
        self._hub = hub
        self._reader = reader
        self._channel = Channel.join(hub, RequestOutput | TokenRows | Reply, name)
        self.late = ""

    def post_frame(self, frame: bytes) -> None:
        """As `ProcessReplica.post_frame`."""
        self._check()
        self._channel.send_frame(frame, timeout_s=_POST_S)

    def collect(self) -> list[RequestOutput | Reply]:
        """As `ProcessReplica.collect`."""
        messages = from_columns(self._channel.receive(timeout_s=0.0))
        if not messages:
            self._check()
        return messages

    def fileno(self) -> int:
        """As `ProcessReplica.fileno`."""
        return self._channel.fileno()

    def fail(self, why: str) -> EngineDead:
        """The error that says so; a front ends no engine."""
        return EngineDead(f"the engine {why}", field="leader")

    def close(self) -> None:
        """Leave the engine. Idempotent."""
        self._channel.close()

    def _check(self) -> None:
        news = self._reader.news
        if news.hub != self._hub:
            raise EngineDead(news.dead or "the engine was replaced", field=news.dead_field)


class Follower:
    """Gives a front's `AsyncEngine` the next engine, once its owner has one.

    name: of the front; every engine knows it by another one.
    """

    def __init__(self, reader: NewsReader, name: str) -> None:
        self._reader = reader
        self._name = name
        self._number = 0
        self._end: FrontEnd | None = None
        self._task: asyncio.Task[None] | None = None

    def link(self) -> ProcessLink:
        """A link to the engine that runs now. Raises EngineDead while none does."""
        news = self._reader.news
        if not news.hub:
            raise EngineDead(news.dead or "no engine runs", field=news.dead_field)
        self._number += 1
        name = channel_name(self._name, self._number)
        self._end = FrontEnd(news.hub, name, self._reader)
        return ProcessLink(self._end)

    def follow(self, engine: AsyncEngine) -> None:
        """From now on."""
        engine.on_death(lambda _: self._begin(engine))

    async def close(self) -> None:
        """Follow no longer. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _begin(self, engine: AsyncEngine) -> None:
        self._task = asyncio.ensure_future(self._rejoin(engine))

    async def _rejoin(self, engine: AsyncEngine) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            news = self._reader.news
            if not news.hub:
                engine.explain(news.dead)
                continue
            if self._end is not None:
                self._end.close()
            link = self.link()
            # What a leader says by itself once it is built, it says to its owner.
            link.post([Call(id=0, command=GetState())])
            with contextlib.suppress(EngineDead):
                await engine.restart(link, start_s=FOREVER_S)
                return
            link.stop()
