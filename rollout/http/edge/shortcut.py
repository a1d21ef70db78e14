"""The short way to the routes that generate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import SlipstreamError
from rollout.http.edge.errors import error_response, unexpected_response
from rollout.http.edge.routes import Routes


class Shortcut:
    """Calls the handlers of `routers` by their paths; everything else goes to `app`.

    These handlers read the body and write the reply by themselves. What stands between a route
    of FastAPI and its handler (dependencies, validation, exit stacks) takes longer than they do,
    for every request and every frame of a stream.
    """

    def __init__(self, app: ASGIApp, routers: Iterable[Routes]) -> None:
        self._app = app
        self._handlers: dict[tuple[str, str], Any] = {
            (method, route.path): route.endpoint
            for router in routers
            for route in router.routes
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection of the ASGI protocol."""
        http = scope["type"] == "http"
        handler = self._handlers.get((scope["method"], scope["path"])) if http else None
        if handler is None:
            await self._app(scope, receive, send)
            return
        reply: Response
        try:
            reply = await handler(Request(scope, receive, send))
        except SlipstreamError as error:
            reply = error_response(error, scope["path"])
        except ClientDisconnect:
            reply = Response(status_code=499)
        except Exception as error:
            # A boundary: what goes on from here ends the connection.
            await unexpected_response(error, scope["path"])(scope, receive, send)
            raise
        await reply(scope, receive, send)
