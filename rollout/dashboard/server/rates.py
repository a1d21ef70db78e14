"""A server's series: what changed between two looks at its engine."""

from __future__ import annotations

from engine.protocol import ReplicaState

Row = dict[str, float | None]


def row(old: ReplicaState | None, new: ReplicaState, seconds: float) -> Row:
    """The columns of one sample. old: the state `seconds` before, None for the first sample and
    across a pause of sampling, which has no rates."""
    held = new.total_pages - new.free_pages - new.cached_pages
    found: Row = {
        "running": float(new.num_running),
        "waiting": float(new.num_waiting),
        "kv_held": _share(held, new.total_pages),
        "kv_cached": _share(new.cached_pages, new.total_pages),
    }
    # An engine that was started again counts from 0.
    if old is None or seconds <= 0 or new.num_steps < old.num_steps:
        return found
    prompt = new.num_prompt_tokens - old.num_prompt_tokens
    cached = new.num_cached_tokens - old.num_cached_tokens
    drafted = new.num_drafted_tokens - old.num_drafted_tokens
    accepted = new.num_accepted_tokens - old.num_accepted_tokens
    return found | {
        "generated": (new.num_output_tokens - old.num_output_tokens) / seconds,
        "prefilled": (prompt - cached) / seconds,
        "steps": (new.num_steps - old.num_steps) / seconds,
        "cache_hits": _share(cached, prompt),
        "accepted": _share(accepted, drafted),
        "retractions": float(new.num_retractions - old.num_retractions),
    }


def _share(part: int, whole: int) -> float | None:
    """Part of a whole; None of nothing."""
    return part / whole if whole else None
