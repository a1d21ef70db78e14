"""Pages of keys and values as fp8 keeps them."""

from __future__ import annotations

import torch

from kernels.quant.fp8_kv import CODE, KVScales, as_bytes, encode

UNWRITTEN = 0x7F
"""A code that is NaN, as in pages that nobody wrote."""


def scaled(
    k_pages: torch.Tensor, v_pages: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, KVScales]:
    """Pages as fp8 keeps them; a head of nothing but NaN was never written, scale included."""
    codes, scales = [], []
    for pages in (k_pages, v_pages):
        code, scale = encode(pages)
        unwritten = pages.isnan().all(-1, keepdim=True)
        code = as_bytes(code).masked_fill(unwritten, UNWRITTEN).view(CODE)
        codes.append(code)
        scales.append(scale.transpose(1, 2).contiguous())
    return codes[0], codes[1], KVScales(*scales)
