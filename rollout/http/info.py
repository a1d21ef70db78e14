"""What the server is: facts that trainers ask for before they begin, in two dialects at once."""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Response

from engine.protocol import ReplicaState
from rollout.http.errors import json_response
from rollout.http.services import Services


def router(services: Services) -> APIRouter:
    """Information routes; none changes anything."""
    routes = APIRouter()
    engine = services.engine

    async def server_info() -> Response:
        return json_response(_server_info(services, await engine.state()))

    async def model_info() -> Response:
        return json_response(_model_info(services, await engine.state()))

    async def loads() -> Response:
        return json_response(
            {
                "timestamp": time.time(),
                "version": package_version(),
                "loads": [_load(await engine.state())],
            }
        )

    async def package() -> Response:
        return json_response({"version": package_version()})

    for path, handler in {
        "/server_info": server_info,
        "/get_server_info": server_info,
        "/model_info": model_info,
        "/get_model_info": model_info,
        "/v1/loads": loads,
        "/version": package,
    }.items():
        routes.add_api_route(path, handler, methods=["GET"])
    return routes


def package_version() -> str:
    """Version of the installed package; "0" from a source tree that was never installed."""
    try:
        return version("slipstream")
    except PackageNotFoundError:
        return "0"


def _server_info(services: Services, state: ReplicaState) -> dict[str, Any]:
    """Flat keys as SGLang has them, and vLLM's `vllm_config`."""
    config = services.config
    return {
        "model_path": state.model,
        "served_model_name": config.model_name,
        "host": config.host,
        "port": config.port,
        "tp_size": state.tp_size,
        "pp_size": 1,
        "ep_size": 1,
        "dp_size": 1,
        "moe_dp_size": 1,
        "num_gpus": state.tp_size,
        "nnodes": 1,
        "node_rank": 0,
        "base_gpu_id": config.engine.parallel.base_gpu,
        "gpu_id_step": 1,
        "dtype": state.dtype,
        "device": state.device,
        "attention_backend": state.attention,
        "context_length": state.context_length,
        "random_seed": services.generator.seed,
        "disaggregation_mode": "null",
        "disaggregation_bootstrap_port": None,
        "encoder_only": False,
        "enable_memory_saver": config.engine.memory.saver,
        "enable_return_routed_experts": False,
        "max_total_num_tokens": _total_tokens(state),
        "weight_version": services.labels.text(state.version),
        "version": package_version(),
        "internal_states": [_internal_state(services, state)],
        "vllm_config": {
            "weight_transfer_config": {"backend": "nccl"},
            "model_config": {
                "model": state.model,
                "dtype": f"torch.{state.dtype}",
                "max_model_len": state.context_length,
            },
            "parallel_config": {"tensor_parallel_size": state.tp_size},
        },
    }


def _internal_state(services: Services, state: ReplicaState) -> dict[str, Any]:
    return {
        **_load(state),
        "paused": state.paused,
        "pause_mode": state.pause_mode,
        "released": state.released,
        "open_update": state.open_update,
        "refusal": state.refusal,
        "groups": state.groups,
        "weight_version": services.labels.text(state.version),
    }


def _model_info(services: Services, state: ReplicaState) -> dict[str, Any]:
    return {
        "model_path": state.model,
        "served_model_name": services.config.model_name,
        "tokenizer_path": state.model,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": services.labels.text(state.version),
        "load_format": services.config.engine.load_format,
        "disaggregation_mode": "null",
        "has_image_understanding": False,
        "has_audio_understanding": False,
    }


def _load(state: ReplicaState) -> dict[str, Any]:
    used = (state.total_pages - state.free_pages - state.cached_pages) * state.page_size
    total = _total_tokens(state)
    prompt = state.num_prompt_tokens
    return {
        "dp_rank": 0,
        "num_running_reqs": state.num_running,
        "num_waiting_reqs": state.num_waiting,
        "num_used_tokens": used,
        "num_total_tokens": used,
        "max_total_num_tokens": total,
        "max_running_requests": state.max_running,
        "token_usage": used / total if total else 0.0,
        "utilization": state.num_running / state.max_running if state.max_running else 0.0,
        "cache_hit_rate": state.num_cached_tokens / prompt if prompt else 0.0,
        "num_retractions": state.num_retractions,
    }


def _total_tokens(state: ReplicaState) -> int:
    return state.total_pages * state.page_size
