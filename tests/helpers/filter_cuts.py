"""The cut that the Triton filter kernel finds in each row; imports triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.sampling.triton_cut import cut_of_row

CHUNK, BLOCK = 256, 4
SPARE_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@triton.jit
def _cut_kernel(
    logits_ptr: tl.tensor,
    divisor_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    chunk_max_ptr: tl.tensor,
    total_ptr: tl.tensor,
    list_ptr: tl.tensor,
    cut_ptr: tl.tensor,
    room_ptr: tl.tensor,
    vocab: tl.int32,
    num_chunks: tl.int32,
    SHIFT: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    index_N = tl.arange(0, N)
    max_N = tl.load(
        chunk_max_ptr + row * num_chunks + index_N, mask=index_N < num_chunks, other=float("-inf")
    )
    cut, room = cut_of_row(
        logits_ptr + row * vocab,
        list_ptr + row * num_chunks,
        max_N,
        tl.max(max_N, axis=0),
        tl.load(divisor_ptr + row),
        tl.load(total_ptr + row),
        tl.load(top_k_ptr + row),
        tl.load(top_p_ptr + row),
        vocab,
        num_chunks,
        SHIFT,
        B,
        C,
        N,
    )
    tl.store(cut_ptr + row, cut)
    tl.store(room_ptr + row, room.to(tl.int64))


def kept_by_kernel(
    logits_SV: torch.Tensor, divisor_S: torch.Tensor, top_k_S: torch.Tensor, top_p_S: torch.Tensor
) -> torch.Tensor:
    """Bool [S, V]: above the cut, or one of the first `room` at it. top_k_S int64, top_p_S
    float64."""
    rows, vocab = logits_SV.shape
    num_chunks = -(-vocab // CHUNK)
    wide_SV = torch.nn.functional.pad(
        logits_SV.float(), (0, num_chunks * CHUNK - vocab), value=float("-inf")
    )
    chunk_max_SN = wide_SV.unflatten(1, (-1, CHUNK)).amax(-1).contiguous()
    scaled_SV = logits_SV.double() / divisor_S.double()[:, None]
    total_S = (scaled_SV - scaled_SV.amax(-1, keepdim=True)).exp().sum(-1)
    list_SN = torch.zeros_like(chunk_max_SN, dtype=torch.int32)
    cut_S, room_S = torch.empty_like(divisor_S), torch.empty_like(top_k_S)
    _cut_kernel[(rows,)](
        logits_SV.contiguous(),
        divisor_S,
        top_k_S,
        top_p_S,
        chunk_max_SN,
        total_S,
        list_SN,
        cut_S,
        room_S,
        vocab,
        num_chunks,
        SHIFT=SPARE_BITS[logits_SV.dtype],
        B=BLOCK,
        C=CHUNK,
        N=triton.next_power_of_2(num_chunks),
    )
    tied_SV = logits_SV == cut_S[:, None]
    return (logits_SV > cut_S[:, None]) | (tied_SV & (tied_SV.cumsum(-1) <= room_S[:, None]))
