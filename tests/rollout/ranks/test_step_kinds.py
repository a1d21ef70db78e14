"""A step that may have to build something first is told from those that ran before."""

from __future__ import annotations

import numpy as np

from engine.protocol import IntArray, StepPlan
from rollout.ranks.step_kinds import StepKinds

NONE: IntArray = np.empty(0, np.int32)


def plan(num_rows: int, drafts: list[int] | None = None) -> StepPlan:
    """A step of rows that decode. drafts: most drafts of each; None where lengths are known."""
    ones = np.ones(num_rows, np.int32)
    return StepPlan(
        step=0,
        new_rows=[],
        page_slots=NONE,
        page_columns=NONE,
        page_ids=NONE,
        copy_src=NONE,
        copy_dst=NONE,
        slots=np.arange(num_rows, dtype=np.int32),
        query_lens=ones,
        kv_lens=9 * ones,
        samples=np.ones(num_rows, np.bool_),
        draft_lens=NONE if drafts is None else np.array(drafts, np.int32),
    )


def test_drafts_make_a_kind_of_their_own() -> None:
    kinds = StepKinds()
    kinds.launched(kinds.of(plan(3)))
    assert not kinds.is_new(kinds.of(plan(2)))
    for drafts in ([0, 0, 0], [1, 0, 1], [3, 3, 2]):
        assert kinds.is_new(kinds.of(plan(3, drafts)))
        kinds.launched(kinds.of(plan(3, drafts)))
    assert not kinds.is_new(kinds.of(plan(3, [0, 3, 0])))
    assert kinds.is_new(kinds.of(plan(3, [7, 3, 0])))
    assert kinds.is_new(kinds.of(plan(9, [3] * 9)))
