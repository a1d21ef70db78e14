"""GET /v1/models and /v1/models/{id}, and whether a body asks for the model that is served."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request, Response

from engine.errors import InvalidRequest
from engine.protocol import ReplicaState
from rollout.http.edge.errors import json_response
from rollout.http.edge.routes import Routes
from rollout.http.openapi import takes
from rollout.http.services import Services

_ANY = "default"
"""What clients of SGLang call whichever model is served."""


class UnknownModel(InvalidRequest):
    """A model that this server does not serve."""

    status = 404
    code = "model_not_found"


def router(services: Services) -> Routes:
    """The routes; a server serves one model."""
    routes, created = Routes(), int(time.time())

    async def models() -> Response:
        found = _model(services, await services.engine.state(), created)
        return json_response({"object": "list", "data": [found]})

    async def model(request: Request) -> Response:
        check_model(services, request.path_params["model_id"])
        return json_response(_model(services, await services.engine.state(), created))

    routes.add_api_route("/v1/models", models, methods=["GET"])
    # Names are paths, or have an owner before a slash.
    routes.add_api_route(
        "/v1/models/{model_id:path}", model, methods=["GET"], openapi_extra=takes()
    )
    return routes


def check_model(services: Services, name: str) -> None:
    """Raise UnknownModel for a model that is not served. It goes by its name in /v1/models, by
    its path, and by "default"; a request that names none ("") takes what there is."""
    config = services.config
    path = services.engine.facts.model
    if name not in ("", _ANY, config.model_name, config.engine.model, path):
        raise UnknownModel(
            f"the model {name[:200]!r} is not served here; this server has {config.model_name!r}",
            field="model",
        )


def _model(services: Services, state: ReplicaState, created: int) -> dict[str, Any]:
    return {
        "id": services.config.model_name,
        "object": "model",
        "created": created,
        "owned_by": "slipstream",
        "root": state.model,
        "parent": None,
        "max_model_len": state.context_length,
    }
