"""What stands before every route: API keys, and a limit on the body.

Plain ASGI: a middleware that wraps the response would hold streams back.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import Forbidden, SlipstreamError, Unauthorized
from rollout.http.config import ServeConfig
from rollout.http.errors import BodyTooLarge, error_response

_OPEN = frozenset({"/health", "/liveness"})


class Guard:
    """Refuses before the body is read, where it can.

    /health and /liveness are open. A control route takes the admin key if there is one, else
    the API key; bound to an address that others reach, it answers 403 until an admin key is
    set. Bodies over the limit get 413.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, control_paths: Collection[str]) -> None:
        self._app = app
        self._config = config
        self._control = frozenset(control_paths)
        self._exposed = not is_loopback(config.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection of the ASGI protocol."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].rstrip("/") or "/"
        limit = _Limit(receive, self._config, control=path in self._control)
        try:
            self._authorize(path, dict(scope["headers"]))
            limit.check_length(dict(scope["headers"]))
        except SlipstreamError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, limit, send)

    def _authorize(self, path: str, headers: dict[bytes, bytes]) -> None:
        config = self._config
        if path in _OPEN:
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
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if key and not hmac.compare_digest(given, key.encode()):
            raise Unauthorized(
                f"{path} takes the header 'Authorization: Bearer KEY' with the key of {option}",
                field="Authorization",
            )


class _Limit:
    """The `receive` of one request, counting its body."""

    def __init__(self, receive: Receive, config: ServeConfig, *, control: bool) -> None:
        self._receive = receive
        self._option = "--max-control-body-mib" if control else "--max-body-mib"
        self._limit = config.max_control_body_bytes if control else config.max_body_bytes
        self._num_bytes = 0

    def check_length(self, headers: dict[bytes, bytes]) -> None:
        """Refuse by the announced length."""
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._limit:
            raise self._error(int(length))

    async def __call__(self) -> Message:
        """The next message; raises BodyTooLarge into the handler that reads the body."""
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._limit:
            raise self._error(self._num_bytes)
        return message

    def _error(self, found: int) -> BodyTooLarge:
        return BodyTooLarge(
            f"the body has {found} bytes or more, the limit is {self._limit}; send less at once "
            f"or start the server with a larger {self._option}",
            field="body",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
