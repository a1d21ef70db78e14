"""What the schedulers of several copies tell, as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.protocol import CopyLoad
from rollout.scheduler.scheduler import Scheduler
from rollout.scheduler.stats import SchedulerStats

_SUMMED = (
    "num_running",
    "num_waiting",
    "free_pages",
    "cached_pages",
    "total_pages",
    "num_retractions",
    "num_prompt_tokens",
    "num_cached_tokens",
    "num_output_tokens",
    "num_verify_steps",
    "num_verified_rows",
    "num_drafted_tokens",
    "num_accepted_tokens",
)


def summed(stats: Sequence[SchedulerStats], *, num_steps: int) -> SchedulerStats:
    """Counts of all copies together; what is no count is that of each. num_steps: of the frames."""
    sums = {name: sum(getattr(each, name) for each in stats) for name in _SUMMED}
    draft_len = max(each.draft_len for each in stats)
    return replace(stats[0], **sums, num_steps=num_steps, draft_len=draft_len)


def running_rids(copies: Sequence[Scheduler]) -> list[str]:
    """Ids of the sequences that run, on any copy."""
    return [one.request.rid for copy in copies for one in copy.running.sequences()]


def loads(copies: Sequence[Scheduler]) -> list[CopyLoad]:
    """What each copy does; empty where there is one, whose counts are those of the replica."""
    if len(copies) == 1:
        return []
    return [
        CopyLoad(**{name: getattr(copy.stats(), name) for name in CopyLoad.__struct_fields__})
        for copy in copies
    ]
