"""Moving keys and values into and between pages of the KV pool.

Shapes: T tokens, K kv heads, D head dim, N pages, G tokens of a page, L layers, C copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.backend import KernelBackend, unknown_backend
from kernels.kv_copy import reference
from kernels.quant.fp8_kv import KVScales


def write_kv(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_pages_NGKD: torch.Tensor,
    v_pages_NGKD: torch.Tensor,
    slots_T: torch.Tensor,
    *,
    scales: KVScales | None = None,
    backend: KernelBackend,
) -> None:
    """Store one layer's keys and values of T tokens, in place.

    slots_T: int32 or int64, page * G + offset; a token with a negative slot is skipped.
    Slots must be distinct. k_TKD and v_TKD have the dtype of the pages, which are
    contiguous; with `scales` the pages are e4m3, and both get what `kernels.quant.fp8_kv.encode`
    gives. Raises ValueError on an unknown backend.
    """
    if backend == "torch":
        reference.write_kv(k_TKD, v_TKD, k_pages_NGKD, v_pages_NGKD, slots_T, scales)
    elif backend == "triton":
        from kernels.kv_copy import triton

        triton.write_kv(k_TKD, v_TKD, k_pages_NGKD, v_pages_NGKD, slots_T, scales)
    else:
        raise unknown_backend(backend)


def copy_pages(pages: Sequence[torch.Tensor], src_C: torch.Tensor, dst_C: torch.Tensor) -> None:
    """Copy whole pages src -> dst in every tensor, in place.

    pages: tensors [L, N, ...] of any dtype and page shape. src_C, dst_C: int32 or int64 page ids;
    all sources are read before any page is written, and destinations must be distinct. One
    implementation serves every device.
    """
    reference.copy_pages(pages, src_C, dst_C)
