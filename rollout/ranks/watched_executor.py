"""A leader's ranks, with a note on its pulse of whatever they are asked to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.protocol import BesideSteps, EngineCommand, Reply, StepMasks, StepPlan, StepResult
from engine.protocol.deadlines import COLLECTIVE_S, deadlines, watch_s
from rollout.ranks.step_executor import PendingStep, StepExecutor
from rollout.ranks.step_kinds import StepKinds
from rollout.replica.pulse import Activity, Pulse
from rollout.replica.weight_queue import PendingReply


class WatchedStep:
    """A launched step."""

    def __init__(self, step: PendingStep, pulse: Pulse, limit_s: float) -> None:
        self._step = step
        self._pulse = pulse
        self._limit_s = limit_s

    def result(self) -> StepResult:
        """Wait for the step."""
        self._pulse.begin(Activity.STEP, self._limit_s)
        return self._step.result()


class WatchedExecutor:
    """See the module; a `StepExecutor`. collective_s: of the replica's configuration."""

    def __init__(
        self, executor: StepExecutor, pulse: Pulse, *, collective_s: float = COLLECTIVE_S
    ) -> None:
        self.facts = executor.facts
        self._executor = executor
        self._pulse = pulse
        self._collective_s = collective_s
        self._kinds = StepKinds()
        self._stepping = Activity.STEP, watch_s(collective_s, builds=False)
        self._building = Activity.BUILD, watch_s(collective_s, builds=True)
        self._launching = self._building
        # There the whole step runs in its launch, and takes as long as the model is large.
        self._always_new = executor.facts.device == "cpu"

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step to its end."""
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> WatchedStep:
        """Queue one step."""
        kind = None if self._always_new else self._kinds.of(plan)
        builds = kind is None or self._kinds.is_new(kind)
        self._launching = self._building if builds else self._stepping
        self._pulse.begin(*self._launching)
        pending = self._executor.launch(plan)
        if kind is not None:
            self._kinds.launched(kind)
        # The launch of another copy's step is part of what its result takes.
        _, limit_s = self._launching if self.facts.dp_size > 1 else self._stepping
        return WatchedStep(pending, self._pulse, limit_s)

    def mask(self, masks: StepMasks) -> None:
        """Queue the sampling of the step launched last, which may take as long again as its launch.
        What was spent waiting for the masks counts for neither."""
        self._pulse.begin(*self._launching)
        self._executor.mask(masks)

    def handle(self, command: EngineCommand) -> Reply:
        """Run one command that is no step."""
        limit_s = deadlines(command, collective_s=self._collective_s).leader
        self._pulse.begin(Activity.COMMAND, limit_s)
        return self._executor.handle(command)

    def start(self, command: BesideSteps) -> PendingReply:
        """Run a command beside steps."""
        return self._executor.start(command)

    def cancel(self, reason: str, *, group: str = "") -> None:
        """Have transfers in progress end early."""
        self._executor.cancel(reason, group=group)

    def receive(self, tensors: Iterable[tuple[str, Any]], *, lasting: bool = False) -> None:
        """Feed the open update."""
        self._executor.receive(tensors, lasting=lasting)

    def close(self) -> None:
        """Free what the ranks hold."""
        self._executor.close()
