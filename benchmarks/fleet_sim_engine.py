"""An engine for `benchmarks/fleet_sim.py` whose steps take what a GPU's do: it sleeps that long.

Everything around it is real: the server, its scheduler and cache, the router. So a check on a
machine that is busy with other things checks what the simulator makes of a step's cost, not the
machine.
"""

from __future__ import annotations

import time

from engine.config import EngineConfig
from engine.protocol import StepPlan, StepResult
from tests.helpers.fake_executor import FakeExecutor

STEP_S, ROW_S, KV_S, PREFILL_S = 0.06, 0.003, 6e-6, 3e-4


class SteppingExecutor(FakeExecutor):
    """Sleeps in each step for its rows, what they read, and what it computes of prompts."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._ready_at = 0.0

    def execute(self, plan: StepPlan) -> StepResult:
        """See `FakeExecutor`."""
        found = super().execute(plan)
        rows = len(plan.slots)
        more = int(plan.query_lens.sum()) - rows
        seconds = STEP_S + ROW_S * rows + KV_S * int(plan.kv_lens.sum()) + PREFILL_S * more
        # What a sleep takes too long is no part of the next step's cost: a GPU is never late.
        now = time.perf_counter()
        begin = self._ready_at if now - self._ready_at < STEP_S / 2 else now
        self._ready_at = begin + seconds
        time.sleep(max(self._ready_at - now, 0.0))
        return found


def build(config: EngineConfig) -> SteppingExecutor:
    """The factory a spawned leader is given by name."""
    return SteppingExecutor(config)
