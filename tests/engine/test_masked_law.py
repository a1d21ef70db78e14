"""Rows that ask for the masked law: the tokens are the same, and every number is of the law over
what their masks allow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.engine.test_masked_draw import VOCAB, Rows, masks_of, sampling_of
from tests.helpers.samplers import SAMPLERS

ALLOWED = {0: [3, 4, 17, 40], 2: [0, 5, 99, 100], 3: [7]}


def by_hand(logits_V: torch.Tensor, allowed: list[int], temperature: float) -> torch.Tensor:
    law = torch.full((VOCAB,), float("-inf"), dtype=torch.float64)
    divisor = temperature if temperature >= 1e-6 else 1.0
    law[allowed] = (logits_V[allowed].double() / divisor).log_softmax(-1)
    return law


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_numbers_are_those_of_the_tokens_that_may_come(name: str) -> None:
    fields = {k: v for k, v in SAMPLERS[name].items() if k != "stop_token_ids"}
    logits_SV = 3 * torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(3))
    plain = [sampling_of(**fields, seed=row, entropy=True, top_logprobs=3) for row in range(4)]
    asked = [
        sampling_of(
            **fields, seed=row, entropy=True, top_logprobs=3, logprob_ids=[1, 5], masked_law=row < 3
        )
        for row in range(4)
    ]
    masks = masks_of(ALLOWED)
    usual = Rows(*plain).draw(logits_SV, masks)
    drawn = Rows(*asked).draw(logits_SV, masks)
    assert drawn.token_S.tolist() == usual.token_S.tolist()
    # A row that asks and has no mask, and one that has a mask and does not ask, are as ever.
    for row in (1, 3):
        assert float(drawn.logprob_S[row]) == pytest.approx(float(usual.logprob_S[row]), abs=1e-6)
        assert float(drawn.entropy_S[row]) == pytest.approx(float(usual.entropy_S[row]), abs=1e-6)
    edited = any(fields.get(key) for key in ("logit_bias", "frequency_penalty", "presence_penalty"))
    if edited or fields.get("repetition_penalty", 1.0) != 1.0:
        return
    for row in (0, 2):
        law = by_hand(logits_SV[row], ALLOWED[row], asked[row].temperature)
        assert float(drawn.logprob_S[row]) == pytest.approx(
            float(law[int(drawn.token_S[row])]), abs=1e-4
        )
        spread = -(law.exp() * law)[ALLOWED[row]].sum()
        assert float(drawn.entropy_S[row]) == pytest.approx(float(spread), abs=1e-4)
        at = drawn.top.rows.tolist().index(row)
        np.testing.assert_allclose(
            drawn.top.logprobs[at, :3].double(), law.sort(descending=True).values[:3], atol=1e-4
        )
        np.testing.assert_allclose(drawn.top.logprobs[at, 3:5].double(), law[[1, 5]], atol=1e-4)


def test_a_row_that_is_broken_shows_it_in_the_masked_law_too() -> None:
    logits_SV = torch.zeros(1, VOCAB)
    logits_SV[0, 50] = float("nan")
    drawn = Rows(sampling_of(masked_law=True)).draw(logits_SV, masks_of({0: [3, 4]}))
    assert not bool(drawn.logprob_S.isfinite().any())
