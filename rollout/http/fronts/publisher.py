"""How the owner of an engine keeps the news that its fronts read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rollout.http.fronts.news import News, NewsWriter
from rollout.http.services import Services

_TELL_S = 0.05


class Publisher:
    """Writes the news of one server: at once when requests are held back, a version gets a name,
    or the engine dies or is followed by another; and within a moment whatever else changes.

    hub: where the engine that runs is joined. That the server leaves is no news: fronts are told by
    a signal, and end what they have open with the engine's answers, which outlives them.
    """

    def __init__(self, writer: NewsWriter, services: Services, hub: Callable[[], str]) -> None:
        self._writer = writer
        self._services = services
        self._hub = hub
        engine = services.engine
        engine.outbox.changed = lambda _: self.tell()
        engine.on_death(lambda _: self.tell())
        engine.on_restart(self.tell)
        services.labels.changed = self.tell
        self.tell()

    def tell(self) -> None:
        """Write what is so now."""
        engine = self._services.engine
        dead = None if engine.dead is engine.leaving else engine.dead
        self._writer.write(
            News(
                hub=self._hub() if dead is None else "",
                dead="" if dead is None else dead.message,
                dead_field="leader" if dead is None else dead.field,
                holds=engine.outbox.holds,
                labels=dict(self._services.labels.labels),
            )
        )

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await asyncio.sleep(_TELL_S)
            self.tell()
