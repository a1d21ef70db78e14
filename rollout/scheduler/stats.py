"""What the scheduler tells about itself."""

from __future__ import annotations

from dataclasses import dataclass

from engine.protocol import PauseMode


@dataclass(frozen=True, kw_only=True)
class SchedulerStats:
    """Counts now, and totals since the start; memory in pages.

    num_prompt_tokens and num_cached_tokens count a request once, at its first admission.
    """

    version: int
    paused: bool
    pause_mode: PauseMode | None
    num_running: int
    num_waiting: int
    free_pages: int
    cached_pages: int
    total_pages: int
    num_retractions: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_steps: int


@dataclass
class Counters:
    """The totals, as the scheduler keeps them."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_steps: int = 0
