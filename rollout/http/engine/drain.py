"""The end of a server that is told to leave: nothing new, and time for what runs."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Protocol

from engine.errors import EngineDead, SlipstreamError
from engine.protocol import ReplicaState

logger = logging.getLogger(__name__)

_LOOK_S = 0.05
_PAUSED_S = 5.0
"""A trainer that pauses for an update has begun it by then, or goes on."""


class Draining(SlipstreamError):
    """The server is told to leave, and takes no new requests; another one may."""

    status = 503


class Engine(Protocol):
    """What has open requests; an `AsyncEngine`."""

    @property
    def num_open(self) -> int:
        """Sequences whose final output has not come."""
        ...

    async def state(self) -> ReplicaState:
        """Of the engine, at most a moment old. Raises EngineDead."""
        ...


class Drain:
    """Whether requests are refused because the server leaves."""

    def __init__(self) -> None:
        self._ends_at: float | None = None

    @property
    def began(self) -> bool:
        """Whether new requests are refused."""
        return self._ends_at is not None

    def check(self) -> None:
        """Raise Draining for a new request, with the seconds until this server is gone."""
        if self._ends_at is None:
            return
        error = Draining(
            "the server is shutting down and takes no new requests; send it to another, or again "
            "once it is back",
            field="server",
        )
        error.retry_after_s = max(1, math.ceil(self._ends_at - time.monotonic()))
        raise error

    async def run(self, engine: Engine, limit_s: float) -> None:
        """Refuse new requests and wait until those that are open have ended, `limit_s` at most, of
        every process that the engine has some of: one that left sooner would leave its clients
        without an answer. Those of an engine that stays paused, `_PAUSED_S` long without an update
        to come of it, cannot end, and are not waited for."""
        self._ends_at = time.monotonic() + limit_s
        if engine.num_open:
            logger.info("draining: %d requests have %g s to finish", engine.num_open, limit_s)
        went_at = time.monotonic()
        try:
            while (now := time.monotonic()) < self._ends_at:
                state = await engine.state()
                if not (engine.num_open or state.num_running or state.num_waiting):
                    return
                if not state.paused or state.open_update is not None:
                    went_at = now
                elif now - went_at > _PAUSED_S:
                    return
                await asyncio.sleep(_LOOK_S)
        except EngineDead:
            return
