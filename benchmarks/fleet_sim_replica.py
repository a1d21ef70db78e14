"""One replica of `benchmarks/fleet_sim.py`, in virtual time: what its steps cost, and who runs.

A step of r rows with K tokens in the KV cache takes a + b r + c K seconds, and p more for each
token of a prompt that it computes. Between two events the rows of a replica stay, and each gets a
token a step, so that time and steps follow from each other without going through steps one by one.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from dataclasses import dataclass

Prefix = tuple[int, int]
"""Name and tokens of a prefix that a cache may have."""


_NONE = (0, 0)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds: step_s a step, row_s a row, kv_s a token in the KV cache, prefill_s a token of a
    prompt, reply_s what a reply takes beside its steps. max_rows: that run at a time. kv_tokens:
    that the KV cache holds."""

    step_s: float
    row_s: float
    kv_s: float
    prefill_s: float
    reply_s: float
    max_rows: int = 256
    kv_tokens: int = 1_000_000


@dataclass(slots=True, eq=False)
class Job:
    """A request. prefixes: of its prompt, shortest first, with itself as the last. num_done: tokens
    that it has got. num_hit: of its prompt, where it was computed last, in the cache."""

    number: int
    prompt: bytes
    prompt_tokens: int
    num_out: int
    prefixes: tuple[Prefix, ...]
    arrives: float
    ends: float = math.nan
    num_done: float = 0.0
    num_hit: int = 0
    num_moves: int = 0
    group: int = 0
    turns: int = 0


class Replica:
    """A `Candidate` of the router's policies, and what happens on it."""

    def __init__(self, place: int, costs: Costs) -> None:
        self.url = f"http://replica-{place}:1"
        self.place = place
        self.costs = costs
        self.num_open = 0
        self.num_bytes = 0
        self.epoch = 0
        self.stamp = 0
        self.num_retracted = 0
        # Of each row, the count of `_tokens` at which it ends.
        self.rows: dict[Job, float] = {}
        self.waiting: deque[Job] = deque()
        self.kv = 0.0
        # Of each prefix its tokens, and those that are not its shorter ones'.
        self._cache: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._cached = 0
        self._by_end: list[tuple[float, int, Job]] = []
        self._tokens = 0.0  # that each row would have got since the beginning
        self._stall_s = 0.0
        self._now = 0.0

    def add(self, job: Job, now: float) -> None:
        """A job comes."""
        self.advance(now)
        self.num_open += 1
        self.num_bytes += len(job.prompt)
        self.waiting.append(job)
        self._admit()

    def advance(self, now: float) -> None:
        """Let the time pass until `now`, before which nothing happens here."""
        passed, self._now = now - self._now, now
        stalled = min(passed, self._stall_s)
        self._stall_s -= stalled
        passed -= stalled
        if not self.rows or passed <= 0.0:
            return
        count = len(self.rows)
        each, half = self._step_s(), 0.5 * self.costs.kv_s * count
        steps = passed / each
        if half:
            steps = (math.sqrt(each * each + 4 * half * passed) - each) / (2 * half)
        self._tokens += steps
        self.kv += steps * count

    def next_at(self) -> float:
        """When a row ends or the KV cache is full; infinity if nothing runs."""
        if not self.rows:
            return math.inf
        count = len(self.rows)
        while self.rows.get(self._by_end[0][2]) != self._by_end[0][0]:
            heapq.heappop(self._by_end)  # retracted, and here again with another end
        steps = max(self._by_end[0][0] - self._tokens, 0.0)
        room = max(self.costs.kv_tokens - self.kv, 0.0) / count
        steps = min(steps, room) if count > 1 else steps
        half = 0.5 * self.costs.kv_s * count
        return self._now + self._stall_s + steps * (self._step_s() + half * steps)

    def happen(self, now: float) -> list[Job]:
        """What was due: the jobs that end; one is retracted if the KV cache is full."""
        self.advance(now)
        ended = []
        while self._by_end and self._by_end[0][0] <= self._tokens + 1e-6:
            end, _, job = heapq.heappop(self._by_end)
            if self.rows.get(job) == end:
                self._leave(job)
                job.num_done, job.ends = job.num_out, now + self.costs.reply_s
                self.num_open -= 1
                self.num_bytes -= len(job.prompt)
                ended.append(job)
        if not ended and len(self.rows) > 1 and self.kv >= self.costs.kv_tokens - 1e-3:
            latest = max(self.rows, key=lambda job: job.number)
            self._leave(latest)
            self.waiting.appendleft(latest)
            self.num_retracted += 1
            return ended
        self._admit()
        return ended

    def commit(self, now: float, seconds: float) -> None:
        """Other weights: what was cached is void, and nothing runs for so long."""
        self.advance(now)
        self._stall_s += seconds
        self.epoch += 1
        self._cache.clear()
        self._cached = 0

    def die(self, now: float) -> list[Job]:
        """Lose everything; what it had, with the tokens that have come."""
        self.advance(now)
        running = sorted(self.rows, key=lambda job: job.number)
        for job in running:
            self._leave(job)
        lost = [*running, *self.waiting]
        self._by_end.clear()
        self.waiting.clear()
        self.num_open = self.num_bytes = 0
        self.commit(now, -self._stall_s)
        return lost

    def _admit(self) -> None:
        """Begin what fits: a row needs pages for its prompt and what came of its reply."""
        costs = self.costs
        while self.waiting and len(self.rows) < costs.max_rows:
            job = self.waiting[0]
            tokens = job.prompt_tokens + job.num_done
            if self.rows and self.kv + tokens > costs.kv_tokens:
                break
            self.waiting.popleft()
            job.num_hit = self._hit(job)
            # The first token of the reply comes with the last of the prompt.
            self._stall_s += costs.prefill_s * max(tokens - job.num_hit, 1.0)
            self.kv += tokens
            # It joins when the step that runs has ended: half of one, in the mean.
            end = self._tokens + job.num_out - job.num_done + (0.5 if self.rows else 0.0)
            self.rows[job] = end
            heapq.heappush(self._by_end, (end, job.number, job))
            self._keep(job)

    def _leave(self, job: Job) -> None:
        """A row gives its pages back; what it got stays known."""
        job.num_done = min(job.num_out - (self.rows.pop(job) - self._tokens), job.num_out)
        self.kv = max(self.kv - job.prompt_tokens - job.num_done, 0.0) if self.rows else 0.0

    def _hit(self, job: Job) -> int:
        have = [min(self._cache.get(name, _NONE)[0], tokens) for name, tokens in job.prefixes]
        return min(max(have, default=0), job.prompt_tokens - 1)

    def _keep(self, job: Job) -> None:
        """The prompt's prefixes are cached; the least recently used make room for what runs."""
        cache, before = self._cache, 0
        for name, tokens in job.prefixes:
            known = cache.pop(name, None)
            if known is not None:
                self._cached -= known[1]
            cache[name] = (tokens, tokens - before)
            self._cached += tokens - before
            before = tokens
        while cache and self._cached + self.kv > self.costs.kv_tokens:
            self._cached -= cache.popitem(last=False)[1][1]

    def _step_s(self) -> float:
        costs = self.costs
        return costs.step_s + costs.row_s * len(self.rows) + costs.kv_s * self.kv
