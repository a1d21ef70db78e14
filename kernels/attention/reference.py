"""Paged attention in plain torch, one row at a time: the oracle of every back end.

Shapes: T query tokens, H query heads, K kv heads, U = H / K heads of a group, D head dim,
N pages, G page size, R rows, P page columns, n queries of a row, s its KV length.
"""

from __future__ import annotations

import torch

from kernels.quant.fp8_kv import KVScales, as_bytes, decode


def paged_attention(
    q_THD: torch.Tensor,
    k_pages_NGKD: torch.Tensor,
    v_pages_NGKD: torch.Tensor,
    page_table_RP: torch.Tensor,
    query_start_R1: torch.Tensor,
    kv_len_R: torch.Tensor,
    scale: float,
    window: int | None = None,
    scales: KVScales | None = None,
) -> torch.Tensor:
    """See `kernels.attention.paged_attention`."""
    k_scale_NKG, v_scale_NKG = scales or (None, None)
    out_THD = torch.empty_like(q_THD)
    starts = query_start_R1.tolist()
    for row, kv_len in enumerate(kv_len_R.tolist()):
        begin, end = starts[row], starts[row + 1]
        if begin == end:
            continue
        k_sKD = gather_row(k_pages_NGKD, page_table_RP[row], kv_len, k_scale_NKG)
        v_sKD = gather_row(v_pages_NGKD, page_table_RP[row], kv_len, v_scale_NKG)
        out_THD[begin:end] = attend(q_THD[begin:end], k_sKD, v_sKD, scale, window)
    return out_THD


def gather_row(
    pages_NGKD: torch.Tensor,
    page_ids_P: torch.Tensor,
    kv_len: int,
    scale_NKG: torch.Tensor | None = None,
) -> torch.Tensor:
    """The first `kv_len` positions of one sequence, [kv_len, K, D], copied out of its pages; in
    float32 where these hold codes."""
    page_size = pages_NGKD.shape[1]
    used_U = page_ids_P[: -(-kv_len // page_size)].long()
    if scale_NKG is None:
        return pages_NGKD[used_U].flatten(0, 1)[:kv_len]
    codes_UGKD = as_bytes(pages_NGKD)[used_U].view(pages_NGKD.dtype)
    scale_UGK = scale_NKG[used_U].transpose(1, 2)
    return decode(codes_UGKD, scale_UGK, torch.float32).flatten(0, 1)[:kv_len]


def attend(
    q_nHD: torch.Tensor,
    k_sKD: torch.Tensor,
    v_sKD: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention of the last n tokens of one sequence: [n, H, D] in q's dtype.

    Positions that no query sees are left out, and what they hold has no effect.
    """
    if window is not None:
        seen = min(k_sKD.shape[0], q_nHD.shape[0] + window - 1)
        k_sKD, v_sKD = k_sKD[-seen:], v_sKD[-seen:]
    num_queries, num_heads, head_dim = q_nHD.shape
    kv_len, num_kv_heads, _ = k_sKD.shape
    q_nKUD = q_nHD.float().view(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores_KUns = torch.einsum("nkud,skd->kuns", q_nKUD, k_sKD.float()) * scale
    last_n1 = torch.arange(kv_len - num_queries, kv_len, device=q_nHD.device).unsqueeze(1)
    position_s = torch.arange(kv_len, device=q_nHD.device)
    hidden_ns = position_s > last_n1
    if window is not None:
        hidden_ns |= position_s <= last_n1 - window
    probs_KUns = scores_KUns.masked_fill(hidden_ns, float("-inf")).softmax(-1)
    out_nKUD = torch.einsum("kuns,skd->nkud", probs_KUns, v_sKD.float())
    return out_nKUD.reshape(num_queries, num_heads, head_dim).to(q_nHD.dtype)
