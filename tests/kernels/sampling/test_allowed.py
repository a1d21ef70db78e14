"""Draws among allowed tokens on a CPU: by the law over these, with the logprob of the whole one; and
which rows are left to another way."""

from __future__ import annotations

import pytest
import torch

from kernels.sampling import sample
from kernels.sampling.allowed import sample_allowed

VOCAB = 700
ROWS = 64


def inputs(temperature: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    logits_SV = 3 * torch.randn(ROWS, VOCAB, generator=generator)
    allowed_SV = torch.rand(ROWS, VOCAB, generator=generator) < 0.1
    rows = torch.arange(ROWS)
    return logits_SV, torch.full((ROWS,), temperature), rows, 3 * rows, allowed_SV


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 1.7])
def test_tokens_and_numbers(temperature: float) -> None:
    logits_SV, temperature_S, seed_S, position_S, allowed_SV = inputs(temperature)
    entropy_S, want_S = torch.empty(ROWS), torch.empty(ROWS)
    token_S, logprob_S, settled_S = sample_allowed(
        logits_SV, temperature_S, seed_S, position_S, allowed_SV, entropy_S
    )
    masked_SV = logits_SV.masked_fill(~allowed_SV, float("-inf"))
    alone_S, _ = sample(masked_SV, temperature_S, seed_S, position_S, backend="torch")
    sample(logits_SV, temperature_S, seed_S, position_S, entropy_S=want_S, backend="torch")
    assert bool(settled_S.all()) and token_S.tolist() == alone_S.tolist()
    law_SV = (logits_SV.double() / (temperature or 1.0)).log_softmax(-1)
    chosen_S = law_SV.gather(1, token_S.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprob_S.double(), chosen_S, atol=1e-4, rtol=0)
    torch.testing.assert_close(entropy_S, want_S)


def test_rows_that_are_not_settled() -> None:
    logits_SV, temperature_S, seed_S, position_S, allowed_SV = inputs(1.0)
    logits_SV[0][allowed_SV[0]] = -200.0
    logits_SV[1, 5] = float("nan")
    logits_SV[2, 5] = float("inf")
    logits_SV[3] = float("-inf")
    before = logits_SV.clone()
    *_, settled_S = sample_allowed(logits_SV, temperature_S, seed_S, position_S, allowed_SV)
    assert (~settled_S).nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert torch.equal(before.nan_to_num(), logits_SV.nan_to_num())


def test_a_row_does_not_depend_on_the_others() -> None:
    logits_SV, temperature_S, seed_S, position_S, allowed_SV = inputs(1.0)
    token_S, logprob_S, _ = sample_allowed(logits_SV, temperature_S, seed_S, position_S, allowed_SV)
    for row in range(0, ROWS, 9):
        one = slice(row, row + 1)
        token, logprob, _ = sample_allowed(
            logits_SV[one], temperature_S[one], seed_S[one], position_S[one], allowed_SV[one]
        )
        assert (int(token), float(logprob)) == (int(token_S[row]), float(logprob_S[row]))
