"""uvicorn as this server uses it, in the process that owns the engine and in its fronts."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from rollout.http.config import ServeConfig
from rollout.http.edge.connection import PatientProtocol
from rollout.http.engine.client import AsyncEngine
from rollout.replica.leave import leave_at_once

BACKLOG = 4096
GRACE_S = 3
PATIENCE_S = 4.0
"""For the engine to end what is open, once the server is told to stop."""


class PatientServer(uvicorn.Server):
    """uvicorn's server, which answers everybody before it leaves.

    drain_s: how long open requests have to finish after SIGTERM, `rollout.http.engine.drain`; any
    other end leaves them none. end_now: called on a second signal, before this process ends at
    once. others: is called with how long requests have, and waited for, once the server is told to
    stop. signals: those that came.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        engine: AsyncEngine,
        *,
        drain_s: float = 0.0,
        end_now: Callable[[], None] = lambda: None,
        others: Callable[[float], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_s = drain_s
        self._end_now = end_now
        self._others = others
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self.signals: list[int] = []

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT, in place of uvicorn's own handling."""
        self.signals.append(sig)
        if len(self.signals) > 1:
            self._end_now()
            leave_at_once(128 + sig)
        drain_s = self._drain_s if sig == signal.SIGTERM else 0.0
        self._loop.call_soon_threadsafe(self.begin_to_leave, drain_s)

    def begin_to_leave(self, drain_s: float = 0.0) -> None:
        """Answer what is open, then end `serve`. Idempotent."""
        if self._task is None:
            self._task = asyncio.create_task(self._leave(drain_s))

    async def _leave(self, drain_s: float) -> None:
        others = [] if self._others is None else [self._others(drain_s)]
        await asyncio.gather(self._end(drain_s), *others)
        self.should_exit = True

    async def _end(self, drain_s: float) -> None:
        if drain_s:
            await self._engine.drain.run(self._engine, drain_s)
        await self._engine.leave(PATIENCE_S)


def uvicorn_config(config: ServeConfig, app: ASGIApp, **more: Any) -> uvicorn.Config:
    """The configuration of a server of `app`; `more` goes to uvicorn's."""
    protocol: Any = partial(PatientProtocol, receive_s=config.receive_timeout_s)
    return uvicorn.Config(
        app,
        http=protocol,
        log_config=None,
        access_log=False,
        # `app.build_app` looks at them, where they matter.
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=GRACE_S,
        **more,
    )
