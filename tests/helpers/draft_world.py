"""A controller of drafts in a world of its own: a clock, true costs and true acceptance."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from rollout.scheduler.speculative.drafts import Controller
from rollout.scheduler.speculative.verify_cost import CPU_COSTS

Cost = Callable[[int, int], float]
"""Seconds of a step of so many rows with so many drafts each."""


def flat_to_240(num_rows: int, k: int) -> float:
    """Of a GPU: reading the weights, until computing takes longer."""
    return 0.005 * max(1.0, num_rows * (k + 1) / 240)


def verify_half_more(num_rows: int, k: int) -> float:
    """A verify step costs 1.5 times a plain one, whatever the number of rows."""
    return 0.005 * (1.5 if k else 1.0)


def by_row(num_rows: int, k: int) -> float:
    """Of a CPU, as its model says."""
    return 0.067 * CPU_COSTS.step(num_rows, k)


@dataclass
class World:
    """Time passes as steps run. noise: of the time of a step, in its logarithm; one step of 200
    takes ten times as long. found: share of rows for which a drafter finds anything. overlap: a
    step is planned before the one before it was applied. host: seconds between two steps."""

    cost: Cost
    rate: float
    noise: float = 0.05
    found: float = 1.0
    overlap: bool = False
    host: float = 0.0002
    seed: int = 0
    now: float = 0.0
    spent: float = 0.0
    chosen: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._flight: deque[tuple[int, int, int, float]] = deque()
        self._ready = 0.0
        self._step = 0

    def clock(self) -> float:
        """Seconds."""
        return self.now

    def run(self, controller: Controller, num_rows: int, tokens: int) -> float:
        """Decode until each of the rows has `tokens` tokens on average; the seconds that its steps
        would take without noise, which is luck."""
        before, given = self.spent, 0.0
        while given < tokens:
            self._plan(controller, num_rows)
            if len(self._flight) > int(self.overlap):
                given += self._apply(controller)
        while self._flight:
            given += self._apply(controller)
        return (self.spent - before) * tokens / given

    def _plan(self, controller: Controller, num_rows: int) -> None:
        k = controller.choose(num_rows)
        controller.planned(self._step, num_rows, k)
        self.chosen.append(k)
        self.spent += self.cost(num_rows, k)
        seconds = self.cost(num_rows, k) * float(np.exp(self.noise * self._rng.standard_normal()))
        if self.noise and self._rng.random() < 0.005:
            seconds *= 10
        self._ready = max(self._ready, self.now) + seconds
        self._flight.append((self._step, num_rows, k, self._ready))
        self._step += 1
        self.now += self.host

    def _apply(self, controller: Controller) -> float:
        step, num_rows, k, ready = self._flight.popleft()
        self.now = max(self.now, ready)
        drafted = np.where(self._rng.random(num_rows) < self.found, k, 0).astype(np.int32)
        right = self._rng.random((num_rows, max(k, 1))) < self.rate
        accepted = np.minimum(np.cumprod(right, axis=1).sum(axis=1), drafted)
        counts = (accepted + 1).astype(np.int32)
        controller.observe(step, counts)
        return float(counts.mean())


def fixed_seconds(cost: Cost, num_rows: int, k: int, rate: float, tokens: int) -> float:
    """Seconds of `tokens` tokens a row where every step has `k` drafts, all of them found."""
    return tokens * cost(num_rows, k) / sum(rate**depth for depth in range(k + 1))
