"""vLLM's routes for pausing, sleeping, aborting and the prefix cache."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from fastapi import Request, Response
from msgspec import Meta

from engine.errors import EngineDead, SlipstreamError
from engine.protocol import Abort, MemoryTag
from engine.protocol.types import Patience, RequestId
from rollout.http.edge.errors import json_response
from rollout.http.edge.read_body import read_body, read_query
from rollout.http.edge.routes import Routes
from rollout.http.edge.sse import answer
from rollout.http.openapi import takes
from rollout.http.services import Services

Mode = Literal["abort", "wait", "keep"]


class _Pause(msgspec.Struct):
    """timeout_s, of mode wait, is no parameter of vLLM's."""

    mode: Mode = "abort"
    clear_cache: bool = True
    wait_for_inflight_requests: bool = False
    timeout_s: Patience = 600.0


WakeTag = Literal["weights", "kv_cache", "cuda_graph", "scheduling"]
Tags = Annotated[list[WakeTag], Meta(max_length=16)]


class _Sleep(msgspec.Struct):
    """tags, which SkyRL sends: what memory is given back, all of it without."""

    level: Literal[0, 1, 2] = 1
    mode: Mode = "abort"
    timeout_s: Patience = 600.0
    tags: Tags | None = None


class _WakeUp(msgspec.Struct):
    tags: Tags | None = None


class _AbortRequests(msgspec.Struct):
    request_ids: Annotated[list[RequestId], Meta(max_length=1 << 17)]


class _Generation:
    """The handlers."""

    def __init__(self, services: Services) -> None:
        self._lifecycle = services.lifecycle
        self._engine = services.engine
        self._calls = services.calls

    async def pause(self, request: Request) -> Response:
        query = read_query(request, _Pause)
        # A client that leaves while it waits would not know that generation then stops.
        return await answer(request, self._pause(query))

    async def _pause(self, query: _Pause) -> Response:
        mode: Mode = "wait" if query.wait_for_inflight_requests else query.mode
        await self._lifecycle.pause(mode, clear_cache=query.clear_cache, wait_s=query.timeout_s)
        return json_response({"status": "paused"})

    async def resume(self, _: Request) -> Response:
        await self._lifecycle.resume()
        return json_response({"status": "resumed"})

    async def is_paused(self, _: Request) -> Response:
        state = await self._engine.state(max_age_s=0.0)
        return json_response({"is_paused": state.paused})

    async def sleep(self, request: Request) -> Response:
        """Level 0 pauses; 1 and 2 also give memory back. Whether weights are kept on the host
        is the server's option, not the level's."""
        return await answer(request, self._sleep(read_query(request, _Sleep)))

    async def _sleep(self, query: _Sleep) -> Response:
        tags = _memory(query.tags)
        if query.level > 0 and (tags or not query.tags):
            await self._lifecycle.sleep(query.mode, tags, wait_s=query.timeout_s)
        else:
            await self._lifecycle.pause(query.mode, wait_s=query.timeout_s)
        return json_response({"status": "asleep"})

    async def wake_up(self, request: Request) -> Response:
        """Take memory back, and step again once all of it is there."""
        asked = read_query(request, _WakeUp).tags
        tags = _memory(asked)
        if tags or not asked:
            await self._lifecycle.resume_memory(tags)
        state = await self._engine.state(max_age_s=0.0)
        if not state.released:
            await self._lifecycle.resume()
        return json_response({"status": "awake" if not state.released else "asleep"})

    async def is_sleeping(self, _: Request) -> Response:
        state = await self._engine.state(max_age_s=0.0)
        return json_response({"is_sleeping": bool(state.released)})

    async def reset_prefix_cache(self, _: Request) -> Response:
        try:
            await self._lifecycle.flush()
        except EngineDead:
            raise
        except SlipstreamError as error:
            return json_response({"success": False, "message": error.message})
        return json_response({"success": True})

    async def abort_requests(self, request: Request) -> Response:
        body = await read_body(request, _AbortRequests)
        rids = [rid for name in body.request_ids if name for rid in self._rids(name)]
        replies = self._engine.post([Abort(rid=rid) for rid in rids])
        for reply in replies:
            await reply
        return json_response({"status": "ok"})

    def _rids(self, name: str) -> list[str]:
        """The sequences of the call that a reply calls `name`, or the one with that id."""
        call = self._calls.get(name)
        return [name] if call is None else [sample.request.rid for sample in call.samples]


def router(services: Services) -> Routes:
    """The routes of the dialect that steer generation and memory."""
    routes, generation = Routes(), _Generation(services)
    for path, (handler, reads) in {
        "/pause": (generation.pause, takes(query=_Pause)),
        "/resume": (generation.resume, takes()),
        "/sleep": (generation.sleep, takes(query=_Sleep)),
        "/wake_up": (generation.wake_up, takes(query=_WakeUp)),
        "/reset_prefix_cache": (generation.reset_prefix_cache, takes()),
        "/abort_requests": (generation.abort_requests, takes(_AbortRequests)),
    }.items():
        routes.add_api_route(path, handler, methods=["POST"], openapi_extra=reads)
    for path, handler in {
        "/is_paused": generation.is_paused,
        "/is_sleeping": generation.is_sleeping,
    }.items():
        routes.add_api_route(path, handler, methods=["GET"])
    return routes


def _memory(tags: list[WakeTag] | None) -> list[MemoryTag]:
    """Those of `tags` that name memory."""
    return [tag for tag in tags or [] if tag != "scheduling"]
