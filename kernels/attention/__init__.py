"""Causal attention over a paged KV cache, grouped-query heads, variable lengths.

Shapes: T query tokens, H query heads, K kv heads, D head dim, N pages, G tokens of a page,
R rows (sequences), P page columns. The Triton kernels follow FlashAttention's online
softmax (Dao et al., 2022) and, for decode, Flash-Decoding's split over the KV length
(Dao et al., 2023), on the paged layout of PagedAttention (Kwon et al., 2023).
"""

from __future__ import annotations

import torch

from kernels.attention import reference
from kernels.attention.tiles import SharedTiles, takes_whole_rows
from kernels.backend import KernelBackend, unknown_backend
from kernels.quant.fp8_kv import KVScales

__all__ = ["SharedTiles", "paged_attention", "takes_whole_rows"]


def paged_attention(
    q_THD: torch.Tensor,
    k_pages_NGKD: torch.Tensor,
    v_pages_NGKD: torch.Tensor,
    page_table_RP: torch.Tensor,
    query_start_R1: torch.Tensor,
    kv_len_R: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    window: int | None = None,
    table_rows_R: torch.Tensor | None = None,
    max_kv_len: int | None = None,
    shared: SharedTiles | None = None,
    run: int = 1,
    scales: KVScales | None = None,
    backend: KernelBackend,
) -> torch.Tensor:
    """Attend the last tokens of each row to the whole row; returns out_THD, dtype of q.

    page_table_RP: int32, page ids; position p of row r lies in page_table[r, p // G], and
    columns past the row's length are never read.
    query_start_R1: int32 [R + 1]; row r owns queries [query_start[r], query_start[r + 1]).
    kv_len_R: int32, tokens of the row in the cache, its queries included. Query i of n sees
    positions <= kv_len - n + i. A row without queries (n = 0) is allowed.
    Query head h reads kv head h // (H // K); scores are multiplied by `scale`, above zero.
    max_query_len: host-side upper bound of the rows' query counts; 1 takes the decode kernel.
    window: a query sees the last `window` of those positions, its own among them, at least 1;
    None for all of them. Positions that no query of a row sees are never read.
    table_rows_R: int32; row r's pages are page_table[table_rows[r]] instead, so that a batch
    reads a table of all requests in place.
    max_kv_len: host-side upper bound of `kv_len`; None takes what the table could hold. What
    a row gets does not depend on it.
    shared: rows of one query that hold the same pages in front; "triton" reads those once for
    a tile of rows. What a row gets does not depend on it. None where there is a window.
    run: rows of one query come in runs of this many, which with `table_rows_R` hold the pages of
    their first row and are each at least as long as the one before; a row that holds others is
    not in use, and gets what says nothing. "triton" reads the KV of a run once. What the other
    rows get does not depend on it.
    scales: those of the pages, which then hold e4m3 codes (`kernels.quant.fp8_kv`): what a
    position's code stands for is attended to.
    Softmax and sums are float32. With "triton", what a row gets does not depend on the other
    rows of the batch. Raises ValueError on an unknown backend.
    """
    if backend == "torch":
        if table_rows_R is not None:
            page_table_RP = page_table_RP[table_rows_R.long()]
        return reference.paged_attention(
            q_THD,
            k_pages_NGKD,
            v_pages_NGKD,
            page_table_RP,
            query_start_R1,
            kv_len_R,
            scale,
            window,
            scales,
        )
    if backend == "triton":
        from kernels.attention import triton

        return triton.paged_attention(
            q_THD,
            k_pages_NGKD,
            v_pages_NGKD,
            page_table_RP,
            query_start_R1,
            kv_len_R,
            scale,
            max_query_len,
            window,
            table_rows_R,
            max_kv_len,
            shared,
            run,
            scales,
        )
    raise unknown_backend(backend)
