"""The logits of one row or two, which are normalised first: one kernel in place of two.

Every program normalises the rows again, which takes less time than another kernel does; those of
the first experts store what they normalised.

T tokens, N experts, H hidden width.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _inverse_rms(
    x_ptr: tl.tensor,
    x_stride: tl.int64,
    row_T: tl.tensor,
    eps: tl.float32,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """What `ROWS` rows are multiplied by, where they are among those of row_T."""
    scale_T = tl.zeros(row_T.shape, tl.float32)
    input_H = tl.arange(0, WIDTH)
    for row in tl.static_range(ROWS):
        x_H = tl.load(x_ptr + row * x_stride + input_H, mask=input_H < H, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(x_H * x_H, axis=0) / H + eps)
        scale_T = tl.where(row_T == row, scale, scale_T)
    return scale_T


@triton.jit
def normed_logits_kernel(
    x_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    x_stride: tl.int64,
    eps: tl.float32,
    N: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """float32 sums [parts, ROWS, N], as of `logits_kernel` to the bit; the rows at normed_ptr.
    WIDTH: H padded to a power of two."""
    expert_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    row_T = tl.arange(0, BLOCK_T)
    scale_T = _inverse_rms(x_ptr, x_stride, row_T, eps, H, ROWS, WIDTH)
    part_NT = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    # Unrolled: no load waits for the norm.
    for piece in tl.static_range(0, PART, BLOCK_H):
        input_H = part * PART + piece + tl.arange(0, BLOCK_H)
        inside_HT = (input_H[:, None] < H) & (row_T[None, :] < ROWS)
        inside_NH = (expert_N[:, None] < N) & (input_H[None, :] < H)
        gate_pointers_NH = gate_ptr + expert_N[:, None] * H + input_H[None, :]
        gate_NH = tl.load(gate_pointers_NH, mask=inside_NH, other=0.0)
        norm_H = tl.load(norm_ptr + input_H, mask=input_H < H, other=0.0).to(tl.float32)
        x_pointers_HT = x_ptr + row_T[None, :] * x_stride + input_H[:, None]
        x_HT = tl.load(x_pointers_HT, mask=inside_HT, other=0.0)
        rounded_HT = (x_HT.to(tl.float32) * scale_T[None, :]).to(x_HT.dtype).to(tl.float32)
        x_HT = (rounded_HT * norm_H[:, None]).to(x_HT.dtype)
        normed_HT = normed_ptr + row_T[None, :] * H + input_H[:, None]
        tl.store(normed_HT, x_HT, mask=inside_HT & (tl.program_id(0) == 0))
        part_NT = tl.dot(gate_NH, x_HT, part_NT, input_precision="ieee")
    out_NT = parts_ptr + (part * ROWS + row_T)[None, :] * N + expert_N[:, None]
    tl.store(out_NT, part_NT, mask=(expert_N[:, None] < N) & (row_T[None, :] < ROWS))
