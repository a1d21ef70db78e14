"""What the leader does between the launch of a step with masked rows and its masks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from engine.protocol import RequestOutput, StepMasks, StepPlan
from rollout.masks.courses import Courses
from rollout.masks.gate import MaskGate
from rollout.masks.places import MaskPlaces, framed_masks
from rollout.replica.command_replies import error_info
from rollout.scheduler.copies.schedulers import ReplicaScheduler
from rollout.scheduler.emit import StepOutput

logger = logging.getLogger(__name__)


class MaskedStep:
    """The step whose sampling waits, if one does. It is the only one in flight.

    Its masks are asked for once the step before it was applied, since they may depend on its
    tokens. While they are awaited the leader takes in commands and plans nothing.
    """

    def __init__(
        self,
        scheduler: ReplicaScheduler,
        *,
        gate: MaskGate,
        send: Callable[[StepPlan, StepMasks], None],
        emit: Callable[[list[RequestOutput]], None],
        max_rows: int,
    ) -> None:
        """send: hands the frame to the ranks. emit: takes the outputs of requests that end.
        max_rows: most of a step, on each copy."""
        self._gate = gate
        self._courses = Courses(len(scheduler.copies), max_rows)
        self._places = [MaskPlaces(gate.vocab_size, max_rows) for _ in scheduler.copies]
        self._scheduler = scheduler
        self._send = send
        self._emit = emit
        self._plan: StepPlan | None = None

    @property
    def waits(self) -> bool:
        """Whether there is such a step."""
        return self._plan is not None

    def ask(self, plan: StepPlan) -> None:
        """`plan` was launched, and waits from now on."""
        rows = self._courses.rows([copy.running for copy in self._scheduler.copies], plan)
        self._gate.open(rows.unknown, rows.known)
        self._plan = plan

    def look(self) -> bool:
        """Whether the step was given its masks; a moment later, the second time and on. Requests
        whose masks failed end, the others of that step go on."""
        plan = self._plan
        assert plan is not None, "no step waits"
        pause_s = self._gate.pause_s
        if pause_s > 0:
            # Not by nothing: even that lets every other thread of a busy machine go first.
            time.sleep(pause_s)
        # A slot that is left goes to nobody else before the next plan.
        tables = [copy.running.table for copy in self._scheduler.copies]
        answer = self._gate.look(lambda row: bool(tables[row.copy].masked[row.slot]))
        for rid, error in answer.failed:
            logger.warning("request %s: %s", rid, error.message)
            self._emit(self._scheduler.abort(rids=[rid], error=error_info(error)))
        if answer.masks is None:
            return False
        self._plan = None
        for row, course in answer.masks.courses:
            self._courses.enter(row, course)
        self._send(plan, framed_masks(self._places, plan, answer.masks.rows, answer.masks.masks))
        return True

    def give_up(self) -> None:
        """Forget the step, if there is one: it failed. What the ranks have of its masks is not
        known."""
        self._plan = None
        self._gate.close()
        for places in self._places:
            places.forget()

    def close(self) -> None:
        """End what the sources of masks have running. Idempotent."""
        self._gate.shut_down()

    def forget_ended(self, outputs: list[StepOutput]) -> None:
        """Tell the sources of masks which requests are over."""
        self._gate.forget_ended(outputs)
