"""Embedding and norm on GPU: one program a token. E: hidden size, padded to BLOCK."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _embed_rms_norm_kernel(
    ids_ptr: tl.tensor,
    table_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    eps: tl.float32,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    source = tl.load(ids_ptr + token).to(tl.int64)
    offset_E = tl.arange(0, BLOCK)
    inside_E = offset_E < E
    x_E = tl.load(table_ptr + source * E + offset_E, mask=inside_E, other=0.0)
    tl.store(rows_ptr + token * E + offset_E, x_E, mask=inside_E)
    wide_E = x_E.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide_E * wide_E, axis=0) / E + eps)
    normed_E = (wide_E * scale).to(x_E.dtype).to(tl.float32)
    weight_E = tl.load(weight_ptr + offset_E, mask=inside_E, other=0.0).to(tl.float32)
    normed_E = (normed_E * weight_E).to(x_E.dtype)
    tl.store(normed_ptr + token * E + offset_E, normed_E, mask=inside_E)


def embed_rms_norm(
    ids_T: torch.Tensor, table_VE: torch.Tensor, weight_E: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.embedding.embed_rms_norm`."""
    assert table_VE.is_contiguous()
    num_tokens, width = len(ids_T), table_VE.shape[1]
    normed_TE = table_VE.new_empty(num_tokens, width)
    rows_TE = table_VE.new_empty(num_tokens, width)
    if num_tokens:
        block = triton.next_power_of_2(width)
        _embed_rms_norm_kernel[(num_tokens,)](
            ids_T.contiguous(),
            table_VE,
            weight_E,
            normed_TE,
            rows_TE,
            eps,
            E=width,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
        )
    return normed_TE, rows_TE
