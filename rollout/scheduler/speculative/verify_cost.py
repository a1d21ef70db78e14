"""What a step should cost by its number of rows alone, before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Cost of a step of V rows, in steps of one row: max(1, V / flat_rows) + per_row * (V - 1).

    flat_rows: rows up to which reading the weights takes longer than computing with them.
    per_row: what each further row adds, as a share of a step of one row.
    """

    flat_rows: float
    per_row: float

    def step(self, num_rows: int, k: int) -> float:
        """The cost of a step of `num_rows` rows with k drafts each."""
        virtual = num_rows * (k + 1)
        return max(1.0, virtual / self.flat_rows) + self.per_row * (virtual - 1)


GPU_COSTS = CostModel(flat_rows=240.0, per_row=0.0)
"""240 rows: 724 TFLOP/s of bfloat16 products against 3.0 TB/s of memory, as measured on an H100."""

CPU_COSTS = CostModel(flat_rows=float("inf"), per_row=0.25)


def cost_model(device: str) -> CostModel:
    """The model for `EngineFacts.device`."""
    return CPU_COSTS if device == "cpu" else GPU_COSTS
