"""The leader: one scheduler and one executor, driven a step at a time.

Every replica, inline or spawned, runs this class; commands reach it in one order, and
none of them falls inside a step.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

from engine.config import EngineConfig
from engine.errors import (
    EngineDead,
    InternalError,
    NoVersion,
    SlipstreamError,
    WeightUpdateError,
    of_command,
)
from engine.protocol import (
    Abort,
    AbortUpdate,
    BeginUpdate,
    Command,
    CommitUpdate,
    EngineCommand,
    FlushCache,
    GetState,
    Pause,
    ReplicaState,
    Reply,
    Request,
    RequestOutput,
    Resume,
    RolloutCommand,
    SessionCommand,
    SetVersion,
    Shutdown,
    StepMasks,
    StepPlan,
    StepResult,
    Stop,
    UpdateReport,
)
from rollout.masks.base import MaskSource
from rollout.masks.masked_step import MaskedStep
from rollout.masks.sources import mask_gate
from rollout.ranks.device_errors import breaks_device
from rollout.ranks.step_executor import PendingStep, StepExecutor
from rollout.replica.command_replies import error_info
from rollout.replica.weight_commands import WeightCommands
from rollout.replica.weight_queue import Ticket
from rollout.requests.outputs import refused
from rollout.scheduler.copies.schedulers import build_scheduler
from rollout.scheduler.copies.sums import loads, running_rids
from rollout.scheduler.emit import StepOutput
from rollout.scheduler.readiness import Readiness
from rollout.sessions.turns_in_progress import SessionTurns

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_EMPTY_PLANS = 1000
_MAX_FAILURES = 3
"""Steps in a row that may fail by a mistake of ours before the engine gives up."""
_BESIDE_STEPS = GetState | Abort | Stop | SessionCommand | RolloutCommand
"""Commands that leave steps in flight alone: at most they mark rows, whose results are dropped."""
_FACTS = (
    "page_size context_length vocab_size eos_ids model architecture model_type num_labels labels "
    "hidden_size dtype device attention tp_size dp_size releases collectives experts keeps_routes"
)
_POLL_S = 0.00005
_LONGEST_POLL_S = 0.001


class Leader:
    """Takes requests and commands, steps, and returns outputs.

    With `overlap`, a step is planned and launched before the result of the one before it is
    asked for, so the ranks never wait for the host; outputs come one step later and are the
    same. Without it every step is planned, run and applied in turn: the reference. A control
    command that could matter to a step finds none in flight either way; see `weight_queue` for
    those that run beside steps, and `masked_step` for steps with masked rows."""

    def __init__(
        self,
        config: EngineConfig,
        executor: StepExecutor,
        mask_sources: Sequence[MaskSource] = (),
        clock: Callable[[], float] = time.monotonic,
        loads_grammars: bool = False,
    ) -> None:
        """mask_sources: beside those that requests bring. clock: of sessions that are idle.
        loads_grammars: as `mask_gate` has it."""
        facts = executor.facts
        gate = mask_gate(config, facts, mask_sources, loads_grammars=loads_grammars)
        self._config = config
        self._executor = executor
        self._scheduler = build_scheduler(config, facts, gate.prepared)
        self._readiness = Readiness(
            version=config.weight_version,
            keeps_weights=config.memory.cpu_backup,
            no_version=config.refusal,
        )
        self._weights = WeightCommands(
            executor, self._scheduler, self._readiness, drain=self._drain, emit=self._emit
        ).queue
        self._masked = MaskedStep(
            self._scheduler,
            gate=gate,
            send=self._send_masks,
            emit=self._emit,
            max_rows=config.scheduler.max_running,
        )
        self._sessions = SessionTurns(
            self._scheduler, config.sessions, facts.context_length, emit=self._emit, clock=clock
        )
        self._checks_integrity = config.scheduler.check_integrity
        overlap = config.scheduler.overlap
        self._overlap = facts.device == "cuda" if overlap is None else overlap
        self._in_flight: deque[tuple[StepPlan, PendingStep]] = deque()
        self._outputs: list[StepOutput] = []
        self._num_empty_plans = 0
        self._num_failures = 0
        self.idle_s = 0.0
        self.running_rids = partial(running_rids, self._scheduler.copies)

    def submit(self, requests: Sequence[Request], *, decoded: bool = False) -> None:
        """Queue requests; one that is refused comes back from `step` as an abort. decoded: as in
        `Scheduler.add`."""
        add = partial(self._scheduler.add, decoded=decoded)
        for request in requests:
            try:
                if self._readiness.no_version:
                    raise NoVersion(self._readiness.no_version, field="version")
                answer = self._sessions.admit(request, add)
                self._outputs += [] if answer is None else [answer]
            except SlipstreamError as error:
                self._outputs.append(refused(request, error))
            except Exception as error:
                # A boundary: what is wrong with one request is its own.
                logger.exception("request %s", request.rid)
                self._outputs.append(refused(request, of_command("request", error)))

    def handle(self, command: Command) -> Reply:
        """Run one control command to its end; raises the typed error of one that failed.

        Whatever goes wrong in it is typed: see `engine.errors.of_command`.
        """
        ticket, pause_s = self.start(command), _POLL_S
        while not ticket.done():
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_POLL_S)
            self.poll()
        return ticket.result()

    def start(self, command: Command) -> Ticket:
        """Take in one control command. Most have ended when this returns; those that wait for
        others, and weight commands behind such, end in a later `poll` or `step`."""
        ticket = Ticket(command)
        if isinstance(command, EngineCommand | SetVersion):
            self._weights.start(ticket)
        else:
            ticket.settle(lambda: self._handle(command))
        return ticket

    def poll(self) -> None:
        """Take in commands that ended beside steps, and start what waited for them."""
        self._weights.poll()

    def busy(self) -> bool:
        """Whether a command is in progress beside steps, so that `poll` is worth a look."""
        return self._weights.busy

    def _handle(self, command: Command) -> Reply:
        if not isinstance(command, _BESIDE_STEPS):
            self._drain()
        match command:
            case Abort():
                self._outputs += self._scheduler.abort(
                    command.rid_prefix,
                    command.all,
                    command.message,
                    rid=command.rid,
                    rids=command.rids,
                )
            case Stop():
                self._outputs += self._sessions.stop(command)
            case Pause():
                self._outputs += self._scheduler.pause(command.mode)
            case Resume():
                self._scheduler.resume()
            case FlushCache():
                self._scheduler.flush_cache()
            case GetState():
                return Reply(state=self.state())
            case _ if isinstance(command, SessionCommand | RolloutCommand):
                return self._sessions.handle(command)
            case _:
                assert isinstance(command, Shutdown), command
        return Reply()

    def step(self) -> list[StepOutput]:
        """Run at most one step; every output since the last call, those of commands too."""
        if self._readiness.late_undo is not None:
            self._weights.abandon(self._readiness.late_undo)
        self.poll()
        if self._masked.waits and not self._masked.look():
            return self._take_outputs()
        plan = self._plan(held=bool(self._readiness.hold))
        if plan is not None or self._in_flight:
            self._num_empty_plans = 0
            self._advance(plan)
        elif self._may_plan() and self._scheduler.preparing:
            time.sleep(_LONGEST_POLL_S)
        elif self._may_plan():
            self._num_empty_plans += 1
            if self._num_empty_plans >= _MAX_EMPTY_PLANS:
                self._num_empty_plans = 0
                self._recover(AssertionError("work waits but nothing is planned"), "planning")
        return self._take_outputs()

    def can_step(self) -> bool:
        """Whether `step` would do something: outputs wait, or work does and may run."""
        return bool(self._outputs or self._in_flight) or self._may_plan()

    def idle(self) -> bool:
        """Whether nothing runs, waits or has yet to be returned."""
        return not (self._outputs or self._in_flight or self._scheduler.has_work())

    def state(self) -> ReplicaState:
        """What the replica is and does right now."""
        return ReplicaState(
            **asdict(self._scheduler.stats()),
            **self._sessions.facts,
            **_said(self._readiness, "released open_update refusal groups"),
            **_said(self._executor.facts, _FACTS),
            **_said(self._config.scheduler, "max_waiting max_samples"),
            max_running=self._config.scheduler.max_running * self._config.parallel.dp_size,
            receiving=self._weights.in_progress,
            idle_s=self.idle_s,
            copies=loads(self._scheduler.copies),
        )

    def update_weights_inproc(
        self, begin: BeginUpdate, tensors: Iterable[tuple[str, Any]], *, lasting: bool = False
    ) -> UpdateReport:
        """One whole update from tensors of this process: begin, receive, commit.

        lasting: the tensors stay as they are until this returns, and none is copied before the
        commit. Else each is read before the next is asked for, so a source may gather them one
        by one into the same memory.

        Whatever goes wrong in between, also in `tensors` itself, aborts the update, and
        the error is raised on.
        """
        self.handle(begin)
        committed = False
        try:
            self._executor.receive(tensors, lasting=lasting)
            reply = self.handle(CommitUpdate(version=begin.version, owner=begin.owner))
            committed = True
        finally:
            if not committed:
                self._weights.abandon(AbortUpdate(version=begin.version, owner=begin.owner))
        assert reply.report is not None, "a commit must report what it moved"
        return reply.report

    def close(self) -> None:
        """Free the executor."""
        self._weights.close()
        self._masked.close()
        self._executor.close()

    def _may_plan(self) -> bool:
        held = bool(self._readiness.hold) or self._scheduler.paused
        return self._scheduler.wants_reads or (not held and self._scheduler.has_work())

    def _plan(self, *, held: bool) -> StepPlan | None:
        """The next step; one that computes nothing where steps are `held` back."""
        try:
            return self._scheduler.plan_reads() if held else self._scheduler.plan()
        except Exception as error:
            # A boundary. No rank has seen the plan, so whatever broke is the scheduler's.
            self._recover(error, "planning")
            return None

    def _advance(self, plan: StepPlan | None) -> None:
        """Launch the plan, if any, and take in the results that are due."""
        masked = plan is not None and plan.waits
        if plan is not None and (self._overlap or masked):
            pending = self._guarded(plan, lambda: self._executor.launch(plan))
            if pending is not None:
                self._in_flight.append((plan, pending))
        elif plan is not None:
            self._apply(self._guarded(plan, lambda: self._executor.execute(plan)))
        while len(self._in_flight) > (0 if plan is None else 1):
            self._collect()
        if plan is not None and masked and self._in_flight:
            self._guarded(plan, lambda: self._masked.ask(plan))
            if self._masked.waits:
                self._masked.look()
        if self._checks_integrity and not (self._in_flight or self._scheduler.has_work()):
            self._scheduler.check_integrity()

    def _collect(self) -> None:
        plan, pending = self._in_flight.popleft()
        self._apply(self._guarded(plan, pending.result))

    def _send_masks(self, plan: StepPlan, masks: StepMasks) -> None:
        self._guarded(plan, lambda: self._executor.mask(masks))
        if not self._overlap:
            self._drain()

    def _take_outputs(self) -> list[StepOutput]:
        outputs, self._outputs = self._outputs, []
        self._masked.forget_ended(outputs)
        self._sessions.take(outputs)
        return outputs

    def _emit(self, outputs: list[RequestOutput]) -> None:
        self._outputs += outputs

    def _drain(self) -> None:
        """Wait for the steps in flight, and read the routes there are to read: what follows must
        not fall between them, and may take the pages."""
        while self._masked.waits:
            self._masked.look()
        while self._in_flight or self._scheduler.wants_reads:
            self._advance(self._plan(held=True))

    def _apply(self, result: StepResult | None) -> None:
        if result is None:
            return
        try:
            self._outputs += self._scheduler.apply(result)
            self._num_failures = 0
        except Exception as error:
            # A boundary, as in `_plan`.
            self._recover(error, f"the result of step {result.step}")

    def _guarded(self, plan: StepPlan, run: Callable[[], T]) -> T | None:
        """Run a part of the plan. If it fails, None: every request ends with the error, since
        the KV that was promised may not be there, and steps in flight are forgotten.

        An error that is not ours ends the replica if the device may be broken or other ranks
        may have gone on.
        """
        step = f"step {plan.step}"
        ended = False
        try:
            done = run()
            ended = True
            return done
        except SlipstreamError as error:
            ended = True
            logger.error("%s failed: %s", step, error)
            if isinstance(error, WeightUpdateError):
                self._readiness.died(error.message)
            self._end_all(error)
            return None
        except Exception as error:
            # A boundary: what no single request is to blame for ends those that run.
            ended = True
            lasting = self._config.parallel.num_ranks > 1 or breaks_device(error)
            self._recover(error, step, lasting=lasting)
            return None
        finally:
            if not ended:
                self._end_all(EngineDead(f"{step} was interrupted"))

    def _recover(self, error: Exception, what: str, *, lasting: bool = False) -> None:
        """End every request with a typed error, and go on. Raises EngineDead where there is no
        going on: the error is `lasting`, or no step succeeds any more."""
        logger.error("%s broke", what, exc_info=error)
        self._num_failures += 1
        why = f"{what} failed: {type(error).__name__}: {error}"
        if lasting or self._num_failures >= _MAX_FAILURES:
            dead = EngineDead(f"{why} ({self._num_failures} in a row)", field="step")
            self._end_all(dead)
            raise dead from error
        self._end_all(InternalError(why, field="step"))

    def _end_all(self, error: SlipstreamError) -> None:
        self._in_flight.clear()
        self._masked.give_up()
        self._outputs += self._scheduler.fail_all(error_info(error))


def _said(by: object, names: str) -> dict[str, Any]:
    return {name: getattr(by, name) for name in names.split()}
