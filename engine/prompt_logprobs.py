"""Logprobs of prompt tokens, for the rows that ask for them.

Legend: n scored positions of a row, H hidden, V vocabulary, k likeliest tokens, N named ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.batch import StepBatch
from engine.models.build import Model
from engine.protocol import NewRow, PromptLogprobs, StepPlan
from engine.sampling import Sampler, to_top
from kernels.sampling import named_logprobs, token_logprobs, top_logprobs

# Positions scored at once: the float32 logits of a piece take this many times V * 4 bytes.
PIECE = 256


@dataclass(frozen=True)
class _Wanted:
    """What one slot still wants: positions [start, stop) of its prompt; at each, the `top`
    likeliest tokens and those of `named`, int64 [N]."""

    start: int
    token_ids: torch.Tensor
    top: int
    named: torch.Tensor


class PromptScorer:
    """Scores the prompt tokens that each step computes the predecessors of."""

    def __init__(self, model: Model, sampler: Sampler) -> None:
        self._model = model
        self._sampler = sampler
        self._wanted: dict[int, _Wanted] = {}

    def enter(self, rows: Sequence[NewRow]) -> None:
        """Note which of the entering rows want prompt logprobs."""
        for row in rows:
            self._wanted.pop(row.slot, None)
            if row.prompt_logprob_start >= 0:
                ids = torch.from_numpy(row.token_ids[: row.prompt_len].astype("int64"))
                # Nothing precedes position 0, so it has no logprob.
                start = max(row.prompt_logprob_start, 1)
                named = torch.tensor(row.sampling.logprob_ids, dtype=torch.int64)
                self._wanted[row.slot] = _Wanted(start, ids, row.sampling.top_logprobs, named)

    def wants(self, plan: StepPlan) -> bool:
        """Whether the step makes any prompt token scorable that somebody asked for."""
        if not self._wanted:
            return False
        rows = zip(plan.slots.tolist(), plan.query_lens, plan.kv_lens, strict=True)
        return any(
            slot in self._wanted and kv_len - query_len + 1 < len(self._wanted[slot].token_ids)
            for slot, query_len, kv_len in rows
        )

    def score(
        self, plan: StepPlan, batch: StepBatch, hidden_TH: torch.Tensor
    ) -> list[PromptLogprobs]:
        """Score what this step made scorable: the hidden state at position p - 1 gives p."""
        if not self._wanted:
            return []
        found = []
        for row, slot in enumerate(plan.slots.tolist()):
            wanted = self._wanted.get(slot)
            if wanted is None:
                continue
            kv_len, query_len = int(plan.kv_lens[row]), int(plan.query_lens[row])
            start = max(wanted.start, kv_len - query_len + 1)
            stop = min(len(wanted.token_ids), kv_len + 1)
            if stop == len(wanted.token_ids):
                # Nothing is left to score: later decode steps need not look at their rows.
                del self._wanted[slot]
            if start < stop:
                first = int(batch.query_start_R1[row]) + start - 1 - (kv_len - query_len)
                hidden = hidden_TH[first : first + stop - start]
                found.append(self._score_row(row, slot, wanted, start, hidden))
        return found

    def _score_row(
        self, row: int, slot: int, wanted: _Wanted, start: int, hidden_nH: torch.Tensor
    ) -> PromptLogprobs:
        stop = start + len(hidden_nH)
        targets = wanted.token_ids[start:stop].to(hidden_nH.device)
        slots = torch.full((len(targets),), slot, device=hidden_nH.device)
        temperature = self._sampler.temperature(slots)
        named_N = wanted.named.to(hidden_nH.device)
        logprobs, ids, tops = [], [], []
        for at in range(0, len(targets), PIECE):
            piece = slice(at, at + PIECE)
            logits = self._model.compute_logits(hidden_nH[piece])
            logprobs.append(token_logprobs(logits, targets[piece], temperature[piece]))
            if wanted.top or len(named_N):
                top_ids, top_values = top_logprobs(logits, temperature[piece], wanted.top)
                ids_nN = named_N.expand(len(logits), -1)
                named_values = named_logprobs(logits, temperature[piece], ids_nN)
                ids.append(torch.cat([top_ids, ids_nN.int()], dim=1))
                tops.append(torch.cat([top_values, named_values], dim=1))
        return PromptLogprobs(
            row=row,
            start=start,
            logprobs=torch.cat(logprobs).cpu().numpy(),
            top=to_top(torch.cat(ids), torch.cat(tops)) if tops else None,
        )
