"""The schedulers of several copies of the model as one: each plans for its own, in one frame.

A copy has its own slots, pages and prefix tree. Steps are numbered together: a copy without rows
takes part in a step all the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from engine.errors import InvalidRequest, QueueFull
from engine.protocol import (
    ErrorInfo,
    PauseMode,
    Request,
    RequestOutput,
    StepPlan,
    StepResult,
)
from rollout.scheduler.copies.frame import framed
from rollout.scheduler.copies.placement import Placement
from rollout.scheduler.copies.sums import summed
from rollout.scheduler.emit import StepOutput
from rollout.scheduler.scheduler import Scheduler
from rollout.scheduler.stats import SchedulerStats


class DividedScheduler:
    """What a leader needs of a `Scheduler`, over several. Not thread-safe.

    max_waiting: of all copies together.
    """

    def __init__(self, copies: Sequence[Scheduler], *, kv_tokens: int, max_waiting: int) -> None:
        """kv_tokens: that the pool of one copy holds."""
        self._copies = list(copies)
        self._placement = Placement(self._copies, kv_tokens=kv_tokens)
        self._max_waiting = max_waiting
        self._in_flight: deque[list[int]] = deque()
        self._next_step = 0
        self._num_steps = 0

    @property
    def copies(self) -> list[Scheduler]:
        """The scheduler of each copy, to be read."""
        return self._copies

    @property
    def version(self) -> int:
        """The version that new tokens carry."""
        return self._copies[0].version

    @property
    def paused(self) -> bool:
        """Whether `plan` plans nothing until `resume`."""
        return self._copies[0].paused

    @property
    def preparing(self) -> bool:
        """Whether the last `plan` left requests in a queue that are not prepared."""
        return any(copy.preparing for copy in self._copies)

    def add(self, request: Request, *, decoded: bool = False) -> RequestOutput | None:
        """As `Scheduler.add`, on the copy that `Placement` chooses."""
        self._copies[0].check(request, decoded=decoded)
        if request.rid in self._placement:
            raise InvalidRequest(f"rid {request.rid!r} is already in use", field="rid")
        waiting = len(self._placement) - sum(len(copy.running) for copy in self._copies)
        if waiting >= self._max_waiting:
            raise QueueFull(
                f"{waiting} requests wait, the limit; send it again later", field="max_waiting"
            )
        index = self._placement.choose(request)
        answer = self._copies[index].add(request, decoded=decoded)
        if answer is None:
            self._placement.enter(request, index)
        return answer

    def abort(
        self,
        rid_prefix: str = "",
        all: bool = False,
        message: str = "aborted by the client",
        *,
        rid: str = "",
        rids: Iterable[str] = (),
        error: ErrorInfo | None = None,
    ) -> list[RequestOutput]:
        """As `Scheduler.abort`."""
        names = list(rids)
        return self._each(
            lambda copy: copy.abort(rid_prefix, all, message, rid=rid, rids=names, error=error)
        )

    def stop(self, rid: str, num_tokens: int, matched: str) -> list[RequestOutput]:
        """As `Scheduler.stop`."""
        if rid not in self._placement:
            return []
        outputs = self._copies[self._placement.copy_of(rid)].stop(rid, num_tokens, matched)
        self._placement.leave(outputs)
        return outputs

    def pause(self, mode: PauseMode = "keep") -> list[RequestOutput]:
        """As `Scheduler.pause`."""
        return self._each(lambda copy: copy.pause(mode))

    def resume(self) -> None:
        """Undo `pause`."""
        for copy in self._copies:
            copy.resume()

    def set_version(self, version: int) -> list[RequestOutput]:
        """As `Scheduler.set_version`."""
        return self._each(lambda copy: copy.set_version(version))

    def flush_cache(self) -> None:
        """As `Scheduler.flush_cache`."""
        for copy in self._copies:
            copy.flush_cache()

    @property
    def wants_reads(self) -> bool:
        """As `Scheduler.wants_reads`, of any copy."""
        return any(copy.wants_reads for copy in self._copies)

    def plan(self) -> StepPlan | None:
        """The next step of all copies, or None if none of them has anything to do."""
        plan = self._framed([copy.plan(self._next_step) for copy in self._copies])
        self._num_steps += plan is not None and any(len(own.slots) for own in plan.copies())
        return plan

    def plan_reads(self) -> StepPlan | None:
        """As `Scheduler.plan_reads`."""
        return self._framed([copy.plan_reads(self._next_step) for copy in self._copies])

    def _framed(self, plans: list[StepPlan | None]) -> StepPlan | None:
        with_plans = [index for index, plan in enumerate(plans) if plan is not None]
        if not with_plans:
            return None
        self._in_flight.append(with_plans)
        self._next_step += 1
        return framed(plans, self._next_step - 1)

    def apply(self, result: StepResult) -> list[StepOutput]:
        """As `Scheduler.apply`; result: of copy 0, with those of the others."""
        results = [result, *result.further]
        outputs: list[StepOutput] = []
        for index in self._in_flight.popleft():
            outputs += self._copies[index].apply(results[index])
        self._placement.leave(outputs)
        return outputs

    def has_work(self) -> bool:
        """Whether any request is waiting or running, paused or not."""
        return any(copy.has_work() for copy in self._copies)

    def stats(self) -> SchedulerStats:
        """As `Scheduler.stats`, of all copies together; a step of several copies is one."""
        return summed([copy.stats() for copy in self._copies], num_steps=self._num_steps)

    def check_integrity(self) -> None:
        """Assert that no request, slot or page is lost or held twice."""
        for copy in self._copies:
            copy.check_integrity()
        self._placement.check_integrity()

    def fail_all(self, error: ErrorInfo) -> list[RequestOutput]:
        """As `Scheduler.fail_all`: the copies' steps are one."""
        self._in_flight.clear()
        # A plan that broke off may have been numbered on some copies.
        self._next_step += 1
        return self._each(lambda copy: copy.fail_all(error))

    def _each(self, run: Callable[[Scheduler], list[RequestOutput]]) -> list[RequestOutput]:
        outputs = [output for copy in self._copies for output in run(copy)]
        self._placement.leave(outputs)
        return outputs
