"""POST /sessions and what follows; /open_session and /close_session are SGLang's names for it."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response
from msgspec import Struct

from engine.protocol import CloseSession, GetSession, OpenSession, SessionState
from engine.protocol.types import ClientId, Count, Seconds
from rollout.http.edge.errors import json_response
from rollout.http.edge.routes import Routes
from rollout.http.openapi import takes
from rollout.http.services import Services
from rollout.requests.json_types import decode_json


class SessionBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /sessions; fields as in `OpenSession`."""

    session_id: ClientId | None = None
    max_tokens: Count | None = None
    timeout_s: Seconds | None = None


class OpenBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /open_session. capacity_of_str_len: taken for `max_tokens` where it is below the
    context. streaming: not looked at, every session appends."""

    capacity_of_str_len: Count | None = None
    session_id: ClientId | None = None
    streaming: bool | None = None
    timeout: Seconds | None = None


class CloseBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /close_session."""

    session_id: ClientId


def router(services: Services) -> Routes:
    """The routes of sessions."""
    routes, engine = Routes(), services.engine

    async def opened(name: str | None, max_tokens: int, timeout_s: float | None) -> SessionState:
        command = OpenSession(session=name or "", max_tokens=max_tokens, timeout_s=timeout_s)
        reply = await engine.send(command)
        assert reply.session is not None
        return reply.session

    async def create(request: Request) -> Response:
        body = decode_json(await request.body() or b"{}", SessionBody)
        state = await opened(body.session_id, body.max_tokens or 0, body.timeout_s)
        return json_response(_told(state))

    async def look(session_id: str) -> Response:
        reply = await engine.send(GetSession(session=session_id))
        assert reply.session is not None
        told = _told(reply.session)
        return json_response({**told, "token_ids": reply.session.token_ids.tolist()})

    async def close(session_id: str) -> Response:
        await engine.send(CloseSession(session=session_id))
        return json_response({"id": session_id, "closed": True})

    async def open_session(request: Request) -> Response:
        body = decode_json(await request.body() or b"{}", OpenBody)
        capacity = body.capacity_of_str_len or 0
        within = capacity if capacity < engine.facts.context_length else 0
        state = await opened(body.session_id, within, body.timeout)
        return json_response(state.session)

    async def close_session(request: Request) -> Response:
        body = decode_json(await request.body(), CloseBody)
        await engine.send(CloseSession(session=body.session_id))
        return Response(status_code=200)

    add = routes.add_api_route
    add("/sessions", create, methods=["POST"], openapi_extra=takes(SessionBody))
    add("/sessions/{session_id}", look, methods=["GET"])
    add("/sessions/{session_id}", close, methods=["DELETE"])
    add("/open_session", open_session, methods=["POST"], openapi_extra=takes(OpenBody))
    add("/close_session", close_session, methods=["POST"], openapi_extra=takes(CloseBody))
    return routes


def _told(state: SessionState) -> dict[str, Any]:
    return {
        "id": state.session,
        "max_tokens": state.max_tokens,
        "timeout_s": state.timeout_s,
        "num_tokens": state.num_tokens,
        "num_turns": state.num_turns,
        "busy": state.busy,
        "held_tokens": state.held_tokens,
    }
