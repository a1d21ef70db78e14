"""A fleet of `benchmarks/fleet_sim.py`: requests, replicas, failures and updates by one clock.

The policy that chooses is the router's own (`rollout.router.choice`), which sees the clock, the
replicas and the bytes of prompts as it sees them in a router.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fleet_sim_replica import Costs, Job, Replica

from rollout.router.choice.ask import Ask, Policy

ARRIVES, DUE, COMMITS, DIES, RETURNS = range(5)


@dataclass(frozen=True, kw_only=True)
class Events:
    """commits: seconds at which all replicas take other weights, which each does in commit_s.
    deaths: when, and which replica, which is back after down_s."""

    commits: tuple[float, ...] = ()
    commit_s: float = 0.0
    deaths: tuple[tuple[float, int], ...] = ()
    down_s: float = 60.0


@dataclass
class Result:
    """What came of a run. latencies_s: of every request, from its arrival to its end."""

    latencies_s: list[float] = field(default_factory=list)
    ends: dict[int, int] = field(default_factory=dict)
    makespan_s: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    retracted: int = 0
    moved: int = 0

    def figures(self) -> dict[str, Any]:
        """Numbers for a table."""
        ordered = sorted(self.latencies_s)
        count = len(ordered)
        return {
            "requests": count,
            "makespan_s": self.makespan_s,
            "tokens_per_s": self.tokens / self.makespan_s,
            "mean_s": statistics.fmean(ordered),
            "p50_s": ordered[count // 2],
            "p99_s": ordered[count * 99 // 100],
            "hit_share": self.hit_tokens / self.prompt_tokens,
            "retracted": self.retracted,
            "moved": self.moved,
        }


class Fleet:
    """Runs jobs on replicas. after: the next job of whoever waits for one that ended, whose
    `arrives` is when; None for none."""

    def __init__(
        self,
        costs: Costs,
        num_replicas: int,
        policy: Callable[[Callable[[], float]], Policy],
        *,
        events: Events | None = None,
        after: Callable[[Job], Job | None] = lambda _: None,
    ) -> None:
        self._replicas = [Replica(place, costs) for place in range(num_replicas)]
        self._candidates = tuple(self._replicas)
        self._events = events or Events()
        self._after = after
        self._now = 0.0
        self._policy = policy(lambda: self._now)
        self._heap: list[tuple[float, int, int, Any, int]] = []
        self._count = 0
        self._parked: list[Job] = []
        self.result = Result()

    def run(self, jobs: Iterator[Job]) -> Result:
        """Until every job has ended. jobs: in the order in which they arrive."""
        for when in self._events.commits:
            self._push(when, COMMITS, None)
        for when, place in self._events.deaths:
            self._push(when, DIES, self._replicas[place])
        self._next_of(jobs)
        while self._heap:
            self._now, _, kind, what, stamp = heapq.heappop(self._heap)
            if kind == ARRIVES:
                self._dispatch(what)
                if not stamp:
                    self._next_of(jobs)
            elif kind == DUE:
                if stamp == what.stamp:
                    self._end(what)
            elif kind == COMMITS:
                for replica in self._candidates:
                    replica.commit(self._now, self._events.commit_s)
                    self._look(replica)
            elif kind == DIES:
                self._die(what)
            else:
                self._candidates = (*self._candidates, what)
                parked, self._parked = self._parked, []
                for job in parked:
                    self._dispatch(job)
        result = self.result
        result.retracted = sum(replica.num_retracted for replica in self._replicas)
        assert not self._parked and not any(r.rows or r.waiting for r in self._replicas)
        return result

    def _push(self, when: float, kind: int, what: Any, stamp: int = 0) -> None:
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, kind, what, stamp))

    def _next_of(self, jobs: Iterator[Job]) -> None:
        job = next(jobs, None)
        if job is not None:
            self._push(job.arrives, ARRIVES, job)

    def _dispatch(self, job: Job) -> None:
        if not self._candidates:
            self._parked.append(job)
            return
        choice = self._policy.choose(Ask(job.prompt), self._candidates)
        replica = self._candidates[choice.place]
        replica.add(job, self._now)
        self._look(replica)

    def _look(self, replica: Replica) -> None:
        """When something happens there next; what was expected before is void."""
        replica.stamp += 1
        when = replica.next_at()
        if when < math.inf:
            self._push(when, DUE, replica, replica.stamp)

    def _end(self, replica: Replica) -> None:
        result = self.result
        for job in replica.happen(self._now):
            result.latencies_s.append(job.ends - job.arrives)
            result.ends[job.number] = result.ends.get(job.number, 0) + 1
            result.makespan_s = max(result.makespan_s, job.ends)
            result.tokens += job.num_out
            result.prompt_tokens += job.prompt_tokens
            result.hit_tokens += job.num_hit
            result.moved += job.num_moves
            following = self._after(job)
            if following is not None:
                self._push(following.arrives, ARRIVES, following, 1)
        self._look(replica)

    def _die(self, replica: Replica) -> None:
        if replica not in self._candidates:
            return
        self._candidates = tuple(one for one in self._candidates if one is not replica)
        lost = replica.die(self._now)
        self._look(replica)
        self._push(self._now + self._events.down_s, RETURNS, replica)
        for job in lost:
            # The router has what was sampled: another replica goes on behind it.
            job.num_moves += 1
            self._dispatch(job)
