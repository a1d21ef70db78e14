"""How far a run has come: what a checkpoint keeps beside tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self

from recipes.algorithms.normalise import Moments


@dataclass(kw_only=True)
class RunProgress:
    """Changes as the run goes on.

    step: optimizer steps taken; also the weight version the engine serves.
    position: next problem of the training stream.
    eval_before, accuracy: held-out accuracy before training, and the last one measured.
    accuracy_step: when that was. best_accuracy, best_step: the highest so far, which a
    reward may have below 0.
    figures_before, figures: as `eval_before` and `accuracy`, of all sets (`Evaluation.measure`).
    seconds: time spent by phase since the run began, over all its processes.
    kl_coef: weight of the KL where it is adapted; None before the first step, or where it is fixed.
    reward_moments, return_moments: of the rewards so far, and of the tokens' returns, where those
        are normalised.
    """

    step: int = 0
    position: int = 0
    eval_before: float | None = None
    accuracy: float | None = None
    accuracy_step: int = -1
    best_accuracy: float | None = None
    best_step: int = 0
    figures_before: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    kl_coef: float | None = None
    reward_moments: Moments = field(default_factory=Moments)
    return_moments: Moments = field(default_factory=Moments)

    def measured(self, figures: dict[str, float]) -> None:
        """Note the figures of an evaluation at the current step."""
        accuracy = figures["eval/accuracy"]
        if self.eval_before is None:
            self.eval_before, self.figures_before = accuracy, figures
        self.figures = figures
        self.accuracy, self.accuracy_step = accuracy, self.step
        if self.best_accuracy is None or accuracy > self.best_accuracy:
            self.best_accuracy, self.best_step = accuracy, self.step

    def spent(self, seconds: dict[str, float]) -> None:
        """Add a reading of the ledger."""
        for phase, value in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value

    @property
    def total_seconds(self) -> float:
        """Wall time of the run so far; the phases add up to it."""
        return sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """What `as_dict` gave; an older run may lack some of it."""
        progress = cls(**values)
        for name in ("reward_moments", "return_moments"):
            setattr(progress, name, Moments(**values.get(name, {})))
        return progress
