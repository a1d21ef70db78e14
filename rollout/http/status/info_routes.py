"""Routes that say what the server is, which trainers ask for before they begin."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Response

from engine.protocol import ReplicaState
from rollout.http.edge.errors import json_response
from rollout.http.edge.routes import Routes
from rollout.http.services import Services
from rollout.http.status.facts import load, loads_total, model_info, package_version, server_info


def router(services: Services) -> Routes:
    """Information routes; none changes anything."""
    routes = Routes()
    engine = services.engine

    async def server() -> Response:
        return json_response(server_info(services, await engine.state()))

    async def model() -> Response:
        return json_response(model_info(services, await engine.state()))

    async def loads() -> Response:
        return json_response(_loads(await engine.state()))

    async def package() -> Response:
        return json_response({"version": package_version()})

    for path, handler in {
        "/server_info": server,
        "/get_server_info": server,
        "/model_info": model,
        "/get_model_info": model,
        "/v1/loads": loads,
        "/version": package,
    }.items():
        routes.add_api_route(path, handler, methods=["GET"])
    return routes


def _loads(state: ReplicaState) -> dict[str, Any]:
    return {
        "timestamp": time.time(),
        "version": package_version(),
        "dp_rank_count": 1,
        "loads": [load(state)],
        "aggregate": loads_total(state),
    }
