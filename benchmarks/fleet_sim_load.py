"""Requests for `benchmarks/fleet_sim.py`: rollouts of groups, and talks of several turns."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fleet_sim_replica import Job

BYTES_A_TOKEN = 4
"""Of a prompt's JSON."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """count: requests. rate: of them a second, those that follow a tool not counted. systems:
    beginnings of system_tokens that all prompts have one of, then prompt_tokens of their own, then
    a reply of out_tokens in the mean, four times that at most. samples: requests with the same
    prompt, one after the other within spread_s. turns: of a talk, with tool_s between two, and
    tool_tokens more each."""

    count: int
    rate: float
    systems: int = 8
    system_tokens: int = 256
    prompt_tokens: int = 256
    out_tokens: int = 256
    samples: int = 1
    spread_s: float = 0.0
    turns: int = 1
    tool_s: float = 2.0
    tool_tokens: int = 64
    seed: int = 0


class Requests:
    """The jobs of a load, by its seed."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._draw = random.Random(load.seed)
        self._systems = [self._bytes(load.system_tokens) for _ in range(load.systems)]
        self._left = load.count
        self._names = load.systems

    def __iter__(self) -> Iterator[Job]:
        """Those that come by themselves, in order."""
        load, draw, now = self._load, self._draw, 0.0
        coming: list[tuple[float, int, Job]] = []
        number = 0
        while self._left > 0:
            now += draw.expovariate(load.rate / load.samples)
            while coming and coming[0][0] <= now:
                yield heapq.heappop(coming)[2]
            for job in self._group(now, number):
                number = job.number
                heapq.heappush(coming, (job.arrives, number, job))
        while coming:
            yield heapq.heappop(coming)[2]

    def _group(self, now: float, number: int) -> Iterator[Job]:
        """Requests with one prompt."""
        load, system = self._load, self._draw.randrange(self._load.systems)
        prompt = self._systems[system] + self._bytes(load.prompt_tokens)
        tokens = load.system_tokens + load.prompt_tokens
        self._names += 1
        for sample in range(min(load.samples, self._left)):
            self._left -= 1
            yield Job(
                number=number + sample + 1,
                prompt=prompt,
                prompt_tokens=tokens,
                num_out=self._num_out(),
                prefixes=((system, load.system_tokens), (self._names, tokens)),
                arrives=now + sample * load.spread_s / load.samples,
                turns=load.turns - 1,
            )

    def after(self, job: Job) -> Job | None:
        """The next turn of a talk, once its tool has answered."""
        if not job.turns or self._left <= 0:
            return None
        self._left -= 1
        load = self._load
        more = job.num_out + load.tool_tokens
        tokens = job.prompt_tokens + more
        self._names += 1
        return replace(
            job,
            number=-self._left - 1,
            prompt=job.prompt + self._bytes(more),
            prompt_tokens=tokens,
            num_out=self._num_out(),
            prefixes=(*job.prefixes, (self._names, tokens)),
            arrives=job.ends + self._draw.expovariate(1 / load.tool_s),
            ends=float("nan"),
            num_done=0.0,
            num_hit=0,
            num_moves=0,
            turns=job.turns - 1,
        )

    def _num_out(self) -> int:
        mean = self._load.out_tokens
        return min(1 + int(self._draw.expovariate(1 / mean)), 4 * mean)

    def _bytes(self, tokens: int) -> bytes:
        return self._draw.randbytes(tokens * BYTES_A_TOKEN)
