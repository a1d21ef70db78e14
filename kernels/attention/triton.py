"""Paged attention on GPU: each row goes to the kernel that its own query count asks for.

A row of one query takes the decode kernels also in a step where other rows prefill: what it
gets never depends on its batch.
"""

from __future__ import annotations

import torch

from kernels.attention.decode import decode_attention
from kernels.attention.extend import extend_attention
from kernels.attention.tiles import SharedTiles
from kernels.quant.fp8_kv import KVScales


def paged_attention(
    q_THD: torch.Tensor,
    k_pages_NGKD: torch.Tensor,
    v_pages_NGKD: torch.Tensor,
    page_table_RP: torch.Tensor,
    query_start_R1: torch.Tensor,
    kv_len_R: torch.Tensor,
    scale: float,
    max_query_len: int,
    window: int | None = None,
    table_rows_R: torch.Tensor | None = None,
    max_kv_len: int | None = None,
    shared: SharedTiles | None = None,
    run: int = 1,
    scales: KVScales | None = None,
) -> torch.Tensor:
    """See `kernels.attention.paged_attention`."""
    assert k_pages_NGKD.stride() == v_pages_NGKD.stride() and k_pages_NGKD.stride(3) == 1
    assert page_table_RP.stride(1) == 1
    assert scales is None or (scales.k_NKG.is_contiguous() and scales.v_NKG.is_contiguous())
    assert shared is None or window is None
    if q_THD.stride(2) != 1 or q_THD.stride(1) != q_THD.shape[2]:
        q_THD = q_THD.contiguous()
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    if kv_len_R.shape[0] == 0 or q_THD.shape[0] == 0:
        return out_THD
    batch = (q_THD, k_pages_NGKD, v_pages_NGKD, page_table_RP, query_start_R1, kv_len_R, scale)
    decode_attention(
        *batch, out_THD, table_rows_R, max_kv_len, shared, window=window, run=run, scales=scales
    )
    if max_query_len > 1:
        extend_attention(*batch, max_query_len, out_THD, table_rows_R, window, scales)
    return out_THD
