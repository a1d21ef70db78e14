"""What a leader needs of its ranks; `engine.executor` has the one rank of this process, and
`ranked_executor` several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from engine.protocol import (
    BesideSteps,
    EngineCommand,
    EngineFacts,
    Reply,
    StepMasks,
    StepPlan,
    StepResult,
)
from rollout.replica.weight_queue import PendingReply


class PendingStep(Protocol):
    """A step that was launched."""

    def result(self) -> StepResult:
        """Wait for the step."""
        ...


class StepExecutor(Protocol):
    """Plans and commands, executed in the order given, but for those that run beside steps."""

    facts: EngineFacts

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step to its end."""
        ...

    def launch(self, plan: StepPlan) -> PendingStep:
        """Queue one step; more may be queued before its result is asked for.

        Of a step with `StepPlan.masked` rows the forward pass is queued: its result, and any other
        plan, come after its `mask`. One that is launched in its place gives it up.
        """
        ...

    def mask(self, masks: StepMasks) -> None:
        """Queue the sampling of the step launched last, which waits for it."""
        ...

    def handle(self, command: EngineCommand) -> Reply:
        """Run one command that is no step; raises its typed error."""
        ...

    def start(self, command: BesideSteps) -> PendingReply:
        """Run a command that waits for others beside steps."""
        ...

    def cancel(self, reason: str, *, group: str = "") -> None:
        """Have transfers in progress end early; with `group`, only those that use it."""
        ...

    def receive(self, tensors: Iterable[tuple[str, Any]], *, lasting: bool = False) -> None:
        """Feed the open update from tensors of this process, each read before the next is asked
        for unless all are `lasting`."""
        ...

    def close(self) -> None:
        """Free what the ranks hold."""
        ...
