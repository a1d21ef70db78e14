"""SGLang's routes for pausing, aborting, the cache and memory."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from fastapi import Request, Response

from engine.errors import EngineDead, SlipstreamError
from engine.protocol import Abort, PauseMode, Reply
from engine.protocol.types import MemoryTags, Message, Patience, RequestId
from rollout.http.edge.read_body import read_body, read_body_or_query, read_query
from rollout.http.edge.routes import Routes
from rollout.http.openapi import takes
from rollout.http.services import Services
from rollout.http.sglang.admin_replies import admin

_MODES: dict[str, PauseMode] = {"abort": "abort", "retract": "retract", "in_place": "keep"}


class _Pause(msgspec.Struct):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class _AbortRequest(msgspec.Struct):
    rid: RequestId | None = None
    abort_all: bool = False
    abort_message: Message | None = None


class _Flush(msgspec.Struct):
    timeout: Patience | None = None


class _Memory(msgspec.Struct):
    tags: MemoryTags | None = None


class _Generation:
    """The handlers."""

    def __init__(self, services: Services) -> None:
        self._lifecycle = services.lifecycle
        self._engine = services.engine

    async def pause(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, _Pause)
        dropped = await self._lifecycle.pause(_MODES[body.mode])
        return {"message": f"paused by mode {body.mode}{dropped}", "status": "ok"}

    async def resume(self, _: Request) -> dict[str, Any]:
        waiting = await self._lifecycle.resume()
        return {"message": f"generation goes on{waiting}", "status": "ok"}

    async def abort(self, request: Request) -> Response:
        body = await read_body(request, _AbortRequest)
        if body.rid or body.abort_all:
            message = body.abort_message or "aborted by the client"
            prefix = "" if body.abort_all else body.rid or ""
            await self._engine.send(Abort(rid_prefix=prefix, all=body.abort_all, message=message))
        return Response()

    async def flush(self, request: Request) -> Response:
        timeout = read_query(request, _Flush).timeout or 0.0
        try:
            await self._lifecycle.flush(timeout)
        except EngineDead:
            raise
        except SlipstreamError as error:
            return Response(f"{error.message}\n", 400, media_type="text/plain")
        return Response("cache flushed\n", media_type="text/plain")

    async def release(self, request: Request) -> dict[str, Any]:
        tags = (await read_body_or_query(request, _Memory)).tags or []
        return _memory_report(await self._lifecycle.release_memory(tags))

    async def resume_memory(self, request: Request) -> dict[str, Any]:
        tags = (await read_body_or_query(request, _Memory)).tags or []
        return _memory_report(await self._lifecycle.resume_memory(tags))


def router(services: Services) -> Routes:
    """The routes of the dialect that steer generation and memory."""
    routes, generation = Routes(), _Generation(services)
    memory = takes(_Memory, query=_Memory)
    for path, handler, reads in (
        ("/pause_generation", admin(generation.pause), takes(_Pause)),
        ("/continue_generation", admin(generation.resume), takes()),
        ("/abort_request", generation.abort, takes(_AbortRequest)),
    ):
        routes.add_api_route(path, handler, methods=["POST"], openapi_extra=reads)
    for path, handler, reads in (
        ("/flush_cache", generation.flush, takes(query=_Flush)),
        ("/release_memory_occupation", admin(generation.release), memory),
        ("/resume_memory_occupation", admin(generation.resume_memory), memory),
    ):
        routes.add_api_route(path, handler, methods=["GET", "POST"], openapi_extra=reads)
    return routes


def _memory_report(reply: Reply) -> dict[str, Any]:
    return {"ranks": reply.memory}
