"""Peaks in plain torch: fused over many tensors on a GPU, one reduction a tensor on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_SMALL = 1 << 14
"""Elements below which launching costs a CPU more than its slower fused kernel."""
_AT_ONCE = 4096
"""Scalars stacked together."""


def peaks(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """See `kernels.finite.peaks`."""
    values = [_wide(tensor.detach()) for tensor in tensors]
    fused = [i for i, value in enumerate(values) if value.numel() and _is_fused(value)]
    found = torch._foreach_norm([values[i] for i in fused], math.inf) if fused else []
    by_index = dict(zip(fused, found, strict=True))
    scalars = [by_index[i] if i in by_index else _peak(value) for i, value in enumerate(values)]
    # A stack of tens of thousands is slow.
    joined = [torch.stack(scalars[i : i + _AT_ONCE]) for i in range(0, len(scalars), _AT_ONCE)]
    return joined[0] if len(joined) == 1 else torch.cat(joined)


def _is_fused(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda or tensor.numel() < _SMALL


def _peak(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.numel():
        return torch.zeros((), dtype=tensor.dtype, device=tensor.device)
    # Both propagate NaN.
    least, most = torch.aminmax(tensor)
    return torch.maximum(-least, most)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """One-byte floats as float32: torch reduces none of them."""
    return tensor.float() if tensor.element_size() == 1 else tensor
