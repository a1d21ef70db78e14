"""How decode kernels hold heads: whole, or PAIRED as their even and their odd elements.

fp8 pages are read as pairs of codes, 16 bits each. So they go through shared memory by the paths
that products of 16 bits have, where codes would go byte by byte; a pair falls into its even and
its odd code in registers, and products are taken of each half. Where heads are PAIRED their
products are of float16, which has every code and more bits of a probability than bfloat16. What
float16 lacks is range: powers of two bring queries and probabilities into it, exactly, by what
the row itself sees.

`heads` below is a tuple of tensors, (all elements,) or (even elements, odd elements).

Shapes as in `blocks.py`; W = DP, or DP / 2 where PAIRED.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_SPLIT_AND_DECODE = tl.constexpr(
    """{
    .reg .b32 codes;
    .reg .b16 pair;
    prmt.b32 codes, $2, 0, 0x4420;
    cvt.u16.u32 pair, codes;
    cvt.rn.f16x2.e4m3x2 $0, pair;
    prmt.b32 codes, $2, 0, 0x4431;
    cvt.u16.u32 pair, codes;
    cvt.rn.f16x2.e4m3x2 $1, pair;
    }"""
)


@triton.jit
def even_and_odd(pairs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Pairs of e4m3 codes, uint16, as the numbers of their low and of their high byte, float16.

    Two pairs to a register: one instruction picks two codes, one decodes them, where the compiler
    alone would take a pair apart by itself.
    """
    if _INTERPRETED:
        even = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        odd = (pairs >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        return even.to(tl.float16), odd.to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            _SPLIT_AND_DECODE,
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def held(pairs: tl.tensor) -> tl.tensor:
    """The pairs, in the registers that they were loaded into until here.

    The compiler puts a wait for what is loaded, and its way through shared memory, right behind the
    load. That of values would stand between them and the keys.
    """
    if not _INTERPRETED:
        pairs = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [pairs], dtype=tl.uint16, is_pure=False, pack=2
        )
    return pairs


@triton.jit
def exponent_of(x: tl.tensor, LEAST: tl.constexpr) -> tl.tensor:
    """e of float32 x >= 0 in [2**e, 2**(e + 1)), int32, LEAST at least and 127 at most."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) - 127
    return tl.minimum(tl.maximum(exponent, LEAST), 127)


@triton.jit
def power_of_two(exponent: tl.tensor) -> tl.tensor:
    """2**exponent, float32; exponent in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def split_pairs(x_MD: tl.tensor, M: tl.constexpr, DP: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Even and odd elements of each row, [M, DP / 2] each."""
    return tl.split(tl.reshape(x_MD, [M, DP // 2, 2]))


@triton.jit
def as_queries(
    q_MD: tl.tensor, scale: tl.float32, M: tl.constexpr, DP: tl.constexpr, PAIRED: tl.constexpr
) -> tuple[tl.tuple, tl.tensor]:
    """Queries as products take them, and what each row's products are to be multiplied by.

    PAIRED: a row times the power of two that brings its largest magnitude to [2**14, 2**15).
    Elements less than that times 2**-29 keep fewer bits than bfloat16 has.
    """
    if PAIRED:
        wide_MD = q_MD.to(tl.float32)
        exponent_M = exponent_of(tl.max(tl.abs(wide_MD), axis=1), -86)
        wide_MD = wide_MD * power_of_two(14 - exponent_M)[:, None]
        even_MD, odd_MD = split_pairs(wide_MD.to(tl.float16), M, DP)
        return (even_MD, odd_MD), power_of_two(exponent_M - 14) * scale
    else:
        return (q_MD,), tl.full([M], 1.0, tl.float32) * scale


@triton.jit
def as_heads(x_MD: tl.tensor, M: tl.constexpr, DP: tl.constexpr, PAIRED: tl.constexpr) -> tl.tuple:
    """Heads whose elements are in order, as kernels hold them."""
    if PAIRED:
        even_MD, odd_MD = split_pairs(x_MD, M, DP)
        return (even_MD, odd_MD)
    else:
        return (x_MD,)


@triton.jit
def in_order(heads: tl.tuple, PAIRED: tl.constexpr) -> tl.tensor:
    """Heads with their elements in order, [M, DP]."""
    if PAIRED:
        return tl.interleave(heads[0], heads[1])
    else:
        return heads[0]


@triton.jit
def zeros(M: tl.constexpr, DP: tl.constexpr, PAIRED: tl.constexpr) -> tl.tuple:
    """Heads of zeros, float32."""
    if PAIRED:
        return (tl.zeros([M, DP // 2], tl.float32), tl.zeros([M, DP // 2], tl.float32))
    else:
        return (tl.zeros([M, DP], tl.float32),)
