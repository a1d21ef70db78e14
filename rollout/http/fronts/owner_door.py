"""Where the fronts of an engine come in at its owner."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from rollout.http.fronts.owner_client import CALLER, REPORT, FrontReport


class OwnerDoor:
    """The owner's application, for a socket that its fronts alone reach.

    A request that a front passes on counts as one of that front's client, by its address. report:
    called with what a front reports of itself.
    """

    def __init__(self, app: ASGIApp, report: Callable[[FrontReport], None]) -> None:
        self._app = app
        self._report = report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection of the ASGI protocol."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        hosts = [value.decode() for name, value in scope["headers"] if name == CALLER]
        if scope["path"] == REPORT and not hosts:
            body = await Request(scope, receive).body()
            self._report(msgspec.json.decode(body, type=FrontReport))
            await Response(status_code=204)(scope, receive, send)
            return
        headers = [(name, value) for name, value in scope["headers"] if name != CALLER]
        client = (hosts[0], 0) if hosts and hosts[0] else None
        await self._app({**scope, "headers": headers, "client": client}, receive, send)
