"""POST /rollouts and what follows: a base URL whose OpenAI calls are recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import Request, Response

from engine.protocol import (
    CloseRollout,
    GetRollout,
    OpenRollout,
    RewardRollout,
    RolloutCommand,
    RolloutState,
)
from engine.protocol.rollouts import History
from engine.protocol.types import ClientId, Count, Float32, Seconds
from rollout.http.anthropic import routes as message_routes
from rollout.http.anthropic.bodies import MessagesBody
from rollout.http.capture.next_prompt import NextPrompts
from rollout.http.capture.recorder import CallRecorder
from rollout.http.capture.transcript import summary, transcript
from rollout.http.edge.errors import json_response
from rollout.http.edge.routes import Routes
from rollout.http.edge.sse import answer
from rollout.http.openai import chat_routes, completion_routes, model_routes
from rollout.http.openai.bodies import ChatBody, CompletionBody
from rollout.http.openai.responses import routes as response_routes
from rollout.http.openai.responses.bodies import ResponsesBody
from rollout.http.openai.responses.store import ResponseStore
from rollout.http.openapi import takes
from rollout.http.services import Services
from rollout.requests.json_types import decode_json
from rollout.scheduler.validate import check_keeps_routes

Reply = Callable[[Services, bytes], Coroutine[Any, Any, Response]]


class RolloutBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /rollouts; fields as in `OpenRollout`."""

    rollout_id: ClientId | None = None
    timeout_s: Seconds | None = None
    history: History | None = None
    return_routed_experts: bool = False


class RewardBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /rollouts/ID/reward. call: number of the call that it is for; the whole rollout
    without."""

    reward: Float32
    call: Count | None = None


@dataclass(frozen=True, kw_only=True)
class _Captured:
    """A route that is captured. reply: its reply to a body. from_text: its prompts are written by
    the server, in ids as in text."""

    path: str
    body: Any
    reply: Reply
    from_text: bool = False


def router(services: Services) -> Routes:
    """The routes of rollouts."""
    routes, tokenizer = Routes(), services.tokenizer
    prompts: NextPrompts | None = None
    if tokenizer is not None:
        longest = services.engine.facts.context_length * tokenizer.longest_token_bytes
        prompts = NextPrompts(tokenizer, max_chars=longest)

    async def sent(command: RolloutCommand) -> RolloutState:
        reply = await services.engine.send(command)
        assert reply.rollout is not None
        return reply.rollout

    async def create(request: Request) -> Response:
        body = decode_json(await request.body() or b"{}", RolloutBody)
        if body.return_routed_experts:
            check_keeps_routes(services.engine.facts)
        command = OpenRollout(
            rollout=body.rollout_id or "",
            timeout_s=body.timeout_s,
            history=body.history or "kept",
            return_routed_experts=body.return_routed_experts,
        )
        turns = None if prompts is None else prompts.turns
        told = None if turns is None else turns.told
        return json_response({**summary(await sent(command)), "template": told})

    async def look(rollout_id: str) -> Response:
        state = await sent(GetRollout(rollout=rollout_id))
        found = await services.generator.workers.run(_encoded, state, services)
        return Response(found, media_type="application/json")

    async def reward(rollout_id: str, request: Request) -> Response:
        body = decode_json(await request.body(), RewardBody)
        command = RewardRollout(rollout=rollout_id, reward=body.reward, call=body.call)
        return json_response(summary(await sent(command)))

    async def delete(rollout_id: str) -> Response:
        await sent(CloseRollout(rollout=rollout_id))
        return json_response({"id": rollout_id, "deleted": True})

    def add_captured(captured: _Captured) -> None:
        async def call(rollout_id: str, request: Request) -> Response:
            body = await request.body()
            recorder = CallRecorder(services, prompts, rollout_id, from_text=captured.from_text)
            generator = services.generator.recorded(recorder)
            seen = dataclasses.replace(services, generator=generator, capture=recorder)
            return await answer(request, recorder.run(captured.reply(seen, body)))

        path = f"/rollouts/{{rollout_id}}{captured.path}"
        routes.add_api_route(path, call, methods=["POST"], openapi_extra=takes(captured.body))

    add = routes.add_api_route
    add("/rollouts", create, methods=["POST"], openapi_extra=takes(RolloutBody))
    add("/rollouts/{rollout_id}", look, methods=["GET"])
    add("/rollouts/{rollout_id}", delete, methods=["DELETE"])
    add("/rollouts/{rollout_id}/reward", reward, methods=["POST"], openapi_extra=takes(RewardBody))
    for captured in _captured():
        add_captured(captured)
    for route in model_routes.router(services).routes:
        path = f"/rollouts/{{rollout_id}}{route.path}"
        add(path, route.endpoint, methods=["GET"], openapi_extra=route.openapi_extra)
    return routes


def _captured() -> list[_Captured]:
    """Every route below /v1 that generates."""
    store = ResponseStore()

    async def chat(seen: Services, body: bytes) -> Response:
        return await chat_routes.reply_to_chat(seen, seen.prompts, body)

    async def response(seen: Services, body: bytes) -> Response:
        return await response_routes.reply_to_response(seen, store, body)

    return [
        _Captured(path="/v1/chat/completions", body=ChatBody, reply=chat, from_text=True),
        _Captured(path="/v1/completions", body=CompletionBody, reply=completion_routes.complete),
        _Captured(path="/v1/responses", body=ResponsesBody, reply=response, from_text=True),
        _Captured(
            path="/v1/messages",
            body=MessagesBody,
            reply=message_routes.reply_to_messages,
            from_text=True,
        ),
    ]


def _encoded(state: RolloutState, services: Services) -> bytes:
    return msgspec.json.encode(transcript(state, services.labels))
