"""How far a supervised run has come: what a checkpoint keeps beside tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class SftProgress:
    """Changes as the run goes on.

    step: optimizer steps taken. position: next example of the stream. before, now: held-out
    figures (`eval/loss`, and `eval/accuracy` where a task is asked) before training, and the last
    ones. measured_at: when those were. seconds: time spent by phase since the run began.
    """

    step: int = 0
    position: int = 0
    before: dict[str, float] = field(default_factory=dict)
    now: dict[str, float] = field(default_factory=dict)
    measured_at: int = -1
    seconds: dict[str, float] = field(default_factory=dict)

    def measured(self, figures: dict[str, float]) -> None:
        """Note held-out figures at the current step."""
        self.before = self.before or figures
        self.now, self.measured_at = figures, self.step

    def spent(self, seconds: dict[str, float]) -> None:
        """Add a reading of the ledger."""
        for phase, value in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value

    @property
    def total_seconds(self) -> float:
        """Wall time of the run so far."""
        return sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `SftProgress(**d)` is the inverse."""
        return dataclasses.asdict(self)
