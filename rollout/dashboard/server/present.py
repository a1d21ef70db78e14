"""The present figures of a server."""

from __future__ import annotations

from engine.protocol import ReplicaState
from rollout.dashboard.figures import Figure
from rollout.dashboard.server.rates import Row


def present(state: ReplicaState, latest: Row, version: str) -> list[Figure]:
    """The figures of a server in this state. latest: the last sample. version: what the weights
    are called."""
    prompt, drafted = state.num_prompt_tokens, state.num_drafted_tokens
    held = state.total_pages - state.free_pages - state.cached_pages
    found = [
        Figure(
            name="version",
            label="Weight version",
            value=version,
            hint="The weights that sample from now on.",
        ),
        Figure(
            name="generated",
            label="Generated",
            value=latest.get("generated"),
            unit="tokens/s",
            hint="Tokens sampled in the last second, of all requests together.",
        ),
        Figure(
            name="running",
            label="Running",
            value=state.num_running,
            unit="requests",
            hint=f"Sequences that are in the batch; {state.max_running} at most.",
        ),
        Figure(
            name="waiting",
            label="Waiting",
            value=state.num_waiting,
            unit="requests",
            hint="Sequences that wait for a place or for KV pages.",
        ),
        Figure(
            name="kv_held",
            label="KV in use",
            value=held / state.total_pages if state.total_pages else None,
            unit="share",
            hint=f"Of {state.total_pages * state.page_size} tokens, those that requests hold.",
        ),
        Figure(
            name="cache_hits",
            label="Prefix cache",
            value=state.num_cached_tokens / prompt if prompt else None,
            unit="share",
            hint="Prompt tokens that were found in the cache, since the engine started.",
        ),
        Figure(
            name="retractions",
            label="Retractions",
            value=state.num_retractions,
            hint="Sequences that had to give their KV pages to others, since the start.",
            tone="warn" if latest.get("retractions") else "plain",
        ),
    ]
    if state.draft_tokens:
        found.append(
            Figure(
                name="accepted",
                label="Drafts accepted",
                value=state.num_accepted_tokens / drafted if drafted else None,
                unit="share",
                hint=f"Drafted tokens that were kept, since the start; drafter {state.drafter}",
            )
        )
    return found
