"""Who may call a router: the keys of `rollout.http.edge.guard`, and the same rules for browsers."""

from __future__ import annotations

import hmac

from engine.errors import Forbidden, Unauthorized
from rollout.http.edge.access import is_loopback
from rollout.http.edge.browsers import BrowserRules, Headers
from rollout.router.config import RouterConfig
from rollout.router.routes import OPEN_PATHS, steers
from rollout.router.wire.messages import ClientRequest

_TELLING = frozenset({b"origin", b"sec-fetch-site", b"referer"})


class Door:
    """Refuses requests by their heads. A host that was let in once is known."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._exposed = not is_loopback(config.host)
        self._browsers = BrowserRules(config)
        self._known: set[tuple[bytes, bytes]] = set()

    def check(self, request: ClientRequest) -> None:
        """Raise Forbidden, Unauthorized or WrongContentType for a request that is not let in."""
        path = request.path.rstrip("/") or "/"
        control = steers(path)
        self._check_browser(request, path, control=control)
        if path in OPEN_PATHS:
            return
        config = self._config
        key, option = config.api_key, "--api-key"
        if control:
            if self._exposed and not config.admin_api_key:
                raise Forbidden(
                    f"{path} is a control route and the router listens at {config.host}; start it "
                    "with --admin-api-key, or bind it to 127.0.0.1",
                    field="--admin-api-key",
                )
            if config.admin_api_key:
                key, option = config.admin_api_key, "--admin-api-key"
        if key and not _has_key(request, key.encode(), plain=not control):
            raise Unauthorized(
                f"{path} takes the header 'Authorization: Bearer KEY' with the key of {option}",
                field="Authorization",
            )

    def _check_browser(self, request: ClientRequest, path: str, *, control: bool) -> None:
        kind = (request.header(b"host"), request.header(b"content-type"))
        tells = control or any(name in _TELLING for name, _ in request.headers)
        if kind in self._known and not tells:
            return
        self._browsers.check(request.method, path, Headers(request.headers), control=control)
        if len(self._known) < 64 and request.method == "POST" and not tells:
            self._known.add(kind)


def _has_key(request: ClientRequest, key: bytes, *, plain: bool) -> bool:
    """Whether the one Authorization header, or with `plain` the one x-api-key, has the key."""
    same = []
    for name, value in request.headers:
        if name == b"authorization":
            scheme, _, given = value.strip().partition(b" ")
            same.append(scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), key))
        elif plain and name == b"x-api-key":
            same.append(hmac.compare_digest(value.strip(), key))
    return any(same)
