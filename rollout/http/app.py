"""The ASGI application: every route of the server, and what stands before them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from rollout.dashboard import routes as dashboard_routes
from rollout.dashboard.server.server_source import ServerSource
from rollout.http import openapi
from rollout.http.anthropic import routes as message_routes
from rollout.http.capture import rollout_routes
from rollout.http.edge import errors, unserved_routes
from rollout.http.edge.guard import Guard
from rollout.http.edge.routes import Routes
from rollout.http.edge.shortcut import Shortcut
from rollout.http.journal.door import Answer, JournalDoor
from rollout.http.native import command_routes, phase_routes, session_routes
from rollout.http.native import generate_routes as native_generate_routes
from rollout.http.observing.observer import Observer
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

_OTHERS = (
    health_routes,
    info_routes,
    model_routes,
    slime_routes,
    text_routes,
    session_routes,
    rollout_routes,
)

_CONTROL = (
    command_routes,
    phase_routes,
    sglang_weight_routes,
    sglang_pause_routes,
    vllm_weight_routes,
    vllm_pause_routes,
    profile_routes,
)
"""What takes the admin key."""


def build_app(services: Services) -> ASGIApp:
    """The application of one server; its shutdown closes the engine.

    What generates is called right behind the guard: for a short request, the layers that FastAPI
    and Starlette put around every route take as long as all that the route does.
    """
    routers = _Routers(services)
    inner: Any = build_routes(services, routers)
    # As uvicorn has it, whoever a proxy of this machine speaks for is the caller.
    trusted = os.environ.get("FORWARDED_ALLOW_IPS", "127.0.0.1")
    routes: Any = ProxyHeadersMiddleware(inner, trusted)
    app: ASGIApp = Shortcut(routes, routers.generating)
    app = JournalDoor(app, services, _journaled(routers.store))
    app = Guard(app, services.config, _paths(routers.control))
    if services.config.allowed_origins:
        # Outermost: it also answers what browsers ask before they send a request.
        app = CORSMiddleware(
            app,
            allow_origins=list(services.config.allowed_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
        )
    return Observer(app, access=services.config.access_log, traces=services.traces)


class _Routers:
    """The routes of a server: those that generate, those that steer the engine, and others."""

    def __init__(self, services: Services) -> None:
        self.generating = [module.router(services) for module in _GENERATING]
        self.store = ResponseStore()
        self.others = [module.router(services) for module in _OTHERS]
        self.others.append(response_routes.router(services, self.store))
        self.others.append(dashboard_routes.router(ServerSource(services)))
        self.control = [module.router(services) for module in _CONTROL]
        self.control.append(unserved_routes.router())


def build_routes(services: Services, routers: _Routers | None = None) -> FastAPI:
    """Every route of the application, with nothing before them."""
    routers = routers or _Routers(services)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await services.engine.close()
            if services.traces is not None:
                await asyncio.to_thread(services.traces.close)

    found = [*routers.generating, *routers.others, *routers.control]
    found.append(openapi.router(services.config, found, _paths(routers.control)))
    served = [route for router in found for route in router.routes]
    app = FastAPI(title="Slipstream", lifespan=lifespan, openapi_url=None, routes=served)
    errors.install(app, _methods(found))
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


def _methods(routers: Sequence[Routes]) -> dict[str, list[str]]:
    """The methods of every path."""
    found: dict[str, set[str]] = {}
    for route in (route for router in routers for route in router.routes):
        found.setdefault(route.path_format, set()).update(route.methods or ())
    return {path: sorted(methods) for path, methods in found.items()}


def _paths(routers: Sequence[Routes]) -> frozenset[str]:
    return frozenset(route.path for router in routers for route in router.routes)
