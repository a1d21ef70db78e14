"""What surrounds a matrix product. I input features, O output features, R rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Options:
    """Steps that are fused into a product.

    bias_O: added to the product before it is rounded.
    norm_weight_I, eps: the input is RMS-normalised with them first; None for no norm.
    gated: the product is [gate, up] side by side; the result is silu(gate) * up.
    residual_RO: added to the rounded product; rows may be strided. Not with `gated`.
    counters: see `new_counters`; without them no product is split over its inputs.
    """

    bias_O: torch.Tensor | None = None
    norm_weight_I: torch.Tensor | None = None
    eps: float = 0.0
    gated: bool = False
    residual_RO: torch.Tensor | None = None
    counters: torch.Tensor | None = None
