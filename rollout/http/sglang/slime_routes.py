"""What slime's patched servers add to SGLang's information routes."""

from __future__ import annotations

from fastapi import Response

from rollout.http.edge.errors import json_response
from rollout.http.edge.routes import Routes
from rollout.http.services import Services


def router(services: Services) -> Routes:
    """The label of the weights that serve."""
    routes = Routes()

    async def weight_version() -> Response:
        state = await services.engine.state(max_age_s=0.0)
        return json_response({"weight_version": services.labels.text(state.version)})

    for path in ("/get_weight_version", "/weight_version"):
        routes.add_api_route(path, weight_version, methods=["GET"])
    return routes
