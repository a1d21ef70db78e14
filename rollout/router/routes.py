"""What kind of route a path is."""

from __future__ import annotations

from enum import Enum


class Kind(Enum):
    """What is done with a request. GENERATE: to one worker, with a journal. SCORE: to one worker;
    whoever it is, the answer is the same. STATEFUL: to the worker that has what it speaks of. ANY:
    to one worker. CONTROL: to all workers. OWN: the router's. PRIVATE: what routers alone ask of
    workers; no client's."""

    GENERATE = "generate"
    SCORE = "score"
    STATEFUL = "stateful"
    ANY = "any"
    CONTROL = "control"
    OWN = "own"
    PRIVATE = "private"


GENERATING = frozenset(
    {
        *("/generate", "/v1/completions", "/v1/chat/completions", "/v1/messages"),
        *("/v1/responses", "/inference/v1/generate"),
    }
)
_SCORING = frozenset(
    {
        *("/classify", "/v1/classify", "/v1/embeddings", "/encode", "/v1/score", "/score"),
        *("/v1/rerank", "/v2/rerank", "/rerank", "/tokenize", "/v1/tokenize", "/detokenize"),
        *("/v1/detokenize", "/v1/messages/count_tokens", "/v1/responses/input_tokens"),
        "/v1/chat/completions/render",
    }
)
CONTROLS = frozenset(
    {
        *("/command", "/init_weights_update_group", "/destroy_weights_update_group"),
        *("/begin_weight_update", "/end_weight_update", "/update_weights_from_distributed"),
        *("/update_weights_from_tensor", "/update_weights_from_disk", "/weights_checker"),
        *("/post_process_weights", "/pull_weights", "/update_weight_version"),
        *("/pause_generation", "/continue_generation", "/abort_request", "/flush_cache"),
        *("/release_memory_occupation", "/resume_memory_occupation"),
        *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine"),
        *("/start_weight_update", "/update_weights", "/finish_weight_update", "/weight_checker"),
        *("/collective_rpc", "/pause", "/resume", "/sleep", "/wake_up", "/reset_prefix_cache"),
        *("/abort_requests", "/start_profile", "/stop_profile", "/get_weights_by_name"),
        *("/load_lora_adapter", "/unload_lora_adapter", "/load_lora_adapter_from_tensors"),
        *("/load_lora_adapter_from_distributed", "/v1/load_lora_adapter"),
        *("/v1/unload_lora_adapter", "/skyrl/v1/load_lora_adapter", "/fetch_weights"),
        "/start_draft_weight_update",
    }
)
STATES = frozenset({"/get_world_size", "/weight_info", "/is_paused", "/is_sleeping"})
"""GET routes whose answer is that of the whole fleet."""

OPEN_PATHS = frozenset({"/health", "/liveness", "/ping"})
"""What takes no key."""

REGISTRATION = frozenset({"/workers", "/add_worker", "/remove_worker", "/list_workers"})
_OWN = OPEN_PATHS | REGISTRATION | {"/ready", "/readiness", "/metrics"}
_PRIVATE = "/internal/"
_STATEFUL = ("/sessions", "/rollouts", "/open_session", "/close_session", "/v1/responses/")


def kind_of(path: str) -> Kind:
    """The kind of a path."""
    if path in GENERATING:
        return Kind.GENERATE
    if path in _SCORING:
        return Kind.SCORE
    if path in _OWN or path.startswith("/workers/"):
        return Kind.OWN
    if path in CONTROLS or path in STATES:
        return Kind.CONTROL
    if path.startswith(_PRIVATE):
        return Kind.PRIVATE
    return Kind.STATEFUL if path.startswith(_STATEFUL) else Kind.ANY


def named_worker(path: str) -> tuple[str, str] | None:
    """(name of a worker, path on it) of "/workers/NAME/ROUTE", where ROUTE is one that is otherwise
    called on all workers; None of any other path. The name is as it was written, in quotes."""
    name, slash, route = path.removeprefix("/workers/").partition("/")
    is_named = path.startswith("/workers/") and bool(name and slash)
    return (name, f"/{route}") if is_named and f"/{route}" in CONTROLS | STATES else None


def steers(path: str) -> bool:
    """Whether a path takes the admin key."""
    return path in CONTROLS | STATES | REGISTRATION or path.startswith("/workers/")
