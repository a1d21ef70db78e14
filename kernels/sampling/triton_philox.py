"""Philox uniforms on GPU, bit for bit those of `kernels.sampling.philox`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.sampling.philox import MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1

_ROUNDS = tl.constexpr(ROUNDS)
_MULTIPLIER_0, _MULTIPLIER_1 = tl.constexpr(MULTIPLIER_0), tl.constexpr(MULTIPLIER_1)
_WEYL_0, _WEYL_1 = tl.constexpr(WEYL_0), tl.constexpr(WEYL_1)
_LOW = tl.constexpr(0xFFFFFFFF)


@triton.jit
def uniform(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """`kernels.sampling.philox.philox_uniform`; int64 in, float64 out."""
    c0, c1 = position & _LOW, (position >> 32) & _LOW
    c2, c3 = position & 0, position & 0
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in tl.static_range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0 = ((product_1 >> 32) & _LOW) ^ c1 ^ k0
        c2 = ((product_0 >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = product_1 & _LOW, product_0 & _LOW
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    bits = (c0 << 20) | (c1 >> 12)
    return (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16


@triton.jit
def _uniform_kernel(
    seed_ptr: tl.tensor, position_ptr: tl.tensor, out_ptr: tl.tensor, size: tl.int32
) -> None:
    offset = tl.program_id(0) * 128 + tl.arange(0, 128)
    inside = offset < size
    seed = tl.load(seed_ptr + offset, mask=inside, other=0)
    position = tl.load(position_ptr + offset, mask=inside, other=0)
    tl.store(out_ptr + offset, uniform(seed, position), mask=inside)


def philox_uniform(seed_S: torch.Tensor, position_S: torch.Tensor) -> torch.Tensor:
    """`kernels.sampling.philox_uniform` as the kernels compute it; for tests."""
    out_S = torch.empty(seed_S.shape, dtype=torch.float64, device=seed_S.device)
    size = seed_S.numel()
    _uniform_kernel[(triton.cdiv(size, 128),)](seed_S, position_S, out_S, size)
    return out_S
