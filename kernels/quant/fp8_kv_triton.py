"""The codec of `fp8_kv.py` within kernels, to the bit.

Roundings are spelled out on the bits: so they are the same on every GPU, and under the interpreter.

Shapes: H heads, E elements of a part of each head.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LARGEST = tl.constexpr(448.0)
_LEAST = tl.constexpr(2.0**-100)
_SMALLEST_NORMAL = tl.constexpr(2.0**-6)
# Added to a number below 2**-6, it leaves the number's multiple of 2**-9 in the lowest bits.
_SHIFTER = tl.constexpr(16384.0)
_SHIFTER_BITS = tl.constexpr(0x46800000)


@triton.jit
def largest_finite(x_HE: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Largest magnitude of each head's finite elements, float32 [H, 1], and whether it has others,
    int32 [H, 1]."""
    size_HE = tl.abs(x_HE.to(tl.float32))
    finite_HE = size_HE < float("inf")
    largest_H1 = tl.max(tl.where(finite_HE, size_HE, 0.0), axis=1)[:, None]
    return largest_H1, tl.max((~finite_HE).to(tl.int32), axis=1)[:, None]


@triton.jit
def head_scale(largest_H1: tl.tensor) -> tl.tensor:
    """Scales of heads whose largest magnitudes these are: float32 that bfloat16 has."""
    bits_H1 = tl.div_rn(largest_H1, _LARGEST).to(tl.int32, bitcast=True)
    bits_H1 = (bits_H1 + 0x7FFF + ((bits_H1 >> 16) & 1)) >> 16 << 16
    return tl.where(largest_H1 < _LEAST, 1.0, bits_H1.to(tl.float32, bitcast=True))


@triton.jit
def codes_of(x_HE: tl.tensor, scale_H1: tl.tensor, odd_H1: tl.tensor) -> tl.tensor:
    """Codes of heads, uint8; zeros where `odd` is not 0."""
    x_HE = tl.where(odd_H1 != 0, 0.0, x_HE.to(tl.float32))
    ratio_HE = tl.div_rn(x_HE, scale_H1)
    size_HE = tl.minimum(tl.abs(ratio_HE), _LARGEST)
    bits_HE = size_HE.to(tl.int32, bitcast=True)
    normal_HE = ((bits_HE + 0x7FFFF + ((bits_HE >> 20) & 1)) >> 20) - (120 << 3)
    small_HE = (size_HE + _SHIFTER).to(tl.int32, bitcast=True) - _SHIFTER_BITS
    code_HE = tl.where(size_HE < _SMALLEST_NORMAL, small_HE, normal_HE)
    sign_HE = (ratio_HE.to(tl.int32, bitcast=True) >> 31) & 1
    return (code_HE | (sign_HE << 7)).to(tl.uint8)


@triton.jit
def stored_scale(scale_H1: tl.tensor, odd_H1: tl.tensor) -> tl.tensor:
    """Scales as pages keep them, bfloat16: NaN where `odd` is not 0."""
    return tl.where(odd_H1 != 0, float("nan"), scale_H1).to(tl.bfloat16)
