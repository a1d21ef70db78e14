"""One shape for every error: {"error": {"type", "message", "field", "param", "code"}}.

`param` is what OpenAI's clients call the field, null where there is none. `code` is the status, or
the word that those clients know for it. On the routes of Anthropic's dialect "type": "error" stands
beside it, and the type within is that dialect's word for the status.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from engine.errors import InvalidRequest, SlipstreamError
from rollout.requests.nearest import nearest

MAX_MESSAGE_CHARS = 4096
"""Longest message of an error on the wire."""


_NAMED = "/v1/messages"
"""Where the routes of Anthropic's dialect begin."""

_WORDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Anthropic's words for statuses; others are a request's fault below 500 and ours from there."""


class BodyTooLarge(InvalidRequest):
    """The body exceeds the server's limit; the message names the option that raises it."""

    status = 413


class JsonResponse(Response):
    """A reply whose body is JSON already. What `Response` makes of general headers takes longer
    than what stands in a short reply."""

    def __init__(self, body: bytes, status: int = 200) -> None:
        self.status_code = status
        self.body = body
        self.background = None
        length = str(len(body)).encode()
        self.raw_headers = [(b"content-length", length), (b"content-type", b"application/json")]


def json_response(value: Any, status: int = 200) -> Response:
    """A JSON reply, encoded by msgspec: structs and plain objects alike."""
    return JsonResponse(msgspec.json.encode(value), status)


def unexpected_response(error: Exception, path: str) -> Response:
    """The reply behind a mistake of ours, which the caller raises on: the server then drops the
    connection, and the client must not send its next request there."""
    body = _body("InternalError", f"{type(error).__name__}: {error}", "", 500)
    reply = json_response(_of_path(body, 500, path), 500)
    reply.headers["connection"] = "close"
    return reply


def error_body(error: SlipstreamError) -> dict[str, Any]:
    """The error as an object of the one shape."""
    return _body(type(error).__name__, error.message, error.field, error.code or error.status)


def named_error_body(error: SlipstreamError) -> dict[str, Any]:
    """The error as Anthropic's clients read it."""
    return _named(error_body(error), error.status)


def error_response(error: SlipstreamError, path: str = "") -> Response:
    """The error as a reply to a request of `path`."""
    reply = json_response(_of_path(error_body(error), error.status, path), error.status)
    if error.retry_after_s:
        reply.headers["retry-after"] = str(error.retry_after_s)
    return reply


def install(app: FastAPI, routes: Mapping[str, Sequence[str]]) -> None:
    """Answer typed errors, and routes or methods that do not exist, in the one shape.

    routes: the methods of every path.
    """

    async def typed(request: Request, error: Exception) -> Response:
        assert isinstance(error, SlipstreamError)
        return error_response(error, request.url.path)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        name = HTTPStatus(error.status_code).phrase.replace(" ", "")
        message, methods = _misdirected(request, error, routes)
        body = _body(name, message, "", error.status_code)
        body = _of_path(body, error.status_code, request.url.path)
        reply = json_response(body, error.status_code)
        if methods:
            reply.headers["allow"] = ", ".join(methods)
        return reply

    async def unexpected(request: Request, error: Exception) -> Response:
        return unexpected_response(error, request.url.path)

    async def left(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    app.add_exception_handler(SlipstreamError, typed)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(Exception, unexpected)


def _misdirected(
    request: Request, error: HTTPException, routes: Mapping[str, Sequence[str]]
) -> tuple[str, Sequence[str]]:
    """What to say of a route or a method that does not exist, and the methods that do."""
    path, method = request.url.path, request.method
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "")
        methods = routes.get(path) or [name for name in allowed.split(", ") if name]
        return f"{path} takes {', '.join(methods)}, not {method}", methods
    if error.status_code == HTTPStatus.NOT_FOUND:
        near = nearest(path, routes, like=0.0) or "/"
        methods = ", ".join(routes.get(near, ()))
        return (
            f"there is no route {path}; the nearest is {methods} {near}, and GET /openapi.json "
            "lists all",
            (),
        )
    return str(error.detail), ()


def _of_path(body: dict[str, Any], status: int, path: str) -> dict[str, Any]:
    """The body in the form of the dialect that a path belongs to."""
    own = path == _NAMED or path.startswith(f"{_NAMED}/")
    return _named(body, status) if own else body


def _named(body: dict[str, Any], status: int) -> dict[str, Any]:
    word = _WORDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {**body["error"], "type": word}}


def _body(kind: str, message: str, field: str, code: int | str) -> dict[str, Any]:
    field = _short(field)
    error = {"type": kind, "message": _short(message), "field": field, "param": field or None}
    return {"error": {**error, "code": code}}


def _short(text: str) -> str:
    """A text that may quote what a client sent, its middle left out if it is long."""
    # Such as the path of a file whose name is no UTF-8.
    text = text.encode(errors="backslashreplace").decode()
    if len(text) <= MAX_MESSAGE_CHARS:
        return text
    half = MAX_MESSAGE_CHARS // 2
    return f"{text[:half]} [...{len(text) - 2 * half} characters...] {text[-half:]}"
