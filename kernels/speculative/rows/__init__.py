"""A row and its drafts as virtual rows, each of which decodes one token.

Shapes: R rows, K most drafts of a row, J = K + 1, V = R * J virtual rows.

A decode step's attention and sampling serve virtual rows as they are: virtual row j of a sequence
of L tokens has its slot, takes the token at position L - 1 + j (the newest one, then the drafts)
and attends to L + j tokens. So what is sampled from it is what plain decoding would sample once
the drafts before it have come.
"""

from __future__ import annotations

import torch

from kernels.backend import KernelBackend, unknown_backend
from kernels.speculative.rows import reference
from kernels.speculative.rows.types import VirtualRows

__all__ = ["VirtualRows", "virtual_rows"]


def virtual_rows(
    slots_R: torch.Tensor,
    drafts_RK: torch.Tensor,
    drafted_R: torch.Tensor,
    *,
    length: torch.Tensor,
    limit: torch.Tensor,
    token_ids: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    scratch_slot: int,
    out: VirtualRows | None = None,
    backend: KernelBackend,
) -> VirtualRows:
    """The virtual rows of R rows, those of row r at [r * J, (r + 1) * J).

    slots_R: int32, distinct but for rows that pad the batch. drafts_RK: int32, contiguous; K may
    be 0, which is plain decoding. drafted_R: int32, drafts of each row that count, lowered in
    place to what its sequence may still grow by after the token that any step brings.
    length, limit: int32 [slots]; token_ids: int32 [slots, context], contiguous; see
    `kernels.speculative`. page_table: int32 [slots, columns], contiguous; pages of `page_size`
    tokens, which a row's valid positions have. scratch_slot: a slot with a page of nobody.
    out: buffers of V rows to fill, as `VirtualRows.empty` makes them; by default new ones.

    Virtual row j of a row is valid if the row is not inert and j <= drafted.
    Raises ValueError on an unknown backend.
    """
    num_rows, num_drafts = drafts_RK.shape
    if out is None:
        out = VirtualRows.empty(num_rows * (num_drafts + 1), drafts_RK.device)
    drafts = slots_R, drafts_RK, drafted_R
    tables = length, limit, token_ids, page_table
    if backend == "torch":
        reference.virtual_rows(*drafts, *tables, page_size, scratch_slot, out)
    elif backend == "triton":
        from kernels.speculative.rows import triton

        triton.virtual_rows(*drafts, *tables, page_size, scratch_slot, out)
    else:
        raise unknown_backend(backend)
    return out
