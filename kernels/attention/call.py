"""The arguments that every decode kernel takes, put together once for a call.

Shapes as in `kernels.attention.decode`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from kernels.attention.blocks import LOG2_E
from kernels.attention.tiles import MAX_SPLITS, MIN_SPLIT
from kernels.quant.fp8_kv import KVScales


@dataclass(frozen=True)
class DecodeCall:
    """One decode step of one layer.

    inputs: (q, k pages, v pages, their scales or what stands in for them, page table, table rows,
    query starts); pages of codes are read as pairs where q has 16 bits (`heads.py`), in which their
    strides are then counted. scale: in base 2.
    strides: of q, of the pages, of the table. shape: constants of the model and the pool.
    cut: how a row's KV is cut. max_kv_len: positions that a row walks at most.
    """

    inputs: tuple[torch.Tensor, ...]
    kv_len_R: torch.Tensor
    out_THD: torch.Tensor
    scale: float
    strides: tuple[int, ...]
    shape: dict[str, int]
    cut: dict[str, int]
    num_kv_heads: int
    max_kv_len: int

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return self.kv_len_R.shape[0]


def decode_call(
    q_THD: torch.Tensor,
    k_pages_NGKD: torch.Tensor,
    v_pages_NGKD: torch.Tensor,
    page_table_RP: torch.Tensor,
    query_start_R1: torch.Tensor,
    kv_len_R: torch.Tensor,
    scale: float,
    out_THD: torch.Tensor,
    table_rows_R: torch.Tensor | None,
    max_kv_len: int | None,
    window: int | None = None,
    scales: KVScales | None = None,
) -> DecodeCall:
    """See `kernels.attention.decode.decode_attention`."""
    num_heads, head_dim = q_THD.shape[1:]
    page_size, num_kv_heads = k_pages_NGKD.shape[1:3]
    paired = scales is not None and q_THD.element_size() == 2 and head_dim % 2 == 0
    # Products add up 16 elements at least.
    padded_dim = max(triton.next_power_of_2(head_dim), 32 if paired else 16)
    wide = q_THD.dtype == torch.float32 or padded_dim > 128
    block = 32 if wide else 128
    rows_R = kv_len_R if table_rows_R is None else table_rows_R
    longest = page_table_RP.shape[1] * page_size if max_kv_len is None else max_kv_len
    if window is not None:
        longest = min(longest, window + block - 1)
    pages = (k_pages_NGKD, v_pages_NGKD)
    if paired:
        pages = (k_pages_NGKD.view(torch.uint16), v_pages_NGKD.view(torch.uint16))
    return DecodeCall(
        inputs=(q_THD, *pages, *(scales or pages), page_table_RP, rows_R, query_start_R1),
        kv_len_R=kv_len_R,
        out_THD=out_THD,
        scale=scale * LOG2_E,
        strides=(q_THD.stride(0), *pages[0].stride()[:3], page_table_RP.stride(0)),
        shape={
            "U": num_heads // num_kv_heads,
            "D": head_dim,
            "DP": padded_dim,
            "G": page_size,
            "B": block,
            "SCALED": scales is not None,
            "PAIRED": paired,
            "INDIRECT": table_rows_R is not None,
        },
        cut={"SPLITS": MAX_SPLITS, "LEAST": MIN_SPLIT, "WINDOW": window or 0},
        num_kv_heads=num_kv_heads,
        max_kv_len=longest,
    )
