"""Embeddings of prompts: the hidden states behind the final norm, pooled as the prompt is computed.

Legend: T tokens of a step, H hidden size, P prompts whose last token the step computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.batch import StepBatch
from engine.protocol import NewRow, Pooling, PromptEmbedding, StepPlan
from engine.transfer import Fetch


@dataclass
class _Wanted:
    """What one slot is to end with. sum_H: float32, of the hidden states so far, for a mean."""

    pooling: Pooling
    prompt_len: int
    sum_H: torch.Tensor | None = None


@dataclass(frozen=True)
class Pooled:
    """Embeddings of a step on their way to the host. rows: of the plan. values: float32 [P, H]."""

    rows: list[int]
    values: Fetch

    def embeddings(self) -> list[PromptEmbedding]:
        """Wait for them."""
        return [
            PromptEmbedding(row, own)
            for row, own in zip(self.rows, self.values.numpy(), strict=True)
        ]


class PromptPooler:
    """Pools the prompts of the rows that want it, over as many steps as each takes.

    A mean is summed in float32 on the device, whatever the model's dtype. Every rank holds whole
    hidden states, so every rank pools alike and none has to ask another.
    """

    def __init__(self) -> None:
        self._wanted: dict[int, _Wanted] = {}

    def enter(self, rows: Sequence[NewRow]) -> None:
        """Note which of the entering rows are embedded."""
        for row in rows:
            self._wanted.pop(row.slot, None)
            if row.pooling is not None:
                self._wanted[row.slot] = _Wanted(row.pooling, row.prompt_len)

    def pool(self, plan: StepPlan, batch: StepBatch, hidden_TH: torch.Tensor) -> Pooled | None:
        """Take in the hidden states of a step; the embeddings that it completes, if any."""
        if not self._wanted:
            return None
        rows, found = [], []
        for row in np.flatnonzero(np.isin(plan.slots, list(self._wanted))).tolist():
            slot = int(plan.slots[row])
            start, stop = batch.query_start_R1[row : row + 2].tolist()
            vector_H = _pooled(self._wanted[slot], int(plan.kv_lens[row]), hidden_TH[start:stop])
            if vector_H is not None:
                del self._wanted[slot]
                rows.append(row)
                found.append(vector_H)
        return Pooled(rows, Fetch(torch.stack(found))) if found else None


def _pooled(wanted: _Wanted, kv_len: int, hidden_nH: torch.Tensor) -> torch.Tensor | None:
    """Add the hidden states of a row's next n tokens; the embedding once that was all of them."""
    whole = kv_len == wanted.prompt_len
    if wanted.pooling == "last":
        return hidden_nH[-1].float() if whole else None
    sum_H = hidden_nH.sum(0, dtype=torch.float32)
    wanted.sum_H = sum_H if wanted.sum_H is None else wanted.sum_H + sum_H
    return wanted.sum_H / wanted.prompt_len if whole else None
