"""Virtual rows on GPU: one program a row. R rows, K drafts of a row, J = K + 1, V = R * J."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.speculative.rows.types import VirtualRows


@triton.jit
def _virtual_rows_kernel(
    slots_ptr: tl.tensor,
    drafts_ptr: tl.tensor,
    drafted_ptr: tl.tensor,
    length_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    page_table_ptr: tl.tensor,
    out_slots_ptr: tl.tensor,
    out_kv_lens_ptr: tl.tensor,
    out_positions_ptr: tl.tensor,
    out_input_ids_ptr: tl.tensor,
    out_write_slots_ptr: tl.tensor,
    out_valid_ptr: tl.tensor,
    context: tl.int32,
    num_columns: tl.int32,
    scratch_slot: tl.int32,
    PAGE_SIZE: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    length = tl.load(length_ptr + slot)
    left = tl.minimum(tl.load(limit_ptr + slot), context + 1) - length
    runs = (length > 0) & (left > 0)
    drafted = tl.minimum(tl.load(drafted_ptr + row), tl.minimum(left - 1, K))
    drafted = tl.where(runs, tl.maximum(drafted, 0), 0)
    tl.store(drafted_ptr + row, drafted)

    step = tl.arange(0, BLOCK)
    inside = step <= K
    valid = runs & (step <= drafted)
    position = tl.where(valid, length - 1 + step, 0)
    newest = tl.load(token_ids_ptr + slot * context + length - 1, mask=runs, other=0)
    drafts_mask = valid & (step > 0)
    draft = tl.load(drafts_ptr + row * K + step - 1, mask=drafts_mask, other=0)
    input_id = tl.where(valid, tl.where(step == 0, newest, draft), 0)
    home = tl.where(valid, slot, scratch_slot)
    page_ptr = page_table_ptr + home * num_columns + position // PAGE_SIZE
    page = tl.load(page_ptr, mask=inside, other=0).to(tl.int64)

    at = row * (K + 1) + step
    tl.store(out_slots_ptr + at, home.to(tl.int32), mask=inside)
    tl.store(out_kv_lens_ptr + at, position + 1, mask=inside)
    tl.store(out_positions_ptr + at, position.to(tl.int64), mask=inside)
    tl.store(out_input_ids_ptr + at, input_id.to(tl.int64), mask=inside)
    tl.store(out_write_slots_ptr + at, page * PAGE_SIZE + position % PAGE_SIZE, mask=inside)
    tl.store(out_valid_ptr + at, valid, mask=inside)


def virtual_rows(
    slots_R: torch.Tensor,
    drafts_RK: torch.Tensor,
    drafted_R: torch.Tensor,
    length: torch.Tensor,
    limit: torch.Tensor,
    token_ids: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    scratch_slot: int,
    out: VirtualRows,
) -> None:
    """See `kernels.speculative.rows.virtual_rows`."""
    assert drafts_RK.is_contiguous() and token_ids.is_contiguous() and page_table.is_contiguous()
    num_rows, num_drafts = drafts_RK.shape
    if num_rows == 0:
        return
    _virtual_rows_kernel[(num_rows,)](
        slots_R,
        drafts_RK,
        drafted_R,
        length,
        limit,
        token_ids,
        page_table,
        out.slots_V,
        out.kv_lens_V,
        out.positions_V,
        out.input_ids_V,
        out.write_slots_V,
        out.valid_V,
        token_ids.shape[1],
        page_table.shape[1],
        scratch_slot,
        PAGE_SIZE=page_size,
        K=num_drafts,
        BLOCK=triton.next_power_of_2(num_drafts + 1),
        num_warps=1,
    )
