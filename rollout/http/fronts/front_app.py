"""The application of a front: what it answers by itself, and what it passes on."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from rollout.http.fronts.news import NewsReader
from rollout.http.fronts.owner_client import REPORT, OwnerClient


class FrontApp:
    """Answers the routes at `own` paths by `app`, and passes every other one on to the owner.

    Those keep nothing from one call to the next, so that any front answers them alike. While the
    owner holds requests back it gets them all: it alone knows in which order they go on.
    """

    def __init__(
        self, app: ASGIApp, own: Collection[str], reader: NewsReader, owner: OwnerClient
    ) -> None:
        self._app = app
        self._own = frozenset(own)
        self._reader = reader
        self._owner = owner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection of the ASGI protocol."""
        if self._is_owners(scope):
            await self._owner.forward(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_owners(self, scope: Scope) -> bool:
        if scope["type"] != "http" or scope["path"] == REPORT:
            # Nobody but fronts reports: to others that is a route which does not exist.
            return False
        return scope["path"] not in self._own or self._reader.news.holds
