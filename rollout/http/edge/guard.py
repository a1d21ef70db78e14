"""What stands before every route: who calls, from where, with which key, and how much.

Plain ASGI: a middleware that wraps the response would hold streams back.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import EngineDead, Forbidden, SlipstreamError, Unauthorized
from rollout.dashboard.page_files import PAGE, STATIC
from rollout.http.config import ServeConfig
from rollout.http.edge.access import is_loopback
from rollout.http.edge.body_limits import BodyBudget, BodyReader
from rollout.http.edge.browsers import BrowserRules, Headers
from rollout.http.edge.departure import departure_of
from rollout.http.edge.errors import error_response

_OPEN_PATHS = frozenset({"/health", "/liveness", "/ping", PAGE})


def is_open(path: str) -> bool:
    """Whether a path takes no key: it says nothing but that the server lives, or is a file of the
    dashboard, which is the same on every server."""
    return path in _OPEN_PATHS or path.startswith(STATIC)


class Guard:
    """Refuses before the body is read, where it can.

    /health, /liveness, /ping and the files of the dashboard take no key. A control route takes the
    admin key if there is one, else the API key; bound to an address that others reach, it answers
    403 until an admin key is set. Requests that a browser sends for the page of another origin are
    refused (`browsers`), bodies over the limit get 413, those that do not arrive in time 408, those
    that do not fit beside others 503. A handler that is cancelled because the server leaves still
    answers, by 503.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, control_paths: Collection[str]) -> None:
        self._app = app
        self._config = config
        self._control = frozenset(control_paths)
        self._exposed = not is_loopback(config.host)
        self._browsers = BrowserRules(config)
        self._budget = BodyBudget(config.max_held_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection of the ASGI protocol."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].rstrip("/") or "/"
        control = path in self._control
        headers = Headers(scope["headers"])
        body = BodyReader(
            receive,
            self._config,
            headers,
            self._budget,
            control=control,
            departure=departure_of(scope),
        )
        reply = _Reply(send, body)
        try:
            self._browsers.check(scope["method"], path, headers, control=control)
            self._authorize(path, headers)
            body.check_length()
            await self._app(scope, body, reply)
        except SlipstreamError as error:
            # Of the checks above: the application answers its own errors.
            await error_response(error, path)(scope, receive, reply)
        except asyncio.CancelledError:
            if reply.begun:
                raise
            leaving = EngineDead("the server is shutting down", field="server")
            await error_response(leaving, path)(scope, receive, reply)
        finally:
            body.release()

    def _authorize(self, path: str, headers: Headers) -> None:
        config = self._config
        if is_open(path):
            return
        key, option = config.api_key, "--api-key"
        if path in self._control:
            if self._exposed and not config.admin_api_key:
                raise Forbidden(
                    f"{path} is a control route and the server listens at {config.host}; start "
                    "it with --admin-api-key, or bind it to 127.0.0.1",
                    field="--admin-api-key",
                )
            if config.admin_api_key:
                key, option = config.admin_api_key, "--admin-api-key"
        if key and not _same_key(headers, key, plain=path not in self._control):
            raise Unauthorized(
                f"{path} takes the header 'Authorization: Bearer KEY' with the key of {option}"
                + ("" if path in self._control else ", or 'x-api-key: KEY'"),
                field="Authorization",
            )


class _Reply:
    """The `send` of one request. begun: the status was sent.

    After a reply to a body that was given up the connection ends.
    """

    def __init__(self, send: Send, body: BodyReader) -> None:
        self._send = send
        self._body = body
        self.begun = False

    def __call__(self, message: Message) -> Awaitable[None]:
        """Send one message of the ASGI protocol."""
        self.begun = True
        if self._body.failed and message["type"] == "http.response.start":
            headers = [*message.get("headers", []), (b"connection", b"close")]
            message = {**message, "headers": headers}
        return self._send(message)


def _same_key(headers: Headers, key: str, *, plain: bool) -> bool:
    """Whether there is one Authorization header, of the scheme Bearer, with this key, or with
    `plain` one x-api-key, as clients of Anthropic send it. The time it takes does not depend on
    where a wrong key differs."""
    bearers, keys = headers.all("authorization"), headers.all("x-api-key") if plain else []
    if len(bearers) > 1 or len(keys) > 1:
        return False
    found = [value.strip() for value in keys]
    for value in bearers:
        scheme, _, given = value.strip().partition(b" ")
        found += [given.strip()] if scheme.lower() == b"bearer" else []
    # Clients may send what their environment holds beside the key that they were given.
    same = [hmac.compare_digest(value, key.encode()) for value in found]
    return any(same)
