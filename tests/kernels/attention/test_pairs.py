"""Pairs of fp8 codes as kernels take them apart."""

from __future__ import annotations

import pytest
import torch

from kernels.quant.fp8_kv import CODE
from kernels.testing import triton_device

pytest.importorskip("triton")

import triton
import triton.language as tl

from kernels.attention.heads import even_and_odd, held


@triton.jit
def _split_kernel(pairs_ptr: tl.tensor, out_ptr: tl.tensor, B: tl.constexpr) -> None:
    index = tl.program_id(0) * B + tl.arange(0, B)
    even, odd = even_and_odd(held(tl.load(pairs_ptr + index)))
    tl.store(out_ptr + 2 * index, even)
    tl.store(out_ptr + 2 * index + 1, odd)


@pytest.mark.gpu
def test_every_pair_of_codes_falls_into_its_two_numbers() -> None:
    codes = torch.arange(2**16).to(torch.uint16)
    numbers = torch.empty(2**17, device=triton_device(), dtype=torch.float16)
    _split_kernel[(16,)](codes.to(numbers.device), numbers, B=4096)
    want = codes.view(CODE).to(torch.float16)
    # Two codes are NaN, which nobody writes and the interpreter does not know.
    assert torch.equal(numbers.cpu()[want == want], want[want == want])
