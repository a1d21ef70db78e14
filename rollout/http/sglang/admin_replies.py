"""Control replies of SGLang's dialect: {"success", "message"}, 200 or 400."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request, Response

from engine.errors import EngineDead, SlipstreamError
from rollout.http.edge.body_limits import BodiesFull
from rollout.http.edge.errors import error_body, json_response

Handler = Callable[[Request], Awaitable[dict[str, Any]]]
Route = Callable[[Request], Awaitable[Response]]


def admin(handler: Handler) -> Route:
    """A route that answers what `handler` returns beside success, or the error it raises.

    Failures are 400, as callers of the dialect expect; an engine that is dead, and a body that
    the server has no room for, are 503 here too.
    """

    async def route(request: Request) -> Response:
        try:
            found = await handler(request)
        except SlipstreamError as error:
            status = error.status if isinstance(error, EngineDead | BodiesFull) else 400
            body = error_body(error)
            told = {"success": False, "message": body["error"]["message"], **body}
            return json_response(told, status)
        return json_response({"success": True, "message": "ok", **found})

    return route
