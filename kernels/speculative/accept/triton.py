"""Acceptance on GPU: one program a row. R rows, K drafts of a row, J = K + 1, V = R * J."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.sampling.triton_philox import uniform
from kernels.speculative.accept.reference import FORCED_SEED

_FORCED_SEED = tl.constexpr(FORCED_SEED)


@triton.jit
def _accept_kernel(
    tokens_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    drafts_ptr: tl.tensor,
    drafted_ptr: tl.tensor,
    length_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    forced_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    context: tl.int32,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    length = tl.load(length_ptr + slot)
    left = tl.minimum(tl.load(limit_ptr + slot), context + 1) - length
    runs = (length > 0) & (left > 0)
    drafted = tl.minimum(tl.load(drafted_ptr + row), K)

    step = tl.arange(0, BLOCK)
    token = tl.load(tokens_ptr + row * (K + 1) + step, mask=step <= K, other=-1)
    draft = tl.load(drafts_ptr + row * K + step, mask=step < K, other=-2)
    hit = draft.to(tl.int64) == token
    forced = tl.load(forced_ptr + slot)
    if forced >= 0:
        drawn = uniform(slot ^ _FORCED_SEED, (length + 1 + step).to(tl.int64))
        hit = drawn < forced.to(tl.float64)
    missed = (step >= drafted) | (hit == 0)
    accepted = tl.min(tl.where(missed, step, K), axis=0)
    count = tl.where(runs, tl.minimum(accepted + 1, left), 0)

    at = length + step
    new_ptr = token_ids_ptr + slot * context + at
    tl.store(new_ptr, token.to(tl.int32), mask=(step < count) & (at < context))
    tl.store(length_ptr + slot, length + count, mask=runs)
    tl.store(counts_ptr + row, count)


def accept(
    tokens_V: torch.Tensor,
    slots_R: torch.Tensor,
    drafts_RK: torch.Tensor,
    drafted_R: torch.Tensor,
    length: torch.Tensor,
    limit: torch.Tensor,
    forced: torch.Tensor,
    token_ids: torch.Tensor,
    counts_R: torch.Tensor,
) -> None:
    """See `kernels.speculative.accept.accept`."""
    assert tokens_V.is_contiguous() and drafts_RK.is_contiguous() and token_ids.is_contiguous()
    num_rows, num_drafts = drafts_RK.shape
    if num_rows == 0:
        return
    _accept_kernel[(num_rows,)](
        tokens_V,
        slots_R,
        drafts_RK,
        drafted_R,
        length,
        limit,
        forced,
        token_ids,
        counts_R,
        token_ids.shape[1],
        K=num_drafts,
        BLOCK=triton.next_power_of_2(num_drafts + 1),
        num_warps=1,
    )
