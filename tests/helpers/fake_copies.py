"""The fake executor once for each copy of the model, in this process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from engine.config import EngineConfig
from engine.protocol import BesideSteps, EngineCommand, Reply, StepMasks, StepPlan, StepResult
from rollout.ranks.replies import merge
from rollout.ranks.step_executor import PendingStep
from tests.helpers.fake_executor import Answered, FakeExecutor


@dataclass(frozen=True)
class CopiesStep:
    """A step of all copies."""

    pending: list[PendingStep]

    def result(self) -> StepResult:
        """As ranks merge them."""
        first, *further = [each.result() for each in self.pending]
        return replace(first, further=further)


class FakeCopies:
    """A `StepExecutor`: each copy takes its own plan out of the frame."""

    def __init__(self, config: EngineConfig) -> None:
        self._copies = [FakeExecutor(config) for _ in range(config.parallel.dp_size)]
        self.facts = replace(
            self._copies[0].facts,
            dp_size=config.parallel.dp_size,
            tp_size=config.parallel.tp_size,
        )
        self._masked: list[int] = []

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step to its end."""
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> CopiesStep:
        """Queue one step."""
        plans = plan.copies()
        self._masked = [copy for copy, own in enumerate(plans) if len(own.masked)]
        pairs = zip(self._copies, plans, strict=True)
        return CopiesStep([copy.launch(own) for copy, own in pairs])

    def mask(self, masks: StepMasks) -> None:
        """Hand on the masks of the copies that wait."""
        own = [masks, *masks.further]
        for copy in self._masked:
            self._copies[copy].mask(own[copy])

    def handle(self, command: EngineCommand) -> Reply:
        """Run a command on every copy."""
        return merge([copy.handle(command) for copy in self._copies])

    def start(self, command: BesideSteps) -> Answered:
        """Run it at once."""
        try:
            return Answered(self.handle(command))
        except Exception as error:
            return Answered(error)

    def cancel(self, reason: str, *, group: str = "") -> None:
        """Nothing runs beside anything here."""

    def receive(self, tensors: Iterable[tuple[str, Any]], *, lasting: bool = False) -> None:
        """Feed every copy."""
        named = list(tensors)
        for copy in self._copies:
            copy.receive(named, lasting=lasting)

    def close(self) -> None:
        """Close every copy."""
        for copy in self._copies:
            copy.close()
