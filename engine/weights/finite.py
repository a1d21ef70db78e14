"""No weight may be NaN or inf, as it comes and as it is served.

One such value makes every logit of every request meaningless, so an update that brings one is
refused like a tensor of a wrong shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from engine.numerics import dtype_name
from kernels.backend import KernelBackend
from kernels.finite import peaks


def find_unfit(tensors: Sequence[tuple[str, torch.Tensor, torch.dtype]]) -> tuple[str, str] | None:
    """The first tensor that cannot be served, and why; None if all can.

    tensors: name, float tensor, and the dtype it will be converted to. Each is read once, where
    it lives, and every device is waited for once a dtype.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, (_, tensor, _) in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    found: dict[int, float] = {}
    for members in groups.values():
        values = find_peaks([tensors[index][1] for index in members])
        found.update(zip(members, values, strict=True))
    return first_unfit((n, found[i], t.dtype, to) for i, (n, t, to) in enumerate(tensors))


def first_unfit(
    found: Iterable[tuple[str, float, torch.dtype, torch.dtype]],
) -> tuple[str, str] | None:
    """The same for peaks that are known: name, peak, dtype, and the dtype that is served."""
    for name, peak, dtype, served in found:
        if math.isnan(peak):
            return name, "holds NaN"
        if math.isinf(peak):
            return name, f"holds inf{_or_came_too_large(dtype)}"
        if served != dtype and not _holds(peak, dtype, served):
            return name, f"has values up to {peak:g}, which {dtype_name(served)} cannot hold"
    return None


def find_peaks(tensors: Sequence[torch.Tensor]) -> list[float]:
    """The largest magnitude of each of some tensors of one dtype and device; waits for it."""
    backend: KernelBackend = "triton" if tensors[0].is_cuda else "torch"
    values: list[float] = peaks(tensors, backend=backend).tolist()
    return values


def _or_came_too_large(dtype: torch.dtype) -> str:
    """What else inf may mean where tensors are read after they were converted."""
    if dtype != torch.float16:
        return ""
    return f", or had values beyond {torch.finfo(dtype).max:g}, which float16 cannot hold"


def _holds(peak: float, dtype: torch.dtype, served: torch.dtype) -> bool:
    """Whether a magnitude stays finite when it is converted, rounding included.

    Conversion is monotone, so that the largest element speaks for all.
    """
    if peak <= torch.finfo(served).max:
        return True
    return math.isfinite(float(torch.tensor(peak, dtype=torch.float64).to(dtype).to(served)))
