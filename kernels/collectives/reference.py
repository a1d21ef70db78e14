"""Collectives in plain torch, on what all ranks hold. `...` any dims, D normalised width."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.norm import reference as norm
from kernels.weighting import Weighting


def all_reduce(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of every rank's x [...], added in the order of the ranks, in float32 at least, and
    rounded once."""
    first, *others = parts
    total = first.to(torch.promote_types(first.dtype, torch.float32))
    for part in others:
        total = total + part
    return total.to(first.dtype)


def all_gather_rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Every rank's rows [R, ...] below each other: [N * R, ...]."""
    return torch.cat([*parts])


def reduce_scatter_rows(parts: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
    """The rows of `rank`, [R, ...], of the sum of every rank's [N * R, ...]."""
    return all_reduce([part.chunk(len(parts))[rank] for part in parts])


def all_reduce_add_rms_norm(
    parts: Sequence[torch.Tensor],
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weighting: Weighting = "rounded",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.norm.add_rms_norm` of the sum of every rank's x [..., D]."""
    return norm.add_rms_norm(all_reduce(parts), residual, weight, eps, weighting)
