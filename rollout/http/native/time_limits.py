"""How long a request may take, from its arrival to its last token.

What has not ended by then is aborted in the engine, which frees its KV, and answered with the
tokens that it has.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import EngineDead
from engine.protocol import Abort
from rollout.http.engine.client import AsyncEngine
from rollout.http.native.sample import Sample


@dataclass(frozen=True, kw_only=True)
class TimeLimits:
    """Seconds. default_s: of a request that says nothing; most_s: what any may have. 0.0: none."""

    default_s: float = 0.0
    most_s: float = 0.0

    def of(self, sample: Sample) -> float:
        """The limit of one sequence; 0.0 for none."""
        wanted_s = sample.wire.timeout_s or self.default_s
        return min(wanted_s or self.most_s, self.most_s) if self.most_s else wanted_s

    def watch(self, engine: AsyncEngine, open_samples: Mapping[str, Sample]) -> TimeWatch | None:
        """Abort at its time what is still among `open_samples`; None where nothing is limited."""
        if not (self.default_s or self.most_s) and not any(
            sample.wire.timeout_s for sample in open_samples.values()
        ):
            return None
        return TimeWatch(engine, open_samples, {r: self.of(s) for r, s in open_samples.items()})


class TimeWatch:
    """The timers of one call: one for each limit that its sequences have."""

    def __init__(
        self,
        engine: AsyncEngine,
        open_samples: Mapping[str, Sample],
        limits: Mapping[str, float],
    ) -> None:
        self._engine = engine
        self._open = open_samples
        self._limits = limits
        loop, now = asyncio.get_running_loop(), time.monotonic()
        began = min(sample.started_at for sample in open_samples.values())
        self._timers = [
            loop.call_later(max(0.0, began + limit_s - now), self._expire, limit_s)
            for limit_s in set(limits.values()) - {0.0}
        ]

    def end(self) -> None:
        """Watch no longer."""
        for timer in self._timers:
            timer.cancel()

    def _expire(self, limit_s: float) -> None:
        rids = [rid for rid in self._open if self._limits[rid] == limit_s]
        if not rids or self._engine.dead is not None:
            return
        message = f"the request's time of {limit_s:g} s is over (timeout_s)"
        try:
            self._engine.post([Abort(rids=rids, message=message)])
        except EngineDead:
            # Whoever waits for the samples is told so.
            return
