"""Virtual rows against a plain loop, and Triton against the reference."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.backend import KernelBackend
from kernels.speculative.rows import VirtualRows, virtual_rows
from kernels.testing import assert_close, poisoned_allocations, triton_device
from tests.helpers.drafted_rows import DraftedRows, drafted_rows


def rows_of(case: DraftedRows, backend: KernelBackend) -> VirtualRows:
    with poisoned_allocations():
        return virtual_rows(
            case.slots_R,
            case.drafts_RK,
            case.drafted_R,
            length=case.length,
            limit=case.limit,
            token_ids=case.token_ids,
            page_table=case.page_table,
            page_size=case.page_size,
            scratch_slot=case.scratch_slot,
            backend=backend,
        )


def by_loop(case: DraftedRows) -> tuple[list[tuple[int, int, int, int, int, bool]], list[int]]:
    """A virtual row's (slot, KV length, position, token, write slot, valid), and `drafted`."""
    context, (_, num_drafts) = case.token_ids.shape[1], case.drafts_RK.shape
    rows, drafted = [], []
    for row, slot in enumerate(case.slots_R.tolist()):
        text = case.token_ids[slot].tolist()
        known, most = int(case.length[slot]), min(int(case.limit[slot]), context + 1)
        runs = 0 < known < most
        drafts = case.drafts_RK[row].tolist()[: int(case.drafted_R[row])] if runs else []
        while runs and known + len(drafts) + 1 > most:
            drafts.pop()
        drafted.append(len(drafts))
        inputs = [text[known - 1], *drafts] if runs else []
        for j in range(num_drafts + 1):
            valid = j < len(inputs)
            home, at = (slot, known - 1 + j) if valid else (case.scratch_slot, 0)
            page = int(case.page_table[home, at // case.page_size])
            place = page * case.page_size + at % case.page_size
            rows.append((home, at + 1, at, inputs[j] if valid else 0, place, valid))
    return rows, drafted


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False))
def test_reference_is_the_plain_loop(rng: random.Random) -> None:
    case = drafted_rows(rng)
    want, want_drafted = by_loop(case)
    got = rows_of(case, "torch")
    assert list(zip(*(getattr(got, name).tolist() for name in FIELDS), strict=True)) == want
    assert case.drafted_R.tolist() == want_drafted


FIELDS = ("slots_V", "kv_lens_V", "positions_V", "input_ids_V", "write_slots_V", "valid_V")
DTYPES = (torch.int32, torch.int32, torch.int64, torch.int64, torch.int64, torch.bool)


def test_buffers_are_filled_in_place() -> None:
    case = drafted_rows(random.Random(1), num_drafts=2)
    want = rows_of(case, "torch")
    out = VirtualRows.empty(len(want.slots_V), torch.device("cpu"))
    before = [getattr(out, name).data_ptr() for name in FIELDS]
    tables = {name: getattr(case, name) for name in ("length", "limit", "token_ids", "page_table")}
    sizes = {"page_size": case.page_size, "scratch_slot": case.scratch_slot}
    drafts = case.slots_R, case.drafts_RK, case.drafted_R
    assert virtual_rows(*drafts, **tables, **sizes, out=out, backend="torch") is out
    assert [getattr(out, name).data_ptr() for name in FIELDS] == before
    for name, dtype in zip(FIELDS, DTYPES, strict=True):
        assert getattr(out, name).dtype == dtype
        assert torch.equal(getattr(out, name), getattr(want, name)), name


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="torch, triton"):
        rows_of(drafted_rows(random.Random(1)), "cuda")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(40))
def test_triton_matches_reference(seed: int) -> None:
    case = drafted_rows(random.Random(seed))
    want, moved = rows_of(case, "torch"), case.to(triton_device())
    moved.drafted_R.copy_(drafted_rows(random.Random(seed)).drafted_R)
    got = rows_of(moved, "triton")
    for name in FIELDS:
        assert_close(name, getattr(got, name).cpu().int(), getattr(want, name).int(), torch.float32)
    assert torch.equal(moved.drafted_R.cpu(), case.drafted_R)
