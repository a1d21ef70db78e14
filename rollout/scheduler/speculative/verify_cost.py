"""What a step should cost by its number of rows alone, before anything is measured."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True)
class CostModel:
    """Cost of a step by its rows, in steps of one row: straight lines between `points`, (rows,
    cost) in ascending order, and on beyond the last two."""

    points: tuple[tuple[int, float], ...]

    def step(self, num_rows: int, k: int) -> float:
        """The cost of a step of `num_rows` rows with k drafts each."""
        virtual = num_rows * (k + 1)
        place = min(max(bisect_right(self.points, (virtual, 0.0)), 1), len(self.points) - 1)
        (left, low), (right, high) = self.points[place - 1], self.points[place]
        return low + (high - low) * (virtual - left) / (right - left)


GPU_COSTS = CostModel(((1, 1.0), (240, 1.0), (480, 2.0)))
"""Up to 240 rows reading the weights takes longer than computing with them: 724 TFLOP/s of bfloat16
products against 3.0 TB/s of memory, as measured on an H100."""

CPU_COSTS = CostModel(
    ((1, 1.0), (2, 1.03), (4, 1.74), (8, 2.27), (16, 2.33), (32, 3.19), (64, 4.74))
)
"""SmolLM2-135M in float32 on one core of a Xeon, 32 to 40 tokens of context: processor time of a
decode step, the smallest of many. One step of one row took 67 ms."""


def cost_model(device: str) -> CostModel:
    """The model for `EngineFacts.device`."""
    return CPU_COSTS if device == "cpu" else GPU_COSTS
