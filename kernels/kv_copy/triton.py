"""KV writes on GPU: one program a token. T tokens, K kv heads, D head dim, N pages, G page size."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _write_kv_kernel(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_pages_ptr: tl.tensor,
    v_pages_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    k_stride: tl.int64,
    v_stride: tl.int64,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        offset = tl.arange(0, BLOCK)
        inside = offset < WIDTH
        k = tl.load(k_ptr + token * k_stride + offset, mask=inside)
        v = tl.load(v_ptr + token * v_stride + offset, mask=inside)
        tl.store(k_pages_ptr + slot * WIDTH + offset, k, mask=inside)
        tl.store(v_pages_ptr + slot * WIDTH + offset, v, mask=inside)


def write_kv(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_pages_NGKD: torch.Tensor,
    v_pages_NGKD: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """See `kernels.kv_copy.write_kv`."""
    assert k_pages_NGKD.is_contiguous() and v_pages_NGKD.is_contiguous()
    width = k_pages_NGKD.shape[2] * k_pages_NGKD.shape[3]
    k_rows, v_rows = _rows(k_TKD), _rows(v_TKD)
    if k_rows.shape[0]:
        _write_kv_kernel[(k_rows.shape[0],)](
            k_rows,
            v_rows,
            k_pages_NGKD,
            v_pages_NGKD,
            slots_T.contiguous(),
            k_rows.stride(0),
            v_rows.stride(0),
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
        )


def _rows(x_TKD: torch.Tensor) -> torch.Tensor:
    rows = x_TKD.flatten(1)
    return rows if rows.stride(1) == 1 else rows.contiguous()
