"""The ASGI application: every route of the server, and what stands before them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from rollout.http import openapi
from rollout.http.anthropic import routes as message_routes
from rollout.http.capture import rollout_routes
from rollout.http.edge import errors, unserved_routes
from rollout.http.edge.guard import Guard
from rollout.http.edge.shortcut import Shortcut
from rollout.http.journal.door import Answer, JournalDoor
from rollout.http.native import command_routes, phase_routes, session_routes
from rollout.http.native import generate_routes as native_generate_routes
from rollout.http.openai import chat_routes, completion_routes, model_routes
from rollout.http.openai.responses import routes as response_routes
from rollout.http.openai.responses.store import ResponseStore
from rollout.http.scoring import classify_routes, embedding_routes, rerank_routes, score_routes
from rollout.http.services import Services
from rollout.http.sglang import pause_routes as sglang_pause_routes
from rollout.http.sglang import slime_routes
from rollout.http.sglang import weight_routes as sglang_weight_routes
from rollout.http.status import health_routes, info_routes, profile_routes
from rollout.http.vllm import generate_routes as vllm_generate_routes
from rollout.http.vllm import pause_routes as vllm_pause_routes
from rollout.http.vllm import text_routes
from rollout.http.vllm import weight_routes as vllm_weight_routes

_GENERATING = (
    native_generate_routes,
    completion_routes,
    chat_routes,
    message_routes,
    vllm_generate_routes,
    classify_routes,
    embedding_routes,
    score_routes,
    rerank_routes,
)
"""What runs requests of the engine and keeps nothing of them."""


def build_app(services: Services) -> FastAPI:
    """The application of one server; its shutdown closes the engine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await services.engine.close()

    app = FastAPI(title="Slipstream", lifespan=lifespan, openapi_url=None)
    control = [
        command_routes.router(services),
        phase_routes.router(services),
        sglang_weight_routes.router(services),
        sglang_pause_routes.router(services),
        vllm_weight_routes.router(services),
        vllm_pause_routes.router(services),
        profile_routes.router(services),
        unserved_routes.router(),
    ]
    generating = [module.router(services) for module in _GENERATING]
    others = [
        module.router(services)
        for module in (
            health_routes,
            info_routes,
            model_routes,
            slime_routes,
            text_routes,
        )
    ]
    store = ResponseStore()
    others.append(response_routes.router(services, store))
    others += [session_routes.router(services), rollout_routes.router(services)]
    routers = [*generating, *others, *control]
    routers.append(openapi.router(services.config, routers, _paths(control)))
    for routes in routers:
        app.include_router(routes)
    errors.install(app, _methods(routers))
    app.add_middleware(Shortcut, routers=generating)
    app.add_middleware(JournalDoor, services=services, answers=_journaled(store))
    app.add_middleware(Guard, config=services.config, control_paths=_paths(control))
    if services.config.allowed_origins:
        # Outermost: it also answers what browsers ask before they send a request.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(services.config.allowed_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
        )
    return app


def _journaled(store: ResponseStore) -> Mapping[str, Answer]:
    """The routes whose replies have a journal on demand."""

    async def chat(seen: Services, body: bytes) -> Response:
        return await chat_routes.reply_to_chat(seen, seen.prompts, body)

    async def response(seen: Services, body: bytes) -> Response:
        return await response_routes.reply_to_response(seen, store, body)

    return {
        "/generate": native_generate_routes.reply_to_generate,
        "/v1/completions": completion_routes.complete,
        "/v1/chat/completions": chat,
        "/v1/responses": response,
        "/v1/messages": message_routes.reply_to_messages,
        "/inference/v1/generate": vllm_generate_routes.reply_to_tokens,
    }


def front_paths(services: Services) -> frozenset[str]:
    """The routes that every front process answers by itself: they keep nothing from one call to
    the next. All others are the owner's of the engine."""
    return _paths([module.router(services) for module in (*_GENERATING, text_routes)])


def _methods(routers: Sequence[APIRouter]) -> dict[str, list[str]]:
    """The methods of every path."""
    found: dict[str, set[str]] = {}
    for route in (route for router in routers for route in router.routes):
        if isinstance(route, Route):
            found.setdefault(route.path_format, set()).update(route.methods or ())
    return {path: sorted(methods) for path, methods in found.items()}


def _paths(routers: Sequence[APIRouter]) -> frozenset[str]:
    found = [
        route.path for router in routers for route in router.routes if isinstance(route, Route)
    ]
    return frozenset(found)
