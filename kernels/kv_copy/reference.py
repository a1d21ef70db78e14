"""KV writes in plain torch. T tokens, K kv heads, D head dim, N pages, G page size, L layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.quant.fp8_kv import KVScales, as_bytes, encode


def write_kv(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_pages_NGKD: torch.Tensor,
    v_pages_NGKD: torch.Tensor,
    slots_T: torch.Tensor,
    scales: KVScales | None = None,
) -> None:
    """See `kernels.kv_copy.write_kv`."""
    slots_T = slots_T.long()
    kept_T = slots_T >= 0
    if not bool(kept_T.all()):
        slots_T, k_TKD, v_TKD = slots_T[kept_T], k_TKD[kept_T], v_TKD[kept_T]
    if scales is not None:
        k_TKD, v_TKD = (
            _scaled(x_TKD, scale_NKG, slots_T)
            for x_TKD, scale_NKG in zip((k_TKD, v_TKD), scales, strict=True)
        )
    num_heads, head_dim = k_pages_NGKD.shape[2:]
    for pages_NGKD, x_TKD in ((k_pages_NGKD, k_TKD), (v_pages_NGKD, v_TKD)):
        places = as_bytes(pages_NGKD).view(-1, num_heads, head_dim)
        places.index_copy_(0, slots_T, as_bytes(x_TKD))


def _scaled(x_TKD: torch.Tensor, scale_NKG: torch.Tensor, slots_T: torch.Tensor) -> torch.Tensor:
    """Codes of keys or values, whose scales are written."""
    codes_TKD, scale_TK = encode(x_TKD)
    page_size = scale_NKG.shape[2]
    scale_NKG[slots_T // page_size, :, slots_T % page_size] = scale_TK
    return codes_TKD


def copy_pages(pages: Sequence[torch.Tensor], src_C: torch.Tensor, dst_C: torch.Tensor) -> None:
    """See `kernels.kv_copy.copy_pages`."""
    src_C, dst_C = src_C.long(), dst_C.long()
    for pages_LN in pages:
        bytes_LN = as_bytes(pages_LN)
        bytes_LN.index_copy_(1, dst_C, bytes_LN.index_select(1, src_C))
