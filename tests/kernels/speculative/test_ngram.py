"""N-gram drafts against a loop and by hand, and Triton against the reference."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.backend import KernelBackend
from kernels.speculative.ngram import propose
from kernels.testing import triton_device
from tests.helpers.ngram_rows import NO_LIMIT, NgramRows, by_loop, ngram_rows


def drafts_of(case: NgramRows, backend: KernelBackend) -> tuple[list[list[int]], list[int]]:
    propose(**vars(case), backend=backend)
    return case.drafts_RK.tolist(), case.drafted_R.tolist()


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_reference_is_the_plain_loop(rng: random.Random) -> None:
    case = ngram_rows(rng)
    assert drafts_of(case, "torch") == by_loop(case)


def test_reference_is_the_plain_loop_over_many_batches() -> None:
    for seed in range(300):
        case = ngram_rows(random.Random(seed))
        assert drafts_of(case, "torch") == by_loop(case), seed


def test_reference_is_the_plain_loop_over_longer_text() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        case = ngram_rows(rng, num_slots=6, context=90, vocab=rng.choice([2, 4, 9]))
        assert drafts_of(case, "torch") == by_loop(case), seed


def test_a_match_is_looked_for_in_the_whole_token() -> None:
    """Tokens that share their low 16 bits are not the same."""
    assert one_row([2, 3, 9, 2 + 65536, 3, 8, 2, 3]) == ([9, 65538, 3, 8], 4)
    assert one_row([2, 3, 9, 2, 3 + 65536, 8, 2, 3]) == ([9, 2, 65539, 8], 4)


def one_row(
    text: list[int],
    *others: list[int],
    forced: float = -1.0,
    limit: int = NO_LIMIT,
    draft_len: int = 4,
    max_match: int = 16,
    min_match: int = 2,
) -> tuple[list[int], int]:
    """Drafts of a row of `text`, with `others` as sources: by turns slots and segments."""
    context = 40
    texts = [text, *others]
    token_ids = torch.full((len(texts), context), 77, dtype=torch.int32)
    segments = torch.zeros(len(texts), 2, dtype=torch.int32)
    history = torch.full((3 + sum(map(len, texts)),), 66, dtype=torch.int32)
    sources = torch.full((len(texts), len(others)), -1, dtype=torch.int32)
    at = 3
    for index, tokens in enumerate(texts):
        ids = torch.tensor(tokens, dtype=torch.int32)
        token_ids[index, : len(tokens)] = ids
        history[at : at + len(tokens)] = ids
        segments[index] = torch.tensor([at, len(tokens)])
        at += len(tokens)
        if index:
            sources[0, index - 1] = index if index % 2 else -2 - index
    case = NgramRows(
        slots_R=torch.zeros(1, dtype=torch.int32),
        draft_lens_R=torch.tensor([draft_len], dtype=torch.int32),
        length=torch.tensor([len(tokens) for tokens in texts], dtype=torch.int32),
        limit=torch.full((len(texts),), limit, dtype=torch.int32),
        forced=torch.full((len(texts),), forced),
        token_ids=token_ids,
        sources=sources,
        history=history,
        segments=segments,
        drafts_RK=torch.full((1, 4), -7, dtype=torch.int32),
        drafted_R=torch.full((1,), -7, dtype=torch.int32),
        max_match=max_match,
        min_match=min_match,
    )
    drafts, drafted = drafts_of(case, "torch")
    return drafts[0], drafted[0]


def test_own_text_goes_on_as_before() -> None:
    assert one_row([5, 6, 7, 8, 9, 1, 5, 6]) == ([7, 8, 9, 1], 4)


def test_no_match_gives_no_draft() -> None:
    assert one_row([5, 6, 7], [5, 6, 7], [6, 8, 7, 1]) == ([0, 0, 0, 0], 0)


def test_the_longest_match_wins_over_the_latest_and_over_votes() -> None:
    text = [1, 2, 3, 9, 2, 3, 8, 1, 2, 3]
    assert one_row(text, [2, 3, 8], [2, 3, 8]) == ([9, 2, 3, 8], 4)


def test_of_equal_matches_in_a_source_the_latest_wins() -> None:
    assert one_row([2, 3, 9, 2, 3, 8, 2, 3], draft_len=1) == ([8, 0, 0, 0], 1)


def test_matches_longer_than_the_most_are_equal() -> None:
    text = [1, 2, 3, 9, 2, 3, 8, 1, 2, 3]
    assert one_row(text, max_match=2, draft_len=1) == ([8, 0, 0, 0], 1)


def test_votes_win_over_order_and_order_over_nothing() -> None:
    text = [2, 3, 9, 2, 3]
    assert one_row(text, [2, 3, 8], [4, 2, 3, 8, 6]) == ([8, 0, 0, 0], 1)
    assert one_row(text, [2, 3, 8]) == ([9, 2, 3, 0], 3)
    assert one_row([1, 2, 3], [2, 3, 8], [2, 3, 7, 7]) == ([8, 0, 0, 0], 1)


def test_a_source_that_ends_gives_what_it_has() -> None:
    assert one_row([2, 3], [2, 3, 8, 9]) == ([8, 9, 0, 0], 2)
    assert one_row([2, 3], [2, 3]) == ([0, 0, 0, 0], 0)


def test_matches_are_as_long_as_asked() -> None:
    assert one_row([4, 3], [2, 3, 8], min_match=1) == ([8, 0, 0, 0], 1)
    assert one_row([1, 2, 3], [2, 3, 8], min_match=3) == ([0, 0, 0, 0], 0)
    assert one_row([3], [2, 3, 8], min_match=2) == ([0, 0, 0, 0], 0)


def test_drafts_leave_room_for_the_token_that_always_comes() -> None:
    text = [5, 6, 7, 8, 9, 1, 5, 6]
    assert one_row(text, limit=11) == ([7, 8, 0, 0], 2)
    assert one_row(text, limit=9) == ([0, 0, 0, 0], 0)
    assert one_row(text, limit=8) == ([0, 0, 0, 0], 0)


def test_forced_rows_get_what_they_ask_for() -> None:
    assert one_row([1, 2, 3], forced=0.0, draft_len=3) == ([0, 0, 0, 0], 3)
    assert one_row([2, 3], [2, 3, 8], forced=0.5) == ([8, 0, 0, 0], 4)
    assert one_row([2, 3], [2, 3, 8], forced=0.5, limit=5) == ([8, 0, 0, 0], 2)


@pytest.mark.parametrize(("max_match", "min_match"), [(16, 0), (2, 3)])
def test_match_lengths_that_nothing_can_have_are_refused(max_match: int, min_match: int) -> None:
    with pytest.raises(ValueError, match="min_match must be from 1 to max_match"):
        one_row([1, 2], max_match=max_match, min_match=min_match)


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="torch, triton"):
        drafts_of(ngram_rows(random.Random(1)), "cuda")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(60))
def test_triton_matches_reference(seed: int) -> None:
    rng = random.Random(seed)
    context, vocab = rng.choice([(24, 1), (24, 2), (90, 3), (1500, 2), (2100, 30)])
    case = ngram_rows(rng, context=context, vocab=vocab)
    moved = case.to(triton_device())
    assert drafts_of(moved, "triton") == drafts_of(case, "torch")


@pytest.mark.gpu
@pytest.mark.parametrize("num_slots", [1, 300])
def test_triton_matches_reference_whatever_shares_a_source(num_slots: int) -> None:
    if num_slots > 1 and triton_device() == "cpu":
        pytest.skip("hundreds of rows: only on a GPU")
    rng = random.Random(num_slots)
    case = ngram_rows(rng, num_slots=num_slots, context=5000, num_sources=16, vocab=6)
    case.slots_R = torch.arange(num_slots, dtype=torch.int32)
    case.draft_lens_R = torch.full((num_slots,), 7, dtype=torch.int32)
    case.drafts_RK = torch.full((num_slots, 7), -7, dtype=torch.int32)
    case.drafted_R = torch.full((num_slots,), -7, dtype=torch.int32)
    moved = case.to(triton_device())
    assert drafts_of(moved, "triton") == drafts_of(case, "torch")
