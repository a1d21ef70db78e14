"""What a browser may send here: a page of another origin steers nothing on this server.

A browser on the operator's machine reaches a server that is bound to loopback, and sends some
requests for any page without asking. Three things tell: the Host header, which names the page's
own host after a DNS rebinding; Origin, Sec-Fetch-Site and Referer, which a page cannot forge; and
the content type, which only asked-for requests may have as JSON.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol
from urllib.parse import urlsplit

from engine.errors import Forbidden, InvalidRequest
from rollout.http.edge.access import is_loopback

STATE_CHANGING_GETS = frozenset(
    {"/flush_cache", "/release_memory_occupation", "/resume_memory_occupation"}
)
"""GET routes of SGLang's dialect that change state; every other GET only reads."""

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN_SITES = frozenset({"", "none", "same-origin"})
_LOOKED_AT = (b"host", b"origin", b"sec-fetch-site", b"referer", b"content-type")
_MOST_PASSED = 256
_JSON = re.compile(r"application/([\w.+-]+\+)?json", re.IGNORECASE)
_FORM = "application/x-www-form-urlencoded"


class WrongContentType(InvalidRequest):
    """The body is not announced as JSON."""

    status = 415


class Headers:
    """The headers of one request, by lower-case name."""

    def __init__(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        self._pairs = pairs
        self._last = dict(pairs)
        self.repeated = len(self._last) < len(pairs)
        """Whether some name comes more than once."""

    def all(self, name: str) -> list[bytes]:
        """Every value, as it was sent."""
        wanted = name.encode()
        return [value for found, value in self._pairs if found == wanted]

    def get(self, name: str) -> str:
        """The value; "" if there is none, all of them joined if there are several."""
        value = self._last.get(name.encode())
        if value is None:
            return ""
        if self.repeated:
            value = b", ".join(self.all(name))
        return value.decode("latin-1").strip()

    def raw(self, names: Iterable[bytes]) -> tuple[bytes | None, ...]:
        """The last value of each name, as it was sent."""
        return tuple(map(self._last.get, names))


class Exposure(Protocol):
    """What of a server's configuration says who may reach it."""

    @property
    def host(self) -> str:
        """Address that it is bound to."""
        ...

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        """Names that the Host header may have."""
        ...

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        """Origins whose pages may call."""
        ...


class BrowserRules:
    """Which requests of browsers one server takes. Programs that are no browser send neither
    Origin nor Sec-Fetch-Site, so that of these rules only Host and content type concern them."""

    def __init__(self, config: Exposure) -> None:
        self._loopback = is_loopback(config.host)
        self._host = config.host.lower()
        self._hosts = frozenset(host.lower() for host in config.allowed_hosts)
        self._origins = frozenset(origin.lower().rstrip("/") for origin in config.allowed_origins)
        self._passed: set[Hashable] = set()

    def check(self, method: str, path: str, headers: Headers, *, control: bool) -> None:
        """Raise Forbidden for a host or an origin that is not allowed, WrongContentType for a
        body that is not JSON."""
        sends = method not in _SAFE_METHODS and _has_body(headers)
        changes = method not in _SAFE_METHODS or path in STATE_CHANGING_GETS
        # All that the rules look at. A client sends the same with each of its requests.
        seen = (sends, changes, control, *headers.raw(_LOOKED_AT))
        if seen in self._passed and not headers.repeated:
            return
        self._check(headers, sends=sends, changes=changes, control=control)
        if not headers.repeated:
            if len(self._passed) >= _MOST_PASSED:
                self._passed.clear()
            self._passed.add(seen)

    def _check(self, headers: Headers, *, sends: bool, changes: bool, control: bool) -> None:
        self._check_host(headers)
        foreign = self._foreign(headers, changes=changes)
        if foreign:
            raise Forbidden(
                f"{foreign}; start the server with --allowed-origin ORIGIN for pages that may call "
                "it",
                field="Origin",
            )
        if sends:
            _check_type(headers, control=control)

    def _check_host(self, headers: Headers) -> None:
        host = _host_name(headers.get("host"))
        if not host or "*" in self._hosts or host in self._hosts:
            return
        if not self._hosts and not self._loopback:
            return
        if host == self._host or is_loopback(host):
            return
        raise Forbidden(
            f"the request is for the host {host[:200]!r}, which is not this server's; start it "
            "with --allowed-host HOST (which may be given several times)",
            field="Host",
        )

    def _foreign(self, headers: Headers, *, changes: bool) -> str:
        """Why a request comes from the page of another origin, or ""."""
        origin = headers.get("origin").lower()
        if origin:
            if "*" in self._origins or origin in self._origins:
                return ""
            if _netloc(origin) == headers.get("host").lower():
                return ""
            return f"the request comes from a page of {origin[:200]}"
        site = headers.get("sec-fetch-site").lower()
        if changes and site not in _OWN_SITES:
            return f"the request comes from a page of another site (Sec-Fetch-Site: {site[:40]})"
        referer = headers.get("referer").lower()
        if changes and referer and _netloc(referer) != headers.get("host").lower():
            return f"the request comes from the page {referer[:200]}"
        return ""


def _check_type(headers: Headers, *, control: bool) -> None:
    found = headers.get("content-type").partition(";")[0].strip()
    if _JSON.fullmatch(found):
        return
    # What `curl -d` sends. A browser would say where such a request comes from.
    browser = headers.get("origin") or headers.get("sec-fetch-site")
    if not control and not browser and found.lower() in ("", _FORM):
        return
    raise WrongContentType(
        f"the body is announced as {found[:100] or 'nothing'!r}; send the header "
        "'Content-Type: application/json'",
        field="Content-Type",
    )


def _netloc(url: str) -> str | None:
    """Host and port of a URL; None, which is nobody's, for what is none."""
    try:
        return urlsplit(url).netloc or None
    except ValueError:
        return None


def _has_body(headers: Headers) -> bool:
    return bool(headers.get("transfer-encoding")) or headers.get("content-length") not in ("", "0")


def _host_name(value: str) -> str:
    """A Host header without its port; an IPv6 address without its brackets."""
    if value.startswith("["):
        return value[1:].partition("]")[0].lower()
    return value.rpartition(":")[0].lower() if value.count(":") == 1 else value.lower()
