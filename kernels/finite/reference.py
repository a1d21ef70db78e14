"""Peaks in plain torch: on a GPU fused over many tensors; on a CPU small ones together, and one
reduction for each of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kernels.torch_compat import largest_magnitudes

_SMALL = 1 << 12
"""Elements below which a call of torch costs a CPU more than to copy them."""
_AT_ONCE = 1024
"""Tensors that are joined, or scalars stacked: of tens of thousands that is slow."""
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def peaks(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """See `kernels.finite.peaks`."""
    if tensors[0].element_size() == 1:
        # Torch reduces no one-byte floats.
        tensors = [tensor.float() for tensor in tensors]
    found = torch.zeros(len(tensors), dtype=tensors[0].dtype, device=tensors[0].device)
    sizes = [tensor.numel() for tensor in tensors]
    if found.is_cuda:
        _fill(found, [i for i, size in enumerate(sizes) if size], tensors, _fused)
        return found
    _fill(found, [i for i, size in enumerate(sizes) if 0 < size < _SMALL], tensors, _joined)
    _fill(found, [i for i, size in enumerate(sizes) if size >= _SMALL], tensors, _each)
    return found


def _fill(
    found: torch.Tensor,
    members: Sequence[int],
    tensors: Sequence[torch.Tensor],
    peaks_of: Callable[[Sequence[torch.Tensor]], torch.Tensor],
) -> None:
    for start in range(0, len(members), _AT_ONCE):
        some = list(members[start : start + _AT_ONCE])
        found[some] = peaks_of([tensors[i] for i in some])


def _fused(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(largest_magnitudes(tensors))


def _each(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    # Both ends propagate NaN.
    ends = [torch.aminmax(tensor) for tensor in tensors]
    return torch.stack([torch.maximum(-least, most) for least, most in ends])


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A magnitude is what is left of a float's bits without the sign, an integer of the same
    order in which NaN is above inf."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    words = flat.view(_WORDS[flat.element_size()])
    magnitudes = (words & torch.iinfo(words.dtype).max).numpy()
    starts = np.cumsum([0, *(tensor.numel() for tensor in tensors[:-1])])
    return torch.from_numpy(np.maximum.reduceat(magnitudes, starts)).view(flat.dtype)
