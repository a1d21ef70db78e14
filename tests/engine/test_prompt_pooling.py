"""Pooling of prompts over the steps of their slots, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.pending import PendingStep
from engine.prompt_pooling import Pooled, PromptPooler
from engine.protocol import NO_INTS, NewRow, Pooling, StepPlan
from engine.speculative.resolve import as_runs
from engine.transfer import Fetch
from rollout.scheduler.continued import begin
from tests.helpers.scheduling import make_request

HIDDEN = 3


def row(slot: int, size: int, pooling: Pooling | None) -> NewRow:
    sequence = begin(make_request("a", range(size)), 0, context_length=64)
    return NewRow(
        slot=slot,
        token_ids=sequence.tokens,
        prompt_len=size,
        sampling=sequence.row_sampling(),
        pooling=pooling,
    )


def plan(*rows: tuple[int, int, int], samples: list[bool] | None = None) -> StepPlan:
    """rows: slot, tokens computed, and tokens with KV afterwards."""
    slots, lens, kv_lens = np.array(rows, np.int32).T
    return StepPlan(
        step=0,
        new_rows=[],
        page_slots=NO_INTS,
        page_columns=NO_INTS,
        page_ids=NO_INTS,
        copy_src=NO_INTS,
        copy_dst=NO_INTS,
        slots=slots,
        query_lens=lens,
        kv_lens=kv_lens,
        samples=np.array(samples or [False] * len(rows)),
    )


def pooled(pooler: PromptPooler, step: StepPlan, hidden_TH: torch.Tensor) -> dict[int, list[float]]:
    """By row, the embeddings that a step completes."""
    starts = np.concatenate([[0], np.cumsum(step.query_lens)])
    batch: Any = SimpleNamespace(query_start_R1=starts)
    found = pooler.pool(step, batch, hidden_TH)
    return {} if found is None else {own.row: own.values.tolist() for own in found.embeddings()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_several_rows_are_kept_apart(dtype: torch.dtype) -> None:
    states = {slot: torch.randn(5, HIDDEN).to(dtype) for slot in (2, 4)}
    pooler = PromptPooler()
    pooler.enter([row(2, 5, "mean"), row(4, 5, "last"), row(3, 9, None)])
    other = torch.full((1, HIDDEN), torch.nan, dtype=dtype)
    first = torch.cat([states[4][:2], other, states[2][:3]])
    assert pooled(pooler, plan((4, 2, 2), (3, 1, 1), (2, 3, 3)), first) == {}
    found = pooled(pooler, plan((2, 2, 5), (4, 3, 5)), torch.cat([states[2][3:], states[4][2:]]))
    assert found[0] == pytest.approx(states[2].float().mean(0).tolist(), rel=1e-5)
    assert found[1] == states[4][-1].float().tolist()


def test_whoever_enters_a_slot_has_nothing_of_who_left_it() -> None:
    pooler, ones = PromptPooler(), torch.ones(2, HIDDEN)
    pooler.enter([row(1, 4, "mean")])
    assert pooled(pooler, plan((1, 2, 2)), ones) == {}
    pooler.enter([row(1, 4, None)])
    assert pooled(pooler, plan((1, 2, 4)), ones) == {}
    pooler.enter([row(1, 4, "mean")])
    pooled(pooler, plan((1, 2, 2)), ones)
    pooler.enter([row(1, 4, "mean")])
    pooled(pooler, plan((1, 2, 2)), 3 * ones)
    assert pooled(pooler, plan((1, 2, 4)), ones) == {0: [2.0] * HIDDEN}


def test_rows_are_those_of_the_plan_where_some_had_ended() -> None:
    step = plan((1, 1, 5), (2, 1, 6), (3, 2, 4), samples=[True, True, False])
    values = torch.ones(1, HIDDEN)
    pending = PendingStep(0, pooled=Pooled([1], Fetch(values)))
    kept_R = np.array([False, True, True])
    (own,) = as_runs(pending, step, kept_R).pooled.embeddings()
    assert (own.row, own.values.tolist()) == (2, [1.0] * HIDDEN)
