"""How many groups are started ahead of the trainer: what bounds the age of what it learns from.

Nothing is ever discarded for its age, so age is decided when a group starts: a round of B groups
starts if those that are not yet trained are at most B * S. With S = 0 that is a synchronous run.
PipelineRL (arXiv 2509.19128) and AReaL (arXiv 2505.24298) hold back generation likewise.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Pacing:
    """Decides when a round of groups starts and when a batch is trained; a pure function of counts.

    groups_per_step: B, the groups of a round and of a batch. max_staleness: S. resamples: rounds
    more that a step may start because groups without spread were dropped.
    """

    groups_per_step: int
    max_staleness: int
    resamples: int = 0

    def starts_round(self, *, in_flight: int, ready: int, rounds: int) -> bool:
        """Whether another round starts now.

        in_flight: groups that are being sampled or graded. ready: those that wait to be trained.
        rounds: started since the last batch.
        """
        if rounds > self.max_staleness + self.resamples:
            return False
        if in_flight + ready <= self.groups_per_step * self.max_staleness:
            return True
        return in_flight == 0 and ready < self.groups_per_step

    def trains(self, *, in_flight: int, ready: int, rounds: int) -> bool:
        """Whether a batch is trained now: there is one, or nothing more is to come. Without
        staleness nothing may be in flight when the weights change."""
        if in_flight == 0:
            return not self.starts_round(in_flight=0, ready=ready, rounds=rounds)
        return self.max_staleness > 0 and ready >= self.groups_per_step
