"""What weight and memory commands come to: checks before them, and what follows for requests.

The leader takes the commands in; `weight_queue` says which run between steps and which beside
them; `scheduler.readiness` remembers what they did.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from msgspec.structs import replace

from engine.errors import NO_SAVER, InvalidRequest, SlipstreamError, UnsupportedOption, UpdateOrder
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    BesideSteps,
    CheckWeights,
    Command,
    CommitUpdate,
    GetWeight,
    GroupCommand,
    JoinGroup,
    LeaveGroup,
    PrepareUpdate,
    ReleaseMemory,
    Reply,
    RequestOutput,
    ResumeMemory,
    SetVersion,
    StagingMode,
    StartProfile,
    StopProfile,
    WeightCommand,
)
from engine.protocol.types import MAX_VERSION
from rollout.ranks.step_executor import StepExecutor
from rollout.replica.weight_queue import PendingReply, WeightQueue
from rollout.scheduler.copies.schedulers import ReplicaScheduler
from rollout.scheduler.readiness import ALL_TAGS, Readiness

_NEED_NO_WEIGHTS = (
    JoinGroup,
    LeaveGroup,
    AbortUpdate,
    SetVersion,
    ReleaseMemory,
    ResumeMemory,
    StartProfile,
    StopProfile,
)


class WeightCommands:
    """Runs the leader's `EngineCommand`s and `SetVersion`, in order.

    queue: takes them in. drain: waits for the steps in flight, and for what
    is to be read of pages. emit: takes outputs of requests
    that a command ended.
    """

    def __init__(
        self,
        executor: StepExecutor,
        scheduler: ReplicaScheduler,
        readiness: Readiness,
        *,
        drain: Callable[[], None],
        emit: Callable[[list[RequestOutput]], None],
    ) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._readiness = readiness
        self._drain = drain
        self._emit = emit
        self.queue = WeightQueue(
            executor,
            check=self._check,
            run=self._between_steps,
            ended=self._ended,
            ends=readiness.is_open_for,
        )

    def _between_steps(self, command: Command) -> Reply:
        """Run a weight command that is not beside steps."""
        self._drain()
        self._check(command)
        match command:
            case SetVersion():
                self._set_version(command.version)
                return Reply()
            case ReleaseMemory():
                return self._release(command)
            case ResumeMemory():
                return self._resume(command)
            case CheckWeights(action="reset_tensors"):
                return self._reset(command)
            case CheckWeights() | GetWeight() | StartProfile() | StopProfile():
                return self._executor.handle(command)
        assert isinstance(command, WeightCommand), command
        return self._update(command)

    def _check(self, command: Command) -> None:
        """Raise if a weight command may not come now."""
        if isinstance(command, SetVersion | BeginUpdate) and command.version > MAX_VERSION:
            raise InvalidRequest(f"version {command.version} is above 2**53", field="version")
        if not isinstance(command, _NEED_NO_WEIGHTS):
            self._readiness.check_weights(type(command).__name__)
        if isinstance(command, BeginUpdate):
            self._readiness.check_begin(command, self._scheduler.version)

    def _update(self, command: WeightCommand) -> Reply:
        """Open, verify, commit or abort the update, and what follows for requests."""
        ready = self._readiness
        try:
            reply = self._executor.handle(command)
        except Exception:
            if isinstance(command, PrepareUpdate | CommitUpdate):
                self._undo()
            raise
        match command:
            case BeginUpdate():
                # "auto" was decided by the ranks, who know what memory there is.
                mode: StagingMode = "undo" if reply.undo else "in_place"
                ready.begun(replace(command, mode=mode) if reply.in_place else command)
            case AbortUpdate():
                ready.aborted()
            case PrepareUpdate():
                ready.prepared()
            case CommitUpdate() if ready.committed(command.version, reply.refusal):
                self._emit(self._scheduler.set_version(command.version))
        return reply

    def _ended(self, command: BesideSteps, pending: PendingReply) -> Reply:
        """Take in what a command came to that ran beside steps."""
        try:
            reply = pending.result()
        except Exception:
            if not isinstance(command, GroupCommand):
                self._undo()
            raise
        if isinstance(command, JoinGroup):
            self._readiness.joined(command.name)
        elif isinstance(command, LeaveGroup):
            self._readiness.left(command.name)
        return reply

    def _reset(self, command: CheckWeights) -> Reply:
        self._readiness.check_reset()
        reply = self._executor.handle(command)
        self._readiness.died(reply.refusal)
        with contextlib.suppress(SlipstreamError):
            # Prefixes that sequences hold go with the update that has to follow.
            self._scheduler.flush_cache()
        return reply

    def _undo(self) -> None:
        """A transfer or commit failed: where requests wait for it, the update is over, and every
        rank puts the old version back, or refuses to step."""
        if self._readiness.written is not None:
            self.queue.abandon(self._readiness.written)

    def _set_version(self, version: int) -> None:
        serving = self._scheduler.version
        if version < serving:
            raise UpdateOrder(
                f"version {version} goes back: {serving} serves now; give {serving} or more",
                field="version",
            )
        self._emit(self._scheduler.set_version(version))

    def _release(self, command: ReleaseMemory) -> Reply:
        tags = command.tags or ALL_TAGS
        if command.pause is not None and not self._executor.facts.releases:
            raise UnsupportedOption(NO_SAVER, field="memory.saver")
        if self._readiness.late_undo is not None:
            # It would put back what is gone by then.
            self.queue.abandon(self._readiness.late_undo)
        self._readiness.check_release(tags, self._scheduler.stats(), pause=command.pause)
        if command.pause is not None:
            self._emit(self._scheduler.pause(command.pause))
            # Routes of requests that it ended or sent back are in the pages still.
            self._drain()
        if "kv_cache" in tags:
            self._scheduler.flush_cache()
        reply = self._executor.handle(command)
        self._readiness.release(tags)
        return reply

    def _resume(self, command: ResumeMemory) -> Reply:
        reply = self._executor.handle(command)
        self._readiness.resume(command.tags or ALL_TAGS)
        return reply
