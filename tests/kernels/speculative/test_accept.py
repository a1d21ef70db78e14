"""Acceptance against a plain loop, forced acceptance by its rate, Triton against the reference."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.backend import KernelBackend
from kernels.sampling import philox_uniform
from kernels.speculative.accept import FORCED_SEED, accept
from kernels.testing import poison, triton_device
from tests.helpers.drafted_rows import NO_LIMIT, DraftedRows, drafted_rows


def counts_of(case: DraftedRows, backend: KernelBackend) -> torch.Tensor:
    counts_R = poison(torch.empty_like(case.drafted_R))
    accept(
        case.tokens_V,
        case.slots_R,
        case.drafts_RK,
        case.drafted_R,
        length=case.length,
        limit=case.limit,
        forced=case.forced,
        token_ids=case.token_ids,
        counts_R=counts_R,
        backend=backend,
    )
    return counts_R


def by_loop(case: DraftedRows) -> tuple[list[int], list[int], list[list[int]]]:
    """Counts of the rows, lengths and token tables afterwards."""
    context, num_drafts = case.token_ids.shape[1], case.drafts_RK.shape[1]
    length, texts, counts = case.length.tolist(), case.token_ids.tolist(), []
    for row, slot in enumerate(case.slots_R.tolist()):
        known, most = length[slot], min(int(case.limit[slot]), context + 1)
        drawn = case.tokens_V.tolist()[row * (num_drafts + 1) :]
        drafts = case.drafts_RK[row].tolist()[: int(case.drafted_R[row])]
        came = [drawn[0]] if 0 < known < most else []
        while came and len(came) <= len(drafts) and known + len(came) < most:
            nth = len(came)
            if not hits(case, slot, known + nth, drafts[nth - 1] == drawn[nth - 1]):
                break
            came.append(drawn[nth])
        for at, token in enumerate(came, known):
            if at < context:
                texts[slot][at] = token
        length[slot] = known + len(came)
        counts.append(len(came))
    return counts, length, texts


def hits(case: DraftedRows, slot: int, position: int, same: bool) -> bool:
    rate = float(case.forced[slot])
    if rate < 0:
        return same
    seed = torch.tensor([FORCED_SEED ^ slot])
    return float(philox_uniform(seed, torch.tensor([position]))) < rate


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False))
def test_reference_is_the_plain_loop(rng: random.Random) -> None:
    case = drafted_rows(rng)
    want_counts, want_length, want_texts = by_loop(case)
    assert counts_of(case, "torch").tolist() == want_counts
    assert case.length.tolist() == want_length
    assert case.token_ids.tolist() == want_texts


def undrawn_drafts(
    forced: float, *, known: int = 1, rows: int = 1, context: int = 64
) -> DraftedRows:
    """`rows` rows with 3 drafts each, none of which is what was drawn."""
    case = drafted_rows(random.Random(2), num_slots=rows, context=context, num_drafts=3)
    case.length[:-1], case.limit[:-1], case.forced[:] = known, NO_LIMIT, forced
    case.slots_R = torch.arange(rows, dtype=torch.int32)
    case.drafted_R = torch.full((rows,), 3, dtype=torch.int32)
    case.tokens_V = torch.arange(4 * rows) + 10
    case.drafts_RK = torch.zeros(rows, 3, dtype=torch.int32)
    return case


@pytest.mark.parametrize(("forced", "count"), [(-1.0, 1), (0.0, 1), (1.0, 4)])
def test_forced_acceptance_takes_none_or_all(forced: float, count: int) -> None:
    case = undrawn_drafts(forced)
    assert counts_of(case, "torch").tolist() == [count]
    assert case.token_ids[0, 1 : 1 + count].tolist() == [10, 11, 12, 13][:count]


def test_forced_acceptance_has_its_rate() -> None:
    """Over steps of many rows: independent, so the first of 3 is taken in half of all steps, and
    all of them in an eighth."""
    case = undrawn_drafts(0.5, rows=200, context=400)
    counts = torch.cat([counts_of(case, "torch") for _ in range(40)])
    share = torch.bincount(counts, minlength=5)[1:].double() / len(counts)
    want = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8], dtype=torch.float64)
    assert (share - want).abs().max() < 5 * (0.25 / len(counts)) ** 0.5


def test_a_row_never_passes_its_limit() -> None:
    case = undrawn_drafts(1.0, known=5)
    case.limit[0] = 7
    assert counts_of(case, "torch").tolist() == [2]
    assert counts_of(case, "torch").tolist() == [0]
    assert case.length[0] == 7


def test_the_token_behind_the_context_is_dropped() -> None:
    case = undrawn_drafts(1.0, known=63)
    assert counts_of(case, "torch").tolist() == [2]
    assert (int(case.length[0]), int(case.token_ids[0, 63])) == (65, 10)
    assert counts_of(case, "torch").tolist() == [0]


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="torch, triton"):
        counts_of(drafted_rows(random.Random(1)), "cuda")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(40))
def test_triton_matches_reference(seed: int) -> None:
    case = drafted_rows(random.Random(seed))
    moved = case.to(triton_device())
    want, got = counts_of(case, "torch"), counts_of(moved, "triton")
    assert torch.equal(got.cpu(), want)
    assert torch.equal(moved.length.cpu(), case.length)
    assert torch.equal(moved.token_ids.cpu(), case.token_ids)
