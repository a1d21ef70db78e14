"""The scheduler: what the next step computes, and what came of the last.

`plan` and `apply` are called in step order. `plan` advances its own idea of what is computed,
so another plan may be made before the result of the last one is applied; sequences that ended
meanwhile have their surplus token dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict

import numpy as np
from msgspec.structs import replace

from engine.config import SchedulerConfig, SpeculativeConfig
from engine.errors import InvalidRequest, QueueFull
from engine.protocol import (
    ErrorInfo,
    ExpertFacts,
    FinishReason,
    PauseMode,
    Request,
    RequestOutput,
    StepPlan,
    StepResult,
)
from rollout.cache.manager import CacheManager
from rollout.scheduler.continued import begin
from rollout.scheduler.emit import StepOutput, StreamOutputs, final_output
from rollout.scheduler.ending.endings import Endings
from rollout.scheduler.ending.finish import CANNOT_RESTART, failed, finish_of
from rollout.scheduler.ending.named import named_sequences
from rollout.scheduler.kv_policy import KvPolicies
from rollout.scheduler.planning.decode import DecodePlanner
from rollout.scheduler.planning.in_flight import InFlight
from rollout.scheduler.planning.page_reserve import PageReserve
from rollout.scheduler.planning.plan_builder import PlanBuilder, rowless
from rollout.scheduler.planning.preempt import Preemption
from rollout.scheduler.planning.prefill import PrefillPlanner
from rollout.scheduler.planning.queue import WaitingQueue
from rollout.scheduler.planning.queue_groups import QueueGroups
from rollout.scheduler.results import ResultWriter
from rollout.scheduler.routes.reads import RouteReads
from rollout.scheduler.running import RunningSet
from rollout.scheduler.sequence import Sequence
from rollout.scheduler.speculative.build import build_drafts
from rollout.scheduler.stats import Counters, SchedulerStats
from rollout.scheduler.table import SlotTable
from rollout.scheduler.validate import Limits, check_request, check_served


class Scheduler:
    """Continuous batching with chunked prefill over a paged KV pool with prefix reuse.

    Not thread-safe. Arrays in plans are not to be written; some are handed out again.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheManager,
        *,
        context_length: int,
        vocab_size: int,
        num_labels: int = 0,
        experts: ExpertFacts | None = None,
        keeps_routes: bool = False,
        version: int = 0,
        speculative: SpeculativeConfig | None = None,
        device: str = "cpu",
        prepared: Callable[[Request], bool] = lambda request: True,
    ) -> None:
        """experts, keeps_routes: as in `EngineFacts`. speculative: what is drafted; device: what
        the ranks run on. prepared: whether a request may leave the queue, or others pass it."""
        # Every running sequence must be able to decode in one step.
        num_slots = min(config.max_running, config.max_step_tokens)
        if num_slots < 1:
            raise ValueError("max_running and max_step_tokens must be at least 1")
        self._config = config
        self._cache = cache
        self._speculative = speculative or SpeculativeConfig()
        self._limits = Limits(
            context_length=context_length,
            vocab_size=vocab_size,
            kv_tokens=cache.num_pages * cache.page_size,
            num_labels=num_labels,
            draft_tokens=self._speculative.most,
            forces=self._speculative.allow_forced_acceptance,
            experts=experts,
            keeps_routes=keeps_routes,
        )
        self._num_slots = num_slots
        self._device = device
        self._prepared = prepared
        self._requests: dict[str, Sequence] = {}
        self._groups = QueueGroups()
        self._build_parts(version)
        self._in_flight: deque[InFlight] = deque()
        self._ones = np.ones(num_slots, np.int32)
        self._counters = Counters()
        self._next_step = 0
        self._next_arrival = 0
        self._pause_mode: PauseMode | None = None

    @property
    def version(self) -> int:
        """The version that new tokens carry."""
        return self._running.version

    @property
    def drafts(self) -> bool:
        """Whether steps may verify drafted tokens."""
        return self._speculative.enabled

    @property
    def running(self) -> RunningSet:
        """The sequences that hold slots, to be read."""
        return self._running

    @property
    def paused(self) -> bool:
        """Whether `plan` plans nothing until `resume`."""
        return self._pause_mode is not None

    @property
    def preparing(self) -> bool:
        """Whether the last `plan` left requests in the queue that are not `prepared`."""
        return self._prefill.num_unprepared > 0

    @property
    def copies(self) -> list[Scheduler]:
        """The schedulers of the replica's copies of the model: this one."""
        return [self]

    def check(self, request: Request, *, decoded: bool = False) -> None:
        """Raise InvalidRequest or ContextTooLong, naming the field, if it can never be served.
        decoded: it came from bytes, so that its ranges were looked at."""
        check = check_served if decoded else check_request
        check(request, self._limits)

    def add(self, request: Request, *, decoded: bool = False) -> RequestOutput | None:
        """Queue one request; its answer if the tokens that it came with are all of its output.

        decoded: as in `check`. Raises what that does, and QueueFull when too many wait.
        """
        self.check(request, decoded=decoded)
        if request.rid in self._requests or self._running.routes.waits(request.rid):
            raise InvalidRequest(f"rid {request.rid!r} is already in use", field="rid")
        context_length = self._limits.context_length
        sequence = begin(request, self._next_arrival, context_length=context_length)
        if sequence.ended is not None and sequence.needs_nothing:
            return final_output(sequence, sequence.ended, drafts=self.drafts)
        if len(self._queue) >= self._config.max_waiting:
            raise QueueFull(
                f"{len(self._queue)} requests wait, the limit; send it again later",
                field="max_waiting",
            )
        self._enter(sequence)
        # Begins what it may need, at once and not when there is room for it.
        self._prepared(request)
        return None

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
        """End the request `rid`, those of `rids`, those whose id starts with `rid_prefix`, or
        `all`. rid, rid_prefix: as replies show ids too; rids: as they are. error: what ended them,
        in place of `message`.

        Returns what each produced so far, in order of arrival. Empty names nothing. The KV of
        those named stays cached; with `all` it does not, since most often an update follows.
        """
        if all:
            named = list(self._requests.values())
        else:
            named = named_sequences(self._requests, rid=rid, rid_prefix=rid_prefix, rids=rids)
        finish = failed(error) if error else FinishReason(type="abort", message=message)
        return self._endings.each(named, finish, step=self._next_step, keep_kv=not all)

    def stop(self, rid: str, num_tokens: int, matched: str) -> list[RequestOutput]:
        """End one request at `num_tokens` output tokens, a stop string having been seen.

        Nothing if it is gone already, or its routes are on their way. A stream that returned more
        tokens than that gets an empty output whose `start` is `num_tokens`.
        """
        sequence = self._requests.get(rid)
        if sequence is None:
            return []
        finish = FinishReason(type="stop", matched=matched)
        return self._endings.at(sequence, num_tokens, finish, step=self._next_step)

    def pause(self, mode: PauseMode = "keep") -> list[RequestOutput]:
        """Plan nothing until `resume`. Returns what 'abort' ended; else nothing."""
        self._pause_mode = mode
        if mode == "abort":
            return self.abort(all=True, message="aborted by a pause")
        if mode == "retract":
            for sequence in self._running.sequences():
                self._preemption.retract(sequence, self._next_step, keep_kv=False)
        return []

    def resume(self) -> None:
        """Undo `pause`."""
        self._pause_mode = None

    def set_version(self, version: int) -> list[RequestOutput]:
        """Weights `version` serve every step planned from now on.

        Cached prefixes are dropped, and each request is treated as its `kv_policy` says: it
        goes on with the KV it has, which is then never shared; or its KV is computed again; or
        it starts again. Later tokens carry the new version. Returns the last output of streams
        that would have to start again and cannot.
        """
        treated = self._policies.apply(list(self._requests.values()), self._next_step)
        for sequence in treated.restarted:
            self._requests[sequence.request.rid] = sequence
        outputs = self._endings.each(treated.stuck, CANNOT_RESTART, step=self._next_step)
        self._running.set_version(version)
        return outputs

    def flush_cache(self) -> None:
        """Drop every cached prefix; raises SlipstreamError while sequences hold pages."""
        self._cache.flush()

    @property
    def wants_reads(self) -> bool:
        """Whether routes are to be read before anything else is done to pages."""
        return self._running.routes.wanted

    def plan(self, step: int = -1) -> StepPlan | None:
        """The next step, or None: nothing is to be done, or a pause is on. step: its number."""
        if self.paused or not self._requests:
            return self.plan_reads(step)
        self._next_step = max(step, self._next_step)
        builder = PlanBuilder(self._next_step, self._running)
        self._preemption.make_room(self._decode.num_missing_pages, self._next_step)
        self._fill(builder)
        while builder.empty and len(self._running) > 1 and self._running.prefilling:
            self._preemption.retract_one(self._next_step)
            self._fill(builder)
        if builder.empty:
            return self.plan_reads(step)
        if builder.all_decode:
            self._decode.draft(builder)
        self._counters.num_steps += 1
        return self._launched(builder.build(self._ones))

    def plan_reads(self, step: int = -1) -> StepPlan | None:
        """A step that computes nothing and reads the routes there are to read; None without."""
        if not self.wants_reads:
            return None
        self._next_step = max(step, self._next_step)
        return self._launched(rowless(self._next_step, self._running))

    def _launched(self, planned: tuple[StepPlan, InFlight]) -> StepPlan:
        plan, flight = planned
        self._in_flight.append(flight)
        self._next_step += 1
        return plan

    def apply(self, result: StepResult) -> list[StepOutput]:
        """Take in the result of the oldest step in flight.

        Returns the final output of each sequence that ended, and the output of each
        streaming sequence that got a token, those of many as columns. A sequence whose
        numbers were not finite ends with NonFiniteLogits and the tokens it had; its KV is not
        cached.
        """
        flight = self._in_flight.popleft()
        assert result.step == flight.step, f"result of step {result.step}, not {flight.step}"
        outputs: list[StepOutput] = []
        outputs += self._running.routes.arrived(flight.routes, result.routes)
        if len(flight.row_slots):
            outputs += self._apply_rows(flight, result)
        return outputs

    def _apply_rows(self, flight: InFlight, result: StepResult) -> list[StepOutput]:
        step = self._next_step
        appended = self._results.append(flight, result)
        if self._running.drafts is not None:
            self._running.drafts.applied(flight, result)
        self._counters.count(appended.num_tokens, appended.spec)
        outputs: list[StepOutput] = []
        for slot in appended.broken:
            outputs += self._endings.broken(self._running[slot], step=step)
        outputs += self._streams.outputs(appended.streaming)
        ended = zip(appended.ended.tolist(), appended.matched.tolist(), strict=True)
        for slot, matched in ended:
            sequence = self._running[slot]
            size = int(self._running.table.num_tokens[slot])
            finish = finish_of(sequence, matched, size, self._limits.kv_tokens)
            outputs += self._endings.one(sequence, finish, step=step)
        for slot in self._results.scored(flight):
            sequence = self._running[slot]
            finish = sequence.ended or FinishReason(type="length", length=0)
            outputs += self._endings.one(sequence, finish, step=step)
        return outputs

    def has_work(self) -> bool:
        """Whether any request is waiting or running, paused or not, or waits for its routes."""
        return bool(self._requests) or self._running.routes.waiting

    def stats(self) -> SchedulerStats:
        """Counts now and totals since the start."""
        drafts = self._running.drafts
        return SchedulerStats(
            version=self._running.version,
            paused=self.paused,
            pause_mode=self._pause_mode,
            num_running=len(self._running),
            num_waiting=len(self._queue),
            free_pages=self._cache.num_free,
            cached_pages=self._cache.num_cached,
            total_pages=self._cache.num_pages,
            num_retractions=self._preemption.num_retractions,
            **asdict(self._counters),
            draft_len=0 if drafts is None else drafts.draft_len,
            **self._speculative.facts,
        )

    def check_integrity(self) -> None:
        """Assert that no request, slot or page is lost or held twice."""
        self._queue.check_integrity()
        self._running.check_integrity()
        held = {sequence.request.rid for sequence in (*self._queue, *self._running.sequences())}
        assert held == set(self._requests), "a request is neither waiting nor running"
        count = len(self._queue) + len(self._running)
        assert count == len(held), f"{count} sequences for {len(held)} requests"
        members = sum(bool(sequence.request.group) for sequence in self._requests.values())
        assert members == self._groups.num_members, "a group lost a request"

    def fail_all(self, error: ErrorInfo) -> list[RequestOutput]:
        """A step failed, planned or not: end every request with `error`, and trust no KV.

        Whatever a call that broke off has left behind is forgotten with it: queue, slots and
        pages start anew.
        """
        finish = failed(error)
        sequences = list(self._requests.values())
        self._running.take_results(sequences)
        outputs = [final_output(sequence, finish, drafts=self.drafts) for sequence in sequences]
        outputs += [replace(last, finish=finish) for last in self._running.routes.give_up()]
        self._in_flight.clear()
        self._requests.clear()
        self._groups.clear()
        self._cache.reset()
        num_retractions = self._preemption.num_retractions
        self._build_parts(self._running.version)
        self._preemption.num_retractions = num_retractions
        return outputs

    def _build_parts(self, version: int) -> None:
        """Everything that holds requests, empty."""
        config, cache = self._config, self._cache
        table = SlotTable(self._num_slots, self._limits.context_length, cache.page_size)
        drafts = build_drafts(self._speculative, table, cache, device=self._device)
        routes = RouteReads(self._limits.experts, cache.page_size)
        self._running = RunningSet(table, cache, version, drafts, routes)
        self._queue = WaitingQueue(config.policy, config.starvation_steps)
        self._reserve = PageReserve(cache.page_size)
        self._preemption = Preemption(self._running, self._queue, self._reserve)
        self._policies = KvPolicies(self._running, self._queue, self._preemption)
        self._decode = DecodePlanner(self._running)
        self._prefill = PrefillPlanner(
            config, self._running, self._queue, self._reserve, self._admitted, self._prepared
        )
        self._results = ResultWriter(self._running)
        self._streams = StreamOutputs(self._running, drafts=self.drafts)
        self._endings = Endings(
            self._requests, self._groups, self._running, self._queue, drafts=self.drafts
        )

    def _fill(self, builder: PlanBuilder) -> None:
        num_decode = self._decode.plan(builder)
        self._prefill.plan(builder, self._config.max_step_tokens - num_decode)

    def _enter(self, sequence: Sequence) -> None:
        request = sequence.request
        self._next_arrival += 1
        sequence.group_order = self._groups.join(request.group, sequence.arrival)
        self._requests[request.rid] = sequence
        self._queue.push(sequence)

    def _admitted(self, sequence: Sequence) -> None:
        if sequence.admitted:
            return
        sequence.leave_queue()
        cached = int(self._running.table.num_computed[sequence.slot])
        sequence.cached_tokens = min(cached, sequence.prompt_len)
        self._counters.num_prompt_tokens += sequence.prompt_len
        self._counters.num_cached_tokens += sequence.cached_tokens
