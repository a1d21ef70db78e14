"""Addresses of HTTP servers, as trainers and clients are given them."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

_SHOWN = 200


def url_fault(url: str) -> str:
    """Why `url` names no server such as "http://127.0.0.1:30000", and what to do; "" if it does.

    Another scheme, no host, a port that is no number, characters that no URL has, a host that no
    resolver takes.
    """
    why = _fault(url)
    return f"{url[:_SHOWN]!r} is no URL of a server ({why}); give http://HOST:PORT" if why else ""


def _fault(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        return "it starts with neither http:// nor https://"
    if not url.isascii() or not url.isprintable() or " " in url:
        return "it holds white space, control characters or others than ASCII"
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port  # Looked at only when it is asked for.
        if not host:
            return "it names no host"
        # As a resolver does it: empty labels and those over 63 characters have no encoding.
        host.encode("idna")
    except ValueError as error:
        return str(error)
    return "it has a query or a fragment" if parts.query or parts.fragment else ""


def address_towards(url: str) -> str:
    """This machine's address on the way to the server at `url`; nothing is sent. "" if there is no
    way, or nobody knows the server's name."""
    parts = urlsplit(url)
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            own: str = probe.getsockname()[0]
            return own
    except OSError:
        return ""
