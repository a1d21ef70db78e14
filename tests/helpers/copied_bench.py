"""Schedulers of several copies of a model on as many mock executors, driven as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from engine.protocol import StepMasks, StepPlan, StepResult
from rollout.scheduler.copies.divided import DividedScheduler
from tests.helpers.mock_executor import MockExecutor
from tests.helpers.scheduling import Bench

NUM_COPIES = 3


class CopiedExecutor:
    """Steps every copy with its own plan of a frame."""

    def __init__(self, copies: Sequence[MockExecutor]) -> None:
        self.copies = copies

    def step(self, plan: StepPlan, masks: StepMasks | None = None) -> StepResult:
        """The results, as the ranks merge them."""
        own = [None] * len(self.copies) if masks is None else [masks, *masks.further]
        plans = plan.copies()
        assert len(plans) == len(self.copies)
        first, *further = map(_step, self.copies, plans, own)
        return replace(first, further=further)

    @property
    def kv_versions(self) -> dict[int, list[int]]:
        """Of all copies; each request is on one."""
        return {seed: found for copy in self.copies for seed, found in copy.kv_versions.items()}

    @property
    def first_read(self) -> dict[int, list[int]]:
        """Of all copies."""
        return {seed: found for copy in self.copies for seed, found in copy.first_read.items()}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("version", "accepts"):
            for copy in self.copies:
                setattr(copy, name, value)
        else:
            super().__setattr__(name, value)


def _step(executor: MockExecutor, plan: StepPlan, masks: StepMasks | None) -> StepResult:
    if len(plan.slots) or plan.route_reads:
        return executor.step(plan, masks if len(plan.masked) else None)
    assert masks is None or len(masks.rows) == 0
    assert not plan.new_rows and len(plan.page_ids) == len(plan.copy_src) == 0
    assert plan.step == executor._next_step
    executor._next_step += 1
    return StepResult(
        step=plan.step, token_ids=np.empty(0, np.int32), logprobs=np.empty(0, np.float32)
    )


class _Caches:
    """The pools of all copies; num_pages and page_size: of each."""

    def __init__(self, benches: Sequence[Bench]) -> None:
        self._caches = [bench.cache for bench in benches]
        self.num_pages, self.page_size = self._caches[0].num_pages, self._caches[0].page_size

    @property
    def num_available(self) -> int:
        """Of all together."""
        return sum(cache.num_available for cache in self._caches)


class CopiedBench(Bench):
    """See the module. settings: of `Bench`, for each copy."""

    def __init__(self, *, max_waiting: int = 65536, **settings: Any) -> None:
        super().__init__(**settings)
        benches = [Bench(**settings) for _ in range(NUM_COPIES)]
        self.cache = _Caches(benches)
        self.scheduler = DividedScheduler(
            [bench.scheduler for bench in benches],
            kv_tokens=self.cache.num_pages * self.cache.page_size,
            max_waiting=max_waiting,
        )
        self.executor = CopiedExecutor([bench.executor for bench in benches])
