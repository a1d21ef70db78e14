"""Peaks in plain torch: on a GPU fused over many tensors; on a CPU small ones together, and one
reduction for each of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

_SMALL = 1 << 12
"""Elements below which a call of torch costs a CPU more than to copy them."""
_AT_ONCE = 1024
"""Tensors that are joined, or scalars stacked: of tens of thousands that is slow."""
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def peaks(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """See `kernels.finite.peaks`."""
    values = [_wide(tensor.detach()) for tensor in tensors]
    found = torch.zeros(len(values), dtype=values[0].dtype, device=values[0].device)
    filled = [i for i, value in enumerate(values) if value.numel()]
    if found.is_cuda:
        _fill(found, filled, values, _fused)
        return found
    _fill(found, [i for i in filled if values[i].numel() < _SMALL], values, _joined)
    _fill(found, [i for i in filled if values[i].numel() >= _SMALL], values, _each)
    return found


def _fill(
    found: torch.Tensor,
    members: Sequence[int],
    values: Sequence[torch.Tensor],
    peaks_of: Callable[[Sequence[torch.Tensor]], torch.Tensor],
) -> None:
    for start in range(0, len(members), _AT_ONCE):
        some = list(members[start : start + _AT_ONCE])
        found[some] = peaks_of([values[i] for i in some])


def _fused(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(torch._foreach_norm(values, math.inf))


def _each(values: Sequence[torch.Tensor]) -> torch.Tensor:
    # Both ends propagate NaN.
    ends = [torch.aminmax(value) for value in values]
    return torch.stack([torch.maximum(-least, most) for least, most in ends])


def _joined(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """A magnitude is what is left of a float's bits without the sign, an integer of the same
    order in which NaN is above inf."""
    flat = torch.cat([value.reshape(-1) for value in values])
    words = flat.view(_WORDS[flat.element_size()])
    magnitudes = (words & torch.iinfo(words.dtype).max).numpy()
    starts = np.cumsum([0, *(value.numel() for value in values[:-1])])
    return torch.from_numpy(np.maximum.reduceat(magnitudes, starts)).view(flat.dtype)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """One-byte floats as float32: torch reduces none of them."""
    return tensor.float() if tensor.element_size() == 1 else tensor
