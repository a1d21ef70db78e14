"""The ranks of a replica as one executor: rank 0 in this process, each other in its own.

Every rank gets the same plans and commands in the same order, so that their collectives
match. The ranks of one copy of the model sample the same tokens from the same bits, so only the
first of them returns any.
"""

from __future__ import annotations

import importlib
import logging
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
from msgspec.structs import replace

from engine.config import EngineConfig
from engine.errors import (
    EngineDead,
    InternalError,
    InvalidRequest,
    SlipstreamError,
    UnsupportedOption,
    by_name,
)
from engine.protocol import (
    BesideSteps,
    Call,
    CancelTransfers,
    CommitUpdate,
    EngineCommand,
    EngineFacts,
    Reply,
    Shutdown,
    StepMasks,
    StepPlan,
    StepResult,
    encode,
)
from engine.protocol.deadlines import START_S, deadlines, launch_s
from rollout.ranks.board import StepBoard
from rollout.ranks.copies_alike import difference
from rollout.ranks.monitor import RankMonitor
from rollout.ranks.process import RankFiles, RankProcess
from rollout.ranks.replies import RankedReply, merge
from rollout.ranks.step_executor import PendingStep, StepExecutor
from rollout.ranks.step_kinds import StepKinds
from rollout.replica.command_replies import command_name, reply_of

logger = logging.getLogger(__name__)

_LEAVE_S = 8.0
"""For ranks to leave: less than whoever waits for the leader gives it, so that one that is
stopped is ended by the leader."""
_LAST_WORDS_S = 5.0


class RankExecutor(StepExecutor, Protocol):
    """An executor of one rank among several."""

    def abort(self) -> None:
        """Give up on the other ranks: a call that waits for them ends. From any thread."""
        ...


