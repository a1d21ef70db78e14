"""The fake engine with steps that last, so that a fault finds requests open."""

from __future__ import annotations

import time
from typing import Any

from engine.config import EngineConfig
from engine.protocol import StepPlan
from tests.helpers.fake_ranks import FakeRank

STEP_S = 0.02


class SlowRank(FakeRank):
    """One rank, of which every step takes at least STEP_S."""

    def launch(self, plan: StepPlan) -> Any:
        """Queue the step after a while."""
        time.sleep(STEP_S)
        return super().launch(plan)

    def execute(self, plan: StepPlan) -> Any:
        """Run the step after a while."""
        time.sleep(STEP_S)
        return super().execute(plan)


def build(config: EngineConfig, *, rank: int = 0, meeting_place: str = "") -> SlowRank:
    """The factory of every rank."""
    return SlowRank(config, rank, meeting_place)
