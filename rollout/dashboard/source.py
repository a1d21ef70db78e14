"""Where the page's figures come from: one interface, whoever has them."""

from __future__ import annotations

from typing import Protocol

from engine.errors import InvalidRequest
from rollout.dashboard.figures import EventsPage, SeriesPage, Snapshot
from rollout.dashboard.rollouts import RolloutGroup, RolloutPage, RolloutQuery


class UnknownGroup(InvalidRequest):
    """There is no such group of rollouts (any more)."""

    status = 404


class Source(Protocol):
    """A server's or a run's figures. Every method is called on the event loop and must not hold
    it up: what reads files does so in a thread. Each may raise a SlipstreamError, which the page
    shows, and asks again.
    """

    @property
    def epoch(self) -> str:
        """Names what cursors count: another one after a restart, when rows begin anew."""
        ...

    async def snapshot(self) -> Snapshot:
        """What is true now."""
        ...

    async def series(self, since: int) -> SeriesPage:
        """Rows from the cursor `since` on, some thousands at most; 0 for all. A cursor behind the
        last row gives none."""
        ...

    async def events(self, since: int) -> EventsPage:
        """Events from the cursor `since` on, some thousands at most."""
        ...

    async def rollouts(self, query: RolloutQuery) -> RolloutPage:
        """The rollouts that match."""
        ...

    async def rollout_group(self, group: str) -> RolloutGroup:
        """One group with its tokens. Raises UnknownGroup."""
        ...
