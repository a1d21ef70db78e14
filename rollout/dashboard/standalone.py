"""The page of a source that is no server's, such as a run: an application of its own.

    app = page_app(source, PageConfig(port=30100, api_key=""))

Any ASGI server runs it. Bound to loopback it may go without a key; who else's pages may not steer a
browser into it is decided as for the server (`rollout.http.edge.browsers`).
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import InvalidRequest, SlipstreamError, Unauthorized
from rollout.dashboard.page_files import PAGE, STATIC
from rollout.dashboard.routes import router
from rollout.dashboard.source import Source
from rollout.http.edge import errors
from rollout.http.edge.access import is_loopback
from rollout.http.edge.browsers import BrowserRules, Headers
from rollout.http.edge.errors import error_response


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """Where the page is, and its key. host, port: as in `rollout.http.config`."""

    host: str = "127.0.0.1"
    port: int = 0
    api_key: str = ""
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    send_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.api_key:
            raise InvalidRequest(
                f"others reach {self.host}, and whoever asks is shown prompts and replies: give "
                "--api-key KEY, or bind 127.0.0.1",
                field="--api-key",
            )


def page_app(source: Source, config: PageConfig) -> ASGIApp:
    """The application: the page, its data, and what stands before them."""
    routes = router(source)
    app = FastAPI(title="Slipstream", openapi_url=None, routes=[*routes.routes])
    errors.install(app, {route.path_format: sorted(route.methods or ()) for route in routes.routes})
    return _PageGuard(app, config)


class _PageGuard:
    """Refuses what the page of another origin sends, and data without the key."""

    def __init__(self, app: ASGIApp, config: PageConfig) -> None:
        self._app = app
        self._key = config.api_key.encode(errors="surrogateescape")
        self._browsers = BrowserRules(config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection of the ASGI protocol."""
        if scope["type"] == "http":
            headers, path = Headers(scope["headers"]), scope["path"]
            try:
                self._browsers.check(scope["method"], path, headers, control=False)
                self._authorize(path, headers)
            except SlipstreamError as error:
                await error_response(error, path)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _authorize(self, path: str, headers: Headers) -> None:
        if not self._key or path.rstrip("/") == PAGE or path.startswith(STATIC):
            return
        given = headers.all("authorization")
        scheme, _, key = given[0].strip().partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            raise Unauthorized(
                f"{path} takes the header 'Authorization: Bearer KEY' with the key of --api-key",
                field="Authorization",
            )
