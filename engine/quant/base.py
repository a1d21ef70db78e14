"""What a linear layer asks of a weight scheme, and the scheme that changes nothing.

A scheme owns what a weight is stored as. `build` makes the parameter, which from then on says
what its storages are and places full tensors into them (`engine/layers/parameter.py`), by the
scheme's codec. Whatever `apply` and `fused` read is what placing writes: nothing is repacked or
derived once weights are loaded, so that an update is finished when the last tensor is placed.

Legend: O output features, I input features, R rows; `...` any leading dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from engine.config import KernelBackend
from engine.layers.parameter import Part, ShardedParameter
from kernels.linear import Options, fused_linear


class LinearMethod(Protocol):
    """How a linear layer stores its weight and multiplies by it."""

    fuses_few_rows: bool
    """Whether `fused` is faster than separate kernels for the rows of `LayerRuntime.few_rows`."""

    def build(
        self,
        owner: nn.Module,
        parts: Mapping[str, Part],
        shape: tuple[int, int],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> ShardedParameter:
        """The uninitialised weight of a layer, which the caller keeps as `owner.weight`.

        parts: what it holds of which full tensors. shape: [O, I] of this rank. dtype: of the
        layer's inputs and outputs. What is stored beside the weight becomes a parameter of `owner`.
        """
        ...

    def apply(
        self, x: torch.Tensor, weight: ShardedParameter, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [..., I] times the stored weight, plus bias [O]: [..., O] in x's dtype."""
        ...

    def fused(
        self,
        x_RI: torch.Tensor,
        weight: ShardedParameter,
        options: Options,
        *,
        backend: KernelBackend,
    ) -> torch.Tensor:
        """`apply` to few rows with what surrounds it: see `kernels.linear.fused_linear`."""
        ...


@dataclass(frozen=True)
class Unquantized:
    """The weight as it is, in the model's dtype."""

    fuses_few_rows = True

    def build(
        self,
        owner: nn.Module,
        parts: Mapping[str, Part],
        shape: tuple[int, int],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> ShardedParameter:
        """See `LinearMethod`."""
        return ShardedParameter(torch.empty(shape, dtype=dtype, device=device), parts)

    def apply(
        self, x: torch.Tensor, weight: ShardedParameter, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See `LinearMethod`."""
        return F.linear(x, weight, bias)

    def fused(
        self,
        x_RI: torch.Tensor,
        weight: ShardedParameter,
        options: Options,
        *,
        backend: KernelBackend,
    ) -> torch.Tensor:
        """See `LinearMethod`."""
        return fused_linear(x_RI, weight, options, backend=backend)
