"""Fields of bodies that are known and do nothing here: one table for every dialect.

A field is served, refused by its name (`UNSERVED`), or taken without effect on purpose
(`WITHOUT_EFFECT`). On routes that generate, a field that nobody knows is refused: a misspelt
`temperature` would otherwise be an answer at another temperature. Bodies of control routes may
have fields that are not listed: clients of one dialect differ in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

Bodies = Literal[
    "native", "openai", "openai stream_options", "responses", "messages", "tokens", "control"
]
"""native: /generate. openai: /v1/completions and chat. responses: /v1/responses. messages:
/v1/messages. tokens: `sampling_params` of /inference/v1/generate. control: every route that does
not generate."""

_NATIVE_HINTS = frozenset(
    {
        "background",
        "conversation_id",
        "custom_labels",
        "data_parallel_rank",
        "external_trace_header",
        "kv_hints",
        "log_metrics",
        "modalities",
        "no_logs",
        "received_time",
        "routed_dp_rank",
        "routing_key",
        "stream_interval",
    }
)

WITHOUT_EFFECT: Mapping[Bodies, frozenset[str]] = MappingProxyType(
    {
        # Hints to routers, logs and schedulers of other servers.
        "native": _NATIVE_HINTS,
        # What clients tell about themselves, and how replies that are never split would be.
        "openai": _NATIVE_HINTS
        | {
            "include_reasoning",
            "metadata",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "separate_reasoning",
            "service_tier",
            "store",
            "stream_reasoning",
            "user",
        },
        "openai stream_options": frozenset({"include_obfuscation"}),
        # What clients tell about themselves; calls of tools that only others have are not limited.
        "responses": frozenset(
            {
                "max_tool_calls",
                "prompt_cache_key",
                "prompt_cache_options",
                "prompt_cache_retention",
                "safety_identifier",
                "service_tier",
                "stream_options",
                "user",
            }
        ),
        "messages": frozenset(
            {
                "cache_control",
                "diagnostics",
                "inference_geo",
                "metadata",
                "service_tier",
                "user_profile_id",
                "workspace_id",
            }
        ),
        # How other engines hold or send a result, not what it is; prime-rl's compact logprobs,
        # which `extra_args` asks for, are an extension that its client does without.
        "tokens": frozenset({"detokenize", "output_kind", "flat_logprobs", "extra_args"}),
        # Every command has a deadline of its own; no session of updates is held; every session of
        # turns appends, which is what it is for SGLang to stream.
        "control": frozenset({"timeout", "session_id", "streaming"}),
    }
)

_NATIVE_UNSERVED = (
    "input_embeds",
    "image_data",
    "video_data",
    "audio_data",
    "session_id",
    "lora_path",
    "lora_id",
    "custom_logit_processor",
    "require_reasoning",
    "max_thinking_tokens",
    "return_hidden_states",
    "return_indexer_topk",
    "return_sampling_mask",
    "return_bytes",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "stop_regex",
    "beam_width",
    "custom_params",
    "watermark",
)

_OPENAI_UNSERVED = (
    "add_special_tokens",
    "audio",
    "bad_words",
    "continue_final_message",
    "documents",
    "draft_tokens",
    "early_stopping",
    "echo",
    "forced_acceptance",
    "functions",
    "grammar",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "hold_at",
    "kv_transfer_params",
    "logits_processors",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "moderation",
    "output_ids",
    "prediction",
    "prompt_embeds",
    "reasoning_effort",
    "repetition_detection",
    "return_meta_info",
    "routed_experts_dtype",
    "routed_experts_start_len",
    "session",
    "session_at",
    "session_params",
    "suffix",
    "thinking_token_budget",
    "token_ids_logprob",
    "truncate_prompt_tokens",
    "use_beam_search",
    "vllm_xargs",
    "web_search_options",
)

_RESPONSES_UNSERVED = (
    "access_programs",
    "background",
    "background_options",
    "context_management",
    "conversation",
    "image",
    "moderation",
    "prompt",
)

_MESSAGES_UNSERVED = (
    "compaction",
    "container",
    "context_management",
    "fallbacks",
    "mcp_servers",
    "prefill",
    "thread",
)

UNSERVED: Mapping[Bodies, Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "native": dict.fromkeys(_NATIVE_UNSERVED, ()),
        "openai": {
            **dict.fromkeys((n for n in _NATIVE_UNSERVED if n not in _NATIVE_HINTS), ()),
            **dict.fromkeys(_OPENAI_UNSERVED, ()),
            "best_of": (1,),
            "function_call": ("none", "auto"),
            "length_penalty": (1,),
            "modalities": (["text"],),
            "parallel_tool_calls": (True,),
            "truncation_side": ("left", "right"),
            "verbosity": ("medium",),
        },
        "openai stream_options": {"continuous_usage_stats": ()},
        "responses": {
            **dict.fromkeys(_RESPONSES_UNSERVED, ()),
            "truncation": ("disabled",),
        },
        "messages": {
            **dict.fromkeys(_MESSAGES_UNSERVED, ()),
            "speed": ("standard",),
        },
        "control": dict.fromkeys(("profile_by_stage", "profile_stages", "merge_profiles"), ()),
    }
)
"""Fields that would change the answer and that this engine does not have, with the values that
ask for what is served; null, false, 0 and what is empty ask for nothing."""
