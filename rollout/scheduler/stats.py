"""What the scheduler tells about itself."""

from __future__ import annotations

from dataclasses import dataclass

from engine.protocol import PauseMode


@dataclass(frozen=True, kw_only=True)
class SchedulerStats:
    """Counts now, and totals since the start; memory in pages.

    num_prompt_tokens and num_cached_tokens count a request once, at its first admission.
    num_verify_steps: steps that verified drafts; num_verified_rows: their rows with drafts, so
    that a step of two such rows counts twice; num_accepted_tokens: of num_drafted_tokens, each row
    having got one token more. draft_len: most drafts of a row in the last step of decode rows.
    drafter and what follows: `SpeculativeConfig.facts`.
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
    num_verify_steps: int
    num_verified_rows: int
    num_drafted_tokens: int
    num_accepted_tokens: int
    draft_len: int
    drafter: str
    draft_tokens: int
    forces_acceptance: bool


@dataclass
class Counters:
    """The totals, as the scheduler keeps them."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_steps: int = 0
    num_verify_steps: int = 0
    num_verified_rows: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0

    def count(self, num_tokens: int, spec: tuple[int, int, int]) -> None:
        """Take in the result of a step. spec: as in `Appended`."""
        rows, drafted, accepted = spec
        self.num_output_tokens += num_tokens
        self.num_verify_steps += rows > 0
        self.num_verified_rows += rows
        self.num_drafted_tokens += drafted
        self.num_accepted_tokens += accepted
