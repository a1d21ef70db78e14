"""Peaks on GPU: one launch over all tensors, whose programs find theirs in a table.

A magnitude is what is left of a float's bits without the sign, an integer of the same order in
which NaN is above inf: so integers are compared, and no NaN is lost in a maximum.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from kernels.finite import reference

_WORDS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
}
_BLOCK, _BLOCKS, _WARPS = 8192, 8, 8
"""Elements loaded at a time, such loads of a program, and its warps."""
_ALIGNED = 16
"""Bytes that wide loads want an address to be a multiple of."""


@triton.jit(do_not_specialize=["num_tensors"])
def _peaks_kernel(
    bits_ptr: tl.tensor,
    table_ptr: tl.tensor,
    num_tensors: tl.int32,
    WORD: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """table_ptr: int64 [3, num_tensors], of each tensor its first program, address and size."""
    program = tl.program_id(0).to(tl.int64)
    low, high = program.to(tl.int32) * 0, num_tensors
    # The last tensor whose first program is not behind this one.
    while high - low > 1:
        middle = (low + high) // 2
        here = tl.load(table_ptr + middle) <= program
        low, high = tl.where(here, middle, low), tl.where(here, high, middle)
    address = tl.load(table_ptr + num_tensors + low)
    size = tl.load(table_ptr + 2 * num_tensors + low)
    words_ptr = tl.multiple_of(address.to(tl.pointer_type(WORD)), 16)
    start = (program - tl.load(table_ptr + low)) * (BLOCK * BLOCKS)
    offset = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], dtype=WORD)
    if start + BLOCK * BLOCKS <= size:
        # Without a mask, which would make narrow loads of them.
        for block in range(BLOCKS):
            bits = tl.load(words_ptr + start + block * BLOCK + offset)
            largest = tl.maximum(largest, bits & MASK)
    else:
        for block in range(BLOCKS):
            index = start + block * BLOCK + offset
            bits = tl.load(words_ptr + index, mask=index < size, other=0)
            largest = tl.maximum(largest, bits & MASK)
    tl.atomic_max(bits_ptr + low, tl.max(largest, axis=0).to(tl.int32))


def peaks(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """See `kernels.finite.peaks`."""
    word = _WORDS.get(tensors[0].dtype)
    others = [i for i, tensor in enumerate(tensors) if not _is_flat(tensor)]
    if word is None or len(others) == len(tensors):
        return reference.peaks(tensors)
    left = set(others)
    found = _flat_peaks([tensor for i, tensor in enumerate(tensors) if i not in left], word)
    if not others:
        return found
    joined = torch.empty(len(tensors), dtype=found.dtype, device=found.device)
    joined[[i for i in range(len(tensors)) if i not in left]] = found
    joined[others] = reference.peaks([tensors[i] for i in others])
    return joined


def _flat_peaks(tensors: Sequence[torch.Tensor], word: torch.dtype) -> torch.Tensor:
    device, count = tensors[0].device, len(tensors)
    table = np.empty((3, count), dtype=np.int64)
    table[1] = [tensor.data_ptr() for tensor in tensors]
    table[2] = [tensor.numel() for tensor in tensors]
    ends = np.cumsum(-(-table[2] // (_BLOCK * _BLOCKS)))
    table[0, 0], table[0, 1:] = 0, ends[:-1]
    bits = torch.zeros(count, dtype=torch.int32, device=device)
    if ends[-1]:
        with torch.cuda.device(device):
            _peaks_kernel[(int(ends[-1]),)](
                bits,
                torch.from_numpy(table).to(device),
                count,
                WORD=tl.int16 if word == torch.int16 else tl.int32,
                MASK=0x7FFF if word == torch.int16 else 0x7FFFFFFF,
                BLOCK=_BLOCK,
                BLOCKS=_BLOCKS,
                num_warps=_WARPS,
            )
    return bits.to(word).view(tensors[0].dtype)


def _is_flat(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % _ALIGNED == 0
