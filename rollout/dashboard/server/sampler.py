"""Samples of a server's engine, taken while somebody looks and for a while after.

Nothing is asked of the engine on a server whose page nobody opens.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

from engine.errors import SlipstreamError
from engine.protocol import ReplicaState
from rollout.dashboard.figures import SeriesPage
from rollout.dashboard.ring import SeriesRing
from rollout.dashboard.server.rates import Row, row

PERIOD_S = 1.0
_KEPT = 7200
_PAGE = 2000
_AFTER_S = 600.0


class Sampler:
    """The last two hours of samples at the most. ask: the state of the engine."""

    def __init__(
        self, ask: Callable[[], Awaitable[ReplicaState]], *, period_s: float = PERIOD_S
    ) -> None:
        self._ask = ask
        self._period_s = period_s
        self._rows = SeriesRing(_KEPT)
        self._task: asyncio.Task[None] | None = None
        self._looked_at = 0.0
        self._last: tuple[float, ReplicaState] | None = None
        self.latest: Row = {}

    def page(self, since: int) -> SeriesPage:
        """Rows from a cursor on. Sampling begins, or goes on, with this."""
        self._looked_at = time.monotonic()
        if self._task is None or self._task.done():
            self._last = None
            self._task = asyncio.create_task(self._run())
        return self._rows.page(since, _PAGE)

    async def _run(self) -> None:
        # An engine that is gone answers nobody; who looks is told so by the snapshot.
        with contextlib.suppress(SlipstreamError):
            while time.monotonic() - self._looked_at < _AFTER_S:
                self.take(await self._ask(), time.monotonic(), time.time())
                await asyncio.sleep(self._period_s)

    def take(self, state: ReplicaState, now: float, at: float) -> None:
        """Add a sample. now: of a clock that never goes back; at: Unix seconds. A state that was
        seen before is none: the engine did not answer in time."""
        last = self._last
        if last is not None and last[1] is state:
            return
        self._last = (now, state)
        self.latest = row(None, state, 0.0) if last is None else row(last[1], state, now - last[0])
        self._rows.add(at, self.latest)
