"""Routes that clients call and this engine does not serve: each says so, and what to do.

A path that is unknown answers 404, which some clients take for "not there yet" and call again;
these answer 400 with UnsupportedOption, at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fastapi import Request, Response

from engine.errors import UnsupportedOption
from rollout.http.edge.routes import Routes

_ADAPTERS = "LoRA adapters are not served; publish the merged weights as an update"
_REMOTE = (
    "weights are not written into this engine's memory from afar; send them over a group "
    "(/init_weights_update_group) or through a folder (/update_weights_from_disk)"
)

REFUSED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "/load_lora_adapter": ("POST", _ADAPTERS),
        "/unload_lora_adapter": ("POST", _ADAPTERS),
        "/load_lora_adapter_from_tensors": ("POST", _ADAPTERS),
        "/load_lora_adapter_from_distributed": ("POST", _ADAPTERS),
        "/v1/load_lora_adapter": ("POST", _ADAPTERS),
        "/v1/unload_lora_adapter": ("POST", _ADAPTERS),
        "/skyrl/v1/load_lora_adapter": ("POST", _ADAPTERS),
        "/skyrl/v1/generate": (
            "POST",
            "sampling supports are not returned; generate by /inference/v1/generate, which "
            "returns routed experts too",
        ),
        "/fetch_weights": (
            "POST",
            "deltas are not fetched by this route; bring a folder to a version by /pull_weights",
        ),
        "/start_draft_weight_update": ("POST", "this server has no draft model"),
        "/get_remote_instance_transfer_engine_info": ("GET", _REMOTE),
        "/remote_instance_transfer_engine_info": ("GET", _REMOTE),
        "/parallelism_config": ("GET", _REMOTE),
    }
)
"""Method and reason by path."""


def router() -> Routes:
    """The routes that refuse."""
    routes = Routes()

    async def refuse(request: Request) -> Response:
        path = request.scope["path"]
        raise UnsupportedOption(f"{path} is not served: {REFUSED[path][1]}", field=path)

    for path, (method, _) in REFUSED.items():
        routes.add_api_route(path, refuse, methods=[method])
    return routes
