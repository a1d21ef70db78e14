"""The checksum on GPU: programs stride over the tensor and add their sums atomically."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checksum.reference import (
    GOLDEN,
    MIX_1,
    MIX_2,
    SHIFT,
    magnitude_mask,
    words_of,
)

_BLOCK = 2048
_MAX_PROGRAMS = 2048


@triton.jit(do_not_specialize=["place"])
def _checksum_kernel(
    total_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    words_ptr: tl.tensor,
    num_words: tl.int64,
    place: tl.int64,
    GOLDEN: tl.constexpr,
    MIX_1: tl.constexpr,
    MIX_2: tl.constexpr,
    SHIFT: tl.constexpr,
    MASK: tl.constexpr,
    PEAK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK).to(tl.int64)
    sums = tl.zeros([BLOCK], dtype=tl.uint64)
    largest = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(first, num_words, step):
        index = start + offset
        inside = index < num_words
        bits = tl.load(words_ptr + index, mask=inside, other=0).to(tl.int64)
        if PEAK:
            largest = tl.maximum(largest, bits & MASK)
        word = bits + SHIFT
        z = (place + index + 1).to(tl.uint64) * GOLDEN
        z = (z ^ (z >> 30)) * MIX_1
        z = (z ^ (z >> 27)) * MIX_2
        z = (z ^ (z >> 31)) | 1
        sums += tl.where(inside, word.to(tl.uint64) * z, 0)
    tl.atomic_add(total_ptr, tl.sum(sums.to(tl.int64), axis=0))
    if PEAK:
        tl.atomic_max(peak_ptr, tl.max(largest, axis=0))


def checksum_into(
    total: torch.Tensor, tensor: torch.Tensor, peak: torch.Tensor | None = None, start: int = 0
) -> None:
    """See `kernels.checksum.checksum_into`."""
    words = words_of(tensor)
    if words.numel() == 0:
        return
    num_programs = min(triton.cdiv(words.numel(), _BLOCK), _MAX_PROGRAMS)
    # A trainer's tensors may lie on another GPU than the one that kernels are launched on.
    with torch.cuda.device(words.device):
        _checksum_kernel[(num_programs,)](
            total,
            total if peak is None else peak,
            words,
            words.numel(),
            start,
            GOLDEN=GOLDEN,
            MIX_1=MIX_1,
            MIX_2=MIX_2,
            SHIFT=SHIFT,
            MASK=magnitude_mask(tensor),
            PEAK=peak is not None,
            BLOCK=_BLOCK,
            num_warps=8,
        )
