"""The routes of this server: handlers that take the request, parts of its path, or both, and
return a response.

A route of FastAPI looks into its handler for what it may depend on, validate and convert. None of
that is used here, and for every route of a server it takes longer than all else of its start.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, compile_path

Handler = Callable[..., Awaitable[Response]]
"""Takes parts of the path by their names, and the request by any other."""


class HandlerRoute(Route):
    """A route whose `endpoint` takes the request alone.

    methods: those it answers; GET brings no HEAD along. openapi_extra: what it reads, see
    `openapi.takes`.
    """

    def __init__(
        self,
        path: str,
        handler: Handler,
        methods: Collection[str],
        openapi_extra: Mapping[str, Any] | None,
    ) -> None:
        super().__init__(path, _of_request(handler, compile_path(path)[2].keys()))
        self.methods = set(methods)
        self.openapi_extra = openapi_extra


class Routes:
    """The routes of one part of the server, in the order in which they are looked at."""

    def __init__(self) -> None:
        self.routes: list[HandlerRoute] = []

    def add_api_route(
        self,
        path: str,
        handler: Handler,
        *,
        methods: Collection[str],
        openapi_extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Have `handler` answer `methods` of `path`, which may name parts: /sessions/{name}."""
        self.routes.append(HandlerRoute(path, handler, methods, openapi_extra))


def _of_request(
    handler: Handler, parts: Collection[str]
) -> Callable[[Request], Awaitable[Response]]:
    """`handler` as a function of the request. parts: of the path, by name."""
    names = list(inspect.signature(handler).parameters)
    taken = [name for name in names if name in parts]
    others = [name for name in names if name not in parts]
    assert len(others) <= 1, f"{handler} takes {others}, which are no parts of its path"
    if others and not taken:
        return handler

    async def endpoint(request: Request) -> Response:
        given: dict[str, Any] = {name: request.path_params[name] for name in taken}
        return await handler(**given, **dict.fromkeys(others, request))

    return endpoint