def resolve(factory: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, name = factory.partition(":")
    build: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return build


def build_executor(
    config: EngineConfig,
    factory: str = "engine.executor:build_executor",
    *,
    folder: Path | None = None,
) -> StepExecutor:
    """All ranks of one replica, as `config.parallel` has them.

    factory: "module:function" that builds one rank: `function(config)`, and with several
    ranks `function(config, rank=..., meeting_place=...)`.
    folder: an empty one for the ranks' files, which the caller removes; None makes one.

    Raises the typed error of a rank that could not be built.
    """
    for name in ("tp_size", "dp_size"):
        if getattr(config.parallel, name) < 1:
            raise InvalidRequest("takes at least one rank", field=f"parallel.{name}")
    if config.parallel.num_ranks == 1:
        executor: StepExecutor = resolve(factory)(config)
        return executor
    return RankedExecutor(config, factory, folder=folder)


@dataclass(frozen=True)
class RankedStep:
    """A step that every rank was sent. samplers: ranks whose copies of the model return results of
    their own."""

    plan: StepPlan
    local: PendingStep
    samplers: Sequence[RankProcess]
    monitor: RankMonitor
    timeout_s: float

    def result(self) -> StepResult:
        """Wait for it. Raises EngineDead, naming the rank that is missing."""
        step = self.plan.step
        return self.monitor.guard(f"step {step}", self._wait, timeout_s=self.timeout_s, step=step)

    def _wait(self) -> StepResult:
        own = self.local.result()
        if not self.samplers:
            return own
        further = []
        for rank in self.samplers:
            self.monitor.awaits(rank.name)
            further.append(rank.result(self.plan.step))
        return replace(own, further=further)


class RankedExecutor:
    """Executes plans and commands on every rank. See `build_executor`.

    start_s: deadline for a rank to be built.
    """

    def __init__(
        self,
        config: EngineConfig,
        factory: str = "engine.executor:build_executor",
        *,
        folder: Path | None = None,
        start_s: float = START_S,
    ) -> None:
        self._timeout_s = config.parallel.timeout_s
        self._closed = False
        self._last_call = 0
        self._kinds = StepKinds()
        self._launch_s = launch_s(self._timeout_s)
        files = RankFiles(folder=folder or Path(tempfile.mkdtemp(prefix="slipstream-ranks-")))
        self._remove: Callable[[], Any] | None = None
        if folder is None:
            self._remove = weakref.finalize(self, shutil.rmtree, files.folder, ignore_errors=True)
        files.config.write_bytes(msgspec.json.encode(config))
        self._parallel = config.parallel
        size = config.parallel.num_ranks
        board = StepBoard(files.board, size, create=True)
        self._ranks = [
            RankProcess(rank, config.parallel, files, factory) for rank in range(1, size)
        ]
        self._samplers = [rank for rank in self._ranks if rank.samples]
        self._waits = False
        built = False
        try:
            self._local: RankExecutor = self._build(config, files, factory, start_s)
            built = True
        finally:
            if not built:
                self._end_ranks(0.0)
                if self._remove is not None:
                    self._remove()
        self.facts: EngineFacts = self._local.facts
        self._board = board
        self._monitor = RankMonitor(self._ranks, board, self._local.abort)

    @property
    def failure(self) -> EngineDead | None:
        """What the replica ended with, if it has."""
        return self._monitor.failure

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step to its end."""
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> RankedStep:
        """Queue one step on every rank. Raises EngineDead, naming a rank that is missing."""

        def run() -> PendingStep:
            self._post([plan])
            pending = self._local.launch(plan)
            self._board.note(0, plan.step)
            return pending

        what, kind = f"step {plan.step}", self._kinds.of(plan)
        builds = self.facts.device == "cpu" or self._kinds.is_new(kind)
        self._launch_s = launch_s(self._timeout_s, builds=builds)
        # The launch of another copy's step is part of what its result takes.
        result_s = self._launch_s if builds and self._samplers else self._timeout_s
        pending = self._monitor.guard(what, run, timeout_s=self._launch_s, step=plan.step)
        self._kinds.launched(kind)
        self._waits = len(plan.masked) > 0
        return RankedStep(plan, pending, self._samplers, self._monitor, result_s)

    def mask(self, masks: StepMasks) -> None:
        """Queue the sampling of the step launched last on every rank, behind its plan in each
        rank's stream; it may take as long again as the launch. Raises EngineDead, naming a rank
        that is missing."""

        def run() -> None:
            self._post([masks])
            if self._waits:
                self._local.mask(masks)

        what = f"the masks of step {masks.step}"
        self._monitor.guard(what, run, timeout_s=self._launch_s, step=masks.step)

    def handle(self, command: EngineCommand) -> Reply:
        """Run one command on every rank. The reply's lists have an entry a rank.

        Raises the error of the first rank that failed, with those of the others. A commit
        that only some ranks made ends the replica: it would serve a mixture.
        """
        what = command_name(command)
        times = deadlines(command, collective_s=self._timeout_s)
        replies = self._monitor.guard(
            what, lambda: self._ask(command, what, times.rank), timeout_s=times.monitor
        )
        failed = [reply.error is not None for reply in replies]
        if isinstance(command, CommitUpdate) and any(failed) and not all(failed):
            named = [self._parallel.rank_name(rank) for rank, was in enumerate(failed) if was]
            raise self._monitor.fail(
                EngineDead(
                    f"version {command.version} was committed, but not by {', '.join(named)}: the "
                    "replica would serve a mixture. Start it again",
                    field=named[0],
                )
            )
        self._require_alike(what, replies)
        reply = merge(replies)
        different = difference(reply.weights, self._parallel)
        if different is not None:
            raise self._monitor.fail(different)
        return reply

    def start(self, command: BesideSteps) -> RankedReply:
        """Run one command on every rank, beside steps. Its deadline is its own, apart from that
        of steps; a rank that misses it ends the replica."""
        self._monitor.require_alive()
        call = self._next_call()
        self._post([Call(id=call, command=command)])
        return RankedReply(
            command=command,
            call=call,
            local=self._local.start(command),
            ranks=self._ranks,
            monitor=self._monitor,
            alike=self._require_alike,
            timeout_s=deadlines(command, collective_s=self._timeout_s).monitor,
        )

    def cancel(self, reason: str, *, group: str = "") -> None:
        """Have transfers in progress end early, on every rank."""
        self._post([CancelTransfers(reason=reason, group=group)])
        self._local.cancel(reason, group=group)

    def receive(self, tensors: Iterable[tuple[str, Any]], *, lasting: bool = False) -> None:
        """Refused: tensors of this process do not reach the other ranks."""
        raise UnsupportedOption(
            f"{len(self._ranks) + 1} ranks in as many processes cannot read this process's "
            "tensors; use the transport 'nccl', 'cuda_ipc' or 'disk'",
            field="transport",
        )

    def close(self) -> None:
        """Tell the ranks to leave, end those that do not, and clean up. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._monitor.stop()
        try:
            if self._monitor.failure is None:
                self._post([Shutdown()])
        except EngineDead as error:
            logger.warning("%s", error)
        finally:
            self._local.close()
            self._end_ranks(_LEAVE_S)
            if self._remove is not None:
                self._remove()

    def _build(
        self, config: EngineConfig, files: RankFiles, factory: str, start_s: float
    ) -> RankExecutor:
        """Rank 0, once every other rank is built too."""
        build = resolve(factory)
        # A rank answers first when it can run at all, and then when it is built: by the
        # first, rank 0 knows that somebody will come to the place where it waits.
        for rank in self._ranks:
            rank.reply(start_s, "start")
        try:
            local: RankExecutor = build(config, rank=0, meeting_place=str(files.meeting_place))
        except EngineDead as error:
            raise self._first_cause(error) from error
        built = False
        try:
            merge([Reply(), *(rank.reply(start_s, "build") for rank in self._ranks)])
            built = True
        finally:
            if not built:
                local.close()
        return local

    def _first_cause(self, error: EngineDead) -> SlipstreamError:
        """Why rank 0 was left alone: what another rank died of, not that others miss it."""
        causes: list[SlipstreamError] = []
        for rank in self._ranks:
            try:
                said = rank.reply(_LAST_WORDS_S, "build").error
            except EngineDead as silent:
                causes.append(silent)
                continue
            if said is not None and said.kind != EngineDead.__name__:
                return by_name(said.kind, said.message, said.field)
        return causes[0] if causes else error

    def _ask(self, command: EngineCommand, what: str, timeout_s: float) -> list[Reply]:
        call = self._next_call()
        self._post([Call(id=call, command=command)])
        replies = [reply_of(command, lambda: self._local.handle(command))]
        deadline = time.monotonic() + timeout_s
        for rank in self._ranks:
            left = max(deadline - time.monotonic(), 0.0)
            replies.append(rank.reply(left, what, call))
        return replies

    def _require_alike(self, what: str, replies: Sequence[Reply]) -> None:
        """Raise EngineDead if a mistake of ours met some ranks and not the others: they may not
        be in step any more."""
        broken = [
            reply.error is not None and reply.error.kind == InternalError.__name__
            for reply in replies
        ]
        if any(broken) and not all(broken):
            rank = broken.index(True)
            error = replies[rank].error
            why = error.message if error is not None else ""
            raise self._monitor.fail(
                EngineDead(f"rank {rank} alone broke in {what}: {why}", field=f"rank {rank}")
            )

    def _next_call(self) -> int:
        self._last_call += 1
        return self._last_call

    def _post(self, messages: Sequence[msgspec.Struct]) -> None:
        frame = encode(list(messages))
        for rank in self._ranks:
            rank.post(frame)

    def _end_ranks(self, leave_s: float) -> None:
        deadline = time.monotonic() + leave_s
        for rank in self._ranks:
            rank.close(max(deadline - time.monotonic(), 0.0))
