"""The page itself: a few files of HTML, CSS and JavaScript, as they lie in `static/`.

They hold nothing of the server, so they are sent without a key. The browser is told to load
nothing from elsewhere, to run no script but these, and to let no other page show this one.
"""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from engine.errors import InvalidRequest

PAGE = "/dashboard"
STATIC = "/dashboard/static/"
"""Where the page is, and where its files are."""

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    # Asked for again each time, and not sent again unless it changed: a page of one version
    # with scripts of another shows nothing.
    "cache-control": "no-cache",
}


class UnknownFile(InvalidRequest):
    """The page has no file of that name."""

    status = 404


def file_names() -> list[str]:
    """Every file of the page."""
    found = files("rollout.dashboard").joinpath("static").iterdir()
    return sorted(file.name for file in found if file.name.rpartition(".")[2] in _TYPES)


def file_response(name: str, request: Request) -> Response:
    """A file of the page, or 304 for a browser that has it. Raises UnknownFile."""
    if name not in file_names():
        raise UnknownFile(f"the page has no file {name[:100]!r}", field="name")
    body, tag = _content(name)
    headers = {**_HEADERS, "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type=_TYPES[name.rpartition(".")[2]])


@cache
def _content(name: str) -> tuple[bytes, str]:
    """The bytes of a file, and a tag that tells them from others."""
    body = files("rollout.dashboard").joinpath("static", name).read_bytes()
    return body, f'"{sha256(body).hexdigest()[:32]}"'
