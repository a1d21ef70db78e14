"""The ASGI application: every route of the server, and what stands before them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from rollout.http import command, errors, health, info, native, openapi
from rollout.http.dialects import (
    chat,
    completions,
    openai_models,
    profiling,
    refused,
    sglang_control,
    sglang_info,
    sglang_weights,
    vllm_control,
    vllm_generate,
    vllm_text,
    vllm_weights,
)
from rollout.http.guard import Guard
from rollout.http.services import Services
from rollout.http.shortcut import Shortcut


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
        command.router(services),
        sglang_weights.router(services),
        sglang_control.router(services),
        vllm_weights.router(services),
        vllm_control.router(services),
        profiling.router(services),
        refused.router(),
    ]
    generating = [module.router(services) for module in (native, completions, chat, vllm_generate)]
    others = [
        module.router(services) for module in (health, info, openai_models, sglang_info, vllm_text)
    ]
    routers = [*generating, *others, *control]
    routers.append(openapi.router(services.config, routers, _paths(control)))
    for routes in routers:
        app.include_router(routes)
    errors.install(app, _methods(routers))
    app.add_middleware(Shortcut, routers=generating)
    app.add_middleware(Guard, config=services.config, control_paths=_paths(control))
    if services.config.allowed_origins:
        # Outermost: it also answers what browsers ask before they send a request.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(services.config.allowed_origins),
            allow_methods=["GET", "POST", "PUT"],
            allow_headers=["*"],
        )
    return app


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
