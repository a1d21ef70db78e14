"""Which steps score prompt tokens, and that the scorer forgets a row it is done with."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.prompt_logprobs import PromptScorer
from engine.protocol import NewRow, StepPlan
from engine.sampling import Sampler
from tests.engine.test_sampling import PLAIN, changed

PROMPT = [3, 1, 4, 1, 5]


class Rising:
    """A model whose logits are the ids, whatever comes before."""

    def compute_logits(self, hidden_nH: torch.Tensor) -> torch.Tensor:
        return torch.arange(8.0).expand(len(hidden_nH), 8)


class Uniform:
    """A model whose every logit is zero."""

    def compute_logits(self, hidden_nH: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(hidden_nH), 8)


def plan(query_len: int, kv_len: int) -> StepPlan:
    none = np.zeros(0, np.int32)
    return StepPlan(
        step=0,
        new_rows=[],
        page_slots=none,
        page_columns=none,
        page_ids=none,
        copy_src=none,
        copy_dst=none,
        slots=np.array([2], np.int32),
        query_lens=np.array([query_len], np.int32),
        kv_lens=np.array([kv_len], np.int32),
        samples=np.array([kv_len >= len(PROMPT)]),
    )


def test_every_position_is_scored_once_and_then_the_row_is_forgotten() -> None:
    sampler = Sampler(num_slots=4, device=torch.device("cpu"), backend="torch")
    scorer = PromptScorer(Uniform(), sampler)
    row = NewRow(
        slot=2,
        token_ids=np.array(PROMPT, np.int32),
        prompt_len=len(PROMPT),
        sampling=PLAIN,
        prompt_logprob_start=0,
    )
    sampler.enter([row])
    scorer.enter([row])
    scored = []
    for query_len, kv_len in ((2, 2), (3, 5)):
        step = plan(query_len, kv_len)
        assert scorer.wants(step)
        batch = SimpleNamespace(query_start_R1=np.array([0, query_len]))
        for part in scorer.score(step, batch, torch.zeros(query_len, 4)):
            scored += range(part.start, part.start + len(part.logprobs))
            np.testing.assert_allclose(part.logprobs, -np.log(8), rtol=1e-6)
    assert scored == [1, 2, 3, 4]
    assert scorer._wanted == {}
    assert not scorer.wants(plan(1, 6))


@pytest.mark.parametrize("top", [0, 2])
def test_tokens_are_scored_by_name_at_every_position(top: int) -> None:
    sampler = Sampler(num_slots=4, device=torch.device("cpu"), backend="torch")
    scorer = PromptScorer(Rising(), sampler)
    row = NewRow(
        slot=2,
        token_ids=np.array(PROMPT, np.int32),
        prompt_len=len(PROMPT),
        sampling=changed(top_logprobs=top, logprob_ids=[6, 0, 6]),
        prompt_logprob_start=2,
    )
    sampler.enter([row])
    scorer.enter([row])
    batch = SimpleNamespace(query_start_R1=np.array([0, 5]))
    [part] = scorer.score(plan(5, 5), batch, torch.zeros(5, 4))
    assert part.top is not None and part.start == 2
    ids = [*[7, 6][:top], 6, 0, 6]
    assert part.top.ids.tolist() == [ids] * 3
    want = torch.arange(8.0).log_softmax(-1)[ids]
    np.testing.assert_allclose(part.top.logprobs, want.expand(3, -1), rtol=1e-6)
