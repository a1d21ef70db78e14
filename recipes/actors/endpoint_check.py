"""Whether a server can roll out for a run."""

from __future__ import annotations

from engine.errors import InvalidRequest
from engine.protocol import ReplicaState
from recipes.settings.options import RunOptions
from rollout.launch import read_checkpoint


def check_served(options: RunOptions, url: str, state: ReplicaState) -> None:
    """Raise for an endpoint that does not serve the model that is trained, as it is trained."""
    config = read_checkpoint(options.model, options.load_format, options.seed).hf_config
    for what, ours, theirs in (
        ("class", (config.get("architectures") or [""])[0], state.architecture),
        ("vocab_size", config.get("vocab_size", 0), state.vocab_size),
        ("hidden_size", config.get("hidden_size", 0), state.hidden_size),
    ):
        if ours and theirs and ours != theirs:
            raise InvalidRequest(
                f"endpoint: {url} serves a model with {what} {theirs} ({state.model}), and --model "
                f"{options.model} has {ours}; serve the model that is trained",
                field="endpoint",
            )
    if options.dtype not in ("auto", state.dtype.removeprefix("torch.")):
        raise InvalidRequest(
            f"dtype: {url} serves in {state.dtype}, and --dtype says {options.dtype}; start it "
            f"with --dtype {options.dtype}, or leave it out here",
            field="dtype",
        )
    if options.routing.routing_replay and not state.keeps_routes:
        raise InvalidRequest(
            f"routing_replay: {url} keeps no routes; start it with --enable-return-routed-experts",
            field="routing_replay",
        )
    if state.paused:
        raise InvalidRequest(
            f"endpoint: {url} is paused; POST /continue_generation to it first", field="endpoint"
        )
