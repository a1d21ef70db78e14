"""Keys and values in eight bits: e4m3 codes, and one bfloat16 scale for each token and head.

For the D elements x of a head, in float32, rounded to nearest even:

    s = bfloat16(max|x| / 448),  q = e4m3(clamp(x / s, -448, 448)),  and x is read as q * s

So what a token keeps follows from its own head alone: nothing is calibrated, and nothing of its
batch, of a chunk or of earlier weights is in it. e4m3 is that of Micikevicius et al., FP8 formats
for deep learning, arXiv 2209.05433.

Shapes: `...` any leading dims, D head dim, N pages, G tokens of a page, K kv heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

CODE = torch.float8_e4m3fn
SCALE = torch.bfloat16
LARGEST = 448.0
"""The largest number that e4m3 has."""
LEAST = 2.0**-100
"""Heads without an element as large are stored as zeros with scale 1: their scales would come
near the subnormals, which not every device computes."""


class KVScales(NamedTuple):
    """Scales of the key and value pages of one layer, bfloat16 [N, K, G], contiguous."""

    k_NKG: torch.Tensor
    v_NKG: torch.Tensor


def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads [..., D] of any float dtype as codes, e4m3 [..., D], and scales, bfloat16 [...].

    A head with an element that is not finite gets zeros and a scale of NaN: whoever reads it gets
    NaN.
    """
    wide = x.float()
    finite = wide.isfinite().all(-1, keepdim=True)
    wide = torch.where(finite, wide, 0.0)
    largest = wide.abs().amax(-1, keepdim=True)
    scale = (largest / LARGEST).to(SCALE)
    scale = torch.where(largest < LEAST, 1.0, scale)
    codes = (wide / scale.float()).clamp(-LARGEST, LARGEST).to(CODE)
    return codes, torch.where(finite, scale, float("nan")).squeeze(-1)


def decode(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What codes [..., D] and scales [...] stand for, rounded to `dtype`: float32 or bfloat16."""
    return codes.to(dtype) * scale.to(dtype).unsqueeze(-1)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or its bytes where it holds codes, which few ops of torch take."""
    return x.view(torch.uint8) if x.dtype == CODE else x
