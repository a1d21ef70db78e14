"""The fake executor at a pace: a step takes milliseconds, so that a test can act meanwhile."""

from __future__ import annotations

import time

from engine.config import EngineConfig
from engine.protocol import StepPlan, StepResult
from tests.helpers.fake_executor import FakeExecutor

STEP_S = 0.01


class PacedExecutor(FakeExecutor):
    """Sleeps before each step."""

    def execute(self, plan: StepPlan) -> StepResult:
        """See `FakeExecutor`."""
        time.sleep(STEP_S)
        return super().execute(plan)


def build(config: EngineConfig) -> PacedExecutor:
    """The factory a spawned leader is given by name."""
    return PacedExecutor(config)
