"""Ranks of the fake executor, whose faults are named by the model, such as "leave 1".

    KIND RANK: the rank does KIND at its first step (or while it is built, or at a command).

Where a rank does not come along, the result of rank 0's step waits until `abort`, as a
collective would. `CheckWeights` returns what a rank was given, in order, as names.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from engine.config import EngineConfig
from engine.errors import EngineDead, NoVersion, OutOfMemory, WeightUpdateError
from engine.protocol import (
    BeginUpdate,
    BesideSteps,
    CheckWeights,
    CommitUpdate,
    EngineCommand,
    MemoryReport,
    Reply,
    StepMasks,
    StepPlan,
    StepResult,
    WeightsReport,
)
from tests.helpers.fake_executor import FakeExecutor, FakeMasked, FakePending

_LONG_S = 120.0


@dataclass(frozen=True)
class WaitingStep:
    """A step of rank 0 that another rank does not join: it ends when it is given up."""

    queued: FakePending | FakeMasked
    released: threading.Event

    def result(self) -> StepResult:
        """Whatever an aborted step leaves."""
        assert self.released.wait(_LONG_S), "nobody freed rank 0"
        return self.queued.result()


class BrokenStep:
    """A launched step that breaks when its result is waited for."""

    def result(self) -> StepResult:
        """Not an error of ours."""
        raise ZeroDivisionError("broke late")


class Unending:
    """A command beside steps that never ends."""

    def done(self) -> bool:
        """Never."""
        return False

    def result(self) -> Reply:
        """Nobody may wait for it."""
        raise AssertionError("it never ends")


class FakeRank(FakeExecutor):
    """One rank. See the module."""

    def __init__(self, config: EngineConfig, rank: int, meeting_place: str) -> None:
        kind, _, which = config.model.partition(" ")
        self._kind, self._which, self._rank = kind, int(which or -1), rank
        self._is_bad = rank == self._which
        self._released = threading.Event()
        self._trace: list[str] = []
        self._build_fault()
        super().__init__(replace(config, model="fake"))
        self._parallel = config.parallel
        self.facts = msgspec.structs.replace(
            self.facts, tp_size=config.parallel.tp_size, dp_size=config.parallel.dp_size
        )

    def _build_fault(self) -> None:
        if self._kind == "crash":
            if self._is_bad:
                os._exit(7)
            time.sleep(0.2)
            raise EngineDead("a rank left", field="ranks")
        if self._kind == "full" and self._is_bad:
            raise OutOfMemory("no room for a KV cache", field="cache.memory_bytes")
        if self._kind == "full" and self._rank == 0:
            raise EngineDead("a rank left", field="ranks")

    def launch(self, plan: StepPlan) -> FakePending | FakeMasked | WaitingStep | BrokenStep:
        """Misbehave, or queue the step. As on a GPU, rank 0 waits for its result only."""
        self._trace.append(f"step {plan.step}")
        if self._kind == "refuse":
            raise NoVersion("the weights are a mixture", field="version")
        if self._kind == "leave" and self._is_bad:
            os._exit(5)
        if self._kind == "stall" and self._is_bad:
            time.sleep(_LONG_S)
        if self._kind == "broken" and self._is_bad:
            raise ZeroDivisionError("not an error of ours")
        queued = super().launch(plan)
        if self._kind == "late" and self._is_bad:
            return BrokenStep()
        # Copies of the model have no collective that would.
        shared = self._parallel.tp_size > 1
        waits = shared and self._rank == 0 and self._kind in ("leave", "stall", "broken")
        return WaitingStep(queued, self._released) if waits else queued

    def mask(self, masks: StepMasks) -> None:
        """Noted."""
        self._trace.append(f"masks {masks.step} {masks.rows.tolist()}")
        super().mask(masks)

    def handle(self, command: EngineCommand) -> Reply:
        """The fake's updates; `CheckWeights` returns the trace."""
        if isinstance(command, CheckWeights):
            names = {f"{at} {what}": 0 for at, what in enumerate(self._trace)}
            memory = MemoryReport(tags={}, used_bytes=self._rank, seconds=0.0)
            return Reply(weights=[WeightsReport(checksums=names)], memory=[memory])
        self._trace.append(str(command.__struct_config__.tag))
        if isinstance(command, CommitUpdate) and self._kind == "uncommitted" and self._is_bad:
            raise WeightUpdateError("a bit fell over", field="w")
        if isinstance(command, BeginUpdate) and self._kind == "mute" and self._is_bad:
            time.sleep(_LONG_S)
        if isinstance(command, BeginUpdate) and self._kind == "begins" and self._is_bad:
            raise WeightUpdateError("cannot begin", field="w")
        return super().handle(command)

    def start(self, command: BesideSteps) -> Any:
        """The fake's; "forms": the rank never ends it, "forms-dies": it leaves in it."""
        if self._kind == "forms-dies" and self._is_bad:
            os._exit(9)
        if self._kind == "forms" and self._is_bad:
            return Unending()
        return super().start(command)

    def cancel(self, reason: str, *, group: str = "") -> None:
        """Noted."""
        self._trace.append(f"cancel {reason} {group}")

    def abort(self) -> None:
        """Free a rank 0 that waits."""
        self._released.set()


def build(config: EngineConfig, *, rank: int = 0, meeting_place: str = "") -> Any:
    """The factory of every rank."""
    return FakeRank(config, rank, meeting_place)
