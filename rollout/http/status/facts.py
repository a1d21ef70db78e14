"""What the server is and does, in the words of two dialects: SGLang's flat server arguments and
vLLM's nested configuration.

Clients read these before they begin, some by subscript and some in an assertion, so a key that
one of them looks for is here also where this engine has only one answer. Who reads what is in
`tests/rollout/http/transcripts/` and `docs/external_trainers.md`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from engine.config import EngineConfig, SpeculativeConfig
from engine.protocol import ReplicaState
from rollout.http.services import Services

UNLIMITED = -1
"""What vLLM calls the absence of a limit on `logprobs`."""


def package_version() -> str:
    """Version of the installed package; "0" from a source tree that was never installed."""
    try:
        return version("slipstream")
    except PackageNotFoundError:
        return "0"


def server_info(services: Services, state: ReplicaState) -> dict[str, Any]:
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
        "dp_size": state.dp_size,
        "moe_dp_size": 1,
        "num_gpus": state.num_ranks,
        "nnodes": 1,
        "node_rank": 0,
        "base_gpu_id": config.engine.parallel.base_gpu,
        "gpu_id_step": 1,
        "dtype": state.dtype,
        "quantization": _quantization(config.engine),
        "kv_cache_dtype": config.engine.cache.kv_dtype,
        "device": state.device,
        "attention_backend": state.attention,
        "collectives": state.collectives,
        "context_length": state.context_length,
        "random_seed": services.generator.seed,
        "disaggregation_mode": "null",
        "disaggregation_bootstrap_port": None,
        "load_balance_method": "round_robin",
        "prefill_round_robin_balance": False,
        "encoder_only": False,
        "enable_memory_saver": config.engine.memory.saver,
        "enable_return_routed_experts": config.engine.return_routed_experts,
        **_speculative(services.config.engine.speculative),
        "max_total_num_tokens": _total_tokens(state),
        "weight_version": services.labels.text(state.version),
        "version": package_version(),
        "internal_states": [_internal_state(services, state)],
        "vllm_config": vllm_config(services, state),
    }


def vllm_config(services: Services, state: ReplicaState) -> dict[str, Any]:
    """The parts of vLLM's resolved `VllmConfig` that clients read.

    logprobs_mode: what vLLM calls logprobs after penalties and temperature, which is what is
    returned here; top-k and top-p are left out of them (`docs/numerics.md`). world_size: ranks of
    one replica, without data parallelism. lora_config: None says that no adapter can be loaded.
    """
    return {
        "weight_transfer_config": {"backend": "nccl"},
        "model_config": {
            "model": state.model,
            "served_model_name": services.config.model_name,
            "dtype": f"torch.{state.dtype}",
            "quantization": _quantization(services.config.engine),
            "max_model_len": state.context_length,
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": UNLIMITED,
        },
        "parallel_config": {
            "tensor_parallel_size": state.tp_size,
            "pipeline_parallel_size": 1,
            "data_parallel_size": state.dp_size,
            "world_size": state.tp_size,
        },
        "scheduler_config": {"max_num_seqs": state.max_running},
        "cache_config": {
            "block_size": state.page_size,
            "num_gpu_blocks": state.total_pages,
            "cache_dtype": services.config.engine.cache.kv_dtype,
            "enable_prefix_caching": services.config.engine.cache.prefix_cache,
        },
        "lora_config": None,
        "speculative_config": _speculative_config(services.config.engine.speculative),
    }


def _quantization(config: EngineConfig) -> str | None:
    return None if config.quantization == "none" else config.quantization


def _speculative(config: SpeculativeConfig) -> dict[str, Any]:
    """SGLang's arguments of a server that drafts; its number counts the token behind the drafts."""
    return {
        "speculative_algorithm": config.drafter.upper() or None,
        "speculative_num_draft_tokens": config.draft_tokens + 1 if config.enabled else None,
    }


def _speculative_config(config: SpeculativeConfig) -> dict[str, Any] | None:
    """vLLM's, of a server that drafts."""
    if not config.enabled:
        return None
    return {"method": config.drafter, "num_speculative_tokens": config.draft_tokens}


def model_info(services: Services, state: ReplicaState) -> dict[str, Any]:
    """SGLang's `/model_info`."""
    return {
        "model_path": state.model,
        "served_model_name": services.config.model_name,
        "tokenizer_path": state.model,
        "is_generation": state.num_labels == 0,
        "preferred_sampling_params": None,
        "weight_version": services.labels.text(state.version),
        "load_format": services.config.engine.load_format,
        "disaggregation_mode": "null",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": state.model_type,
        "architectures": [state.architecture],
    }


def load(state: ReplicaState) -> dict[str, Any]:
    """One entry of SGLang's `/v1/loads`: of all copies of the model, which are one place to send
    requests to."""
    used = _used_tokens(state)
    total = _total_tokens(state)
    prompt = state.num_prompt_tokens
    return {
        "dp_rank": 0,
        "num_running_reqs": state.num_running,
        "num_waiting_reqs": state.num_waiting,
        "num_total_reqs": state.num_running + state.num_waiting,
        "num_used_tokens": used,
        "num_total_tokens": used,
        "max_total_num_tokens": total,
        "max_running_requests": state.max_running,
        "token_usage": _kv_usage(state),
        "utilization": state.num_running / state.max_running if state.max_running else 0.0,
        "cache_hit_rate": state.num_cached_tokens / prompt if prompt else 0.0,
        "num_retractions": state.num_retractions,
    }


def loads_total(state: ReplicaState) -> dict[str, Any]:
    """The sums over replicas that SGLang's `/v1/loads` gives; there is one."""
    return {
        "total_running_reqs": state.num_running,
        "total_waiting_reqs": state.num_waiting,
        "total_reqs": state.num_running + state.num_waiting,
    }


def _kv_usage(state: ReplicaState) -> float:
    """Share of the KV pool that requests hold; cached prefixes of nobody are free."""
    total = _total_tokens(state)
    return _used_tokens(state) / total if total else 0.0


def _internal_state(services: Services, state: ReplicaState) -> dict[str, Any]:
    return {
        **load(state),
        "paused": state.paused,
        "pause_mode": state.pause_mode,
        "released": state.released,
        "open_update": state.open_update,
        "refusal": state.refusal,
        "groups": state.groups,
        "weight_version": services.labels.text(state.version),
    }


def _used_tokens(state: ReplicaState) -> int:
    return (state.total_pages - state.free_pages - state.cached_pages) * state.page_size


def _total_tokens(state: ReplicaState) -> int:
    return state.total_pages * state.page_size
