"""KV writes in plain torch. T tokens, K kv heads, D head dim, N pages, G page size, L layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def write_kv(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_pages_NGKD: torch.Tensor,
    v_pages_NGKD: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """See `kernels.kv_copy.write_kv`."""
    slots_T = slots_T.long()
    kept_T = slots_T >= 0
    if not bool(kept_T.all()):
        slots_T, k_TKD, v_TKD = slots_T[kept_T], k_TKD[kept_T], v_TKD[kept_T]
    num_heads, head_dim = k_pages_NGKD.shape[2:]
    k_pages_NGKD.view(-1, num_heads, head_dim).index_copy_(0, slots_T, k_TKD)
    v_pages_NGKD.view(-1, num_heads, head_dim).index_copy_(0, slots_T, v_TKD)


def copy_pages(pages: Sequence[torch.Tensor], src_C: torch.Tensor, dst_C: torch.Tensor) -> None:
    """See `kernels.kv_copy.copy_pages`."""
    src_C, dst_C = src_C.long(), dst_C.long()
    for pages_LN in pages:
        pages_LN.index_copy_(1, dst_C, pages_LN.index_select(1, src_C))
