"""Filter masks against sets built one token at a time."""

from __future__ import annotations

import math
import random

import pytest
import torch

from kernels.sampling import filters
from kernels.sampling.filters import filtered_rows, keep_mask


def with_sets(scaled: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    if 0 < top_k < len(order):
        order = order[:top_k]
    weights = [math.exp(scaled[token] - scaled[order[0]]) for token in order]
    kept: set[int] = set()
    mass = 0.0
    for token, weight in zip(order, weights, strict=True):
        if top_p < 1 and kept and mass >= top_p * sum(weights):
            break
        kept.add(token)
        mass += weight
    floor = scaled[order[0]] + math.log(min_p) if min_p > 0 else -math.inf
    return {token for token in kept if scaled[token] >= floor}


@pytest.mark.parametrize("candidates", [8, 512])
def test_masks_equal_the_sets(candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few candidates send most rows through the full sort, many send none."""
    monkeypatch.setattr(filters, "CANDIDATES", candidates)
    rng, rows = random.Random(1), 5
    for trial in range(60):
        vocab = rng.choice([5, 16, 63, 100])
        scaled = torch.randn(rows, vocab) * rng.choice([0.3, 1.0, 4.0])
        if trial % 2:
            scaled = (scaled * 2).round() / 2  # many ties
        top_k = [rng.choice([-1, 0, 1, 5, 17, 40, 200]) for _ in range(rows)]
        top_p = [rng.choice([1.0, 0.9, 0.5, 0.05, 0.99]) for _ in range(rows)]
        min_p = [rng.choice([0.0, 0.1, 0.5]) for _ in range(rows)]
        mask = keep_mask(
            scaled,
            torch.tensor(top_k),
            torch.tensor(top_p, dtype=torch.float64),
            torch.tensor(min_p),
        )
        for row in range(rows):
            want = with_sets(scaled[row].tolist(), top_k[row], top_p[row], min_p[row])
            assert set(mask[row].nonzero().squeeze(1).tolist()) == want, (trial, row)


def test_ties_keep_the_lowest_ids() -> None:
    mask = keep_mask(torch.zeros(1, 10), torch.tensor([3]), None, None)
    assert mask[0].nonzero().squeeze(1).tolist() == [0, 1, 2]


def test_the_likeliest_token_stays_under_the_tightest_filters() -> None:
    scaled = torch.tensor([[0.0, 3.0, 1.0]])
    mask = keep_mask(scaled, None, torch.tensor([1e-9]), torch.tensor([1.0]))
    assert mask.tolist() == [[False, True, False]]


def test_banned_tokens_do_not_count() -> None:
    scaled = torch.full((1, 20), float("-inf"))
    scaled[0, [4, 9]] = 1.0
    mask = keep_mask(scaled, None, torch.tensor([0.7]), torch.tensor([0.0]))
    assert mask[0, [4, 9]].all()


def test_rows_with_a_filter_are_found() -> None:
    greedy = torch.tensor([False, False, True, False])
    top_k, top_p = torch.tensor([0, 5, 5, -1]), torch.tensor([1.0, 1.0, 0.5, 0.9])
    found = filtered_rows((top_k, top_p, None), greedy)
    assert found is not None and found.tolist() == [1, 3]
    assert filtered_rows((torch.tensor([0, 0, 5, 0]), None, torch.zeros(4)), greedy) is None
    assert filtered_rows((None, None, None), greedy) is None
