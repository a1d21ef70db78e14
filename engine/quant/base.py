"""What a linear layer asks of a weight scheme, and the scheme that changes nothing.

Legend: O output features, I input features; `...` any leading dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F


class LinearMethod(Protocol):
    """How a linear layer stores its weight and multiplies by it."""

    def empty_weight(
        self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Uninitialised storage for an [O, I] weight."""
        ...

    def apply(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [..., I] times the stored weight, plus bias [O]: [..., O] in x's dtype."""
        ...


@dataclass(frozen=True)
class Unquantized:
    """The weight as it is, in the model's dtype."""

    def empty_weight(
        self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Uninitialised [O, I] storage in `dtype`."""
        return torch.empty(out_features, in_features, dtype=dtype, device=device)

    def apply(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [..., I] @ weight [O, I].T + bias [O]."""
        return F.linear(x, weight, bias)
