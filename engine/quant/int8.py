"""int8 weights with a scale an output channel, and int8 inputs with a scale a token (W8A8).

Embeddings, head, norms and biases stay in the model's dtype.

Legend: O output features, I input features, R rows; `...` any leading dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from engine.config import KernelBackend
from engine.layers.parameter import Part, ShardedParameter
from kernels.int8_linear import int8_linear
from kernels.linear import Options
from kernels.quant import Int8Rows


@dataclass(frozen=True)
class Int8:
    """`kernels.quant.Int8Rows` as what weights are stored as; x is quantised as it comes.

    A rank that has some of the inputs quantises x by their largest magnitude, not by that of all.
    """

    backend: KernelBackend
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
        """See `LinearMethod`. `owner.weight_scale` is float32 [O]."""
        scale = nn.Parameter(
            torch.empty(shape[0], dtype=torch.float32, device=device), requires_grad=False
        )
        owner.register_parameter("weight_scale", scale)
        return ShardedParameter(
            torch.empty(shape, dtype=torch.int8, device=device),
            parts,
            codec=Int8Rows(),
            companions=[scale],
            value_dtype=dtype,
        )

    def apply(
        self, x: torch.Tensor, weight: ShardedParameter, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See `LinearMethod`."""
        x_RI = x.reshape(-1, x.shape[-1])
        out_RO = self.fused(x_RI, weight, Options(bias_O=bias), backend=self.backend)
        return out_RO.view(*x.shape[:-1], -1)

    def fused(
        self,
        x_RI: torch.Tensor,
        weight: ShardedParameter,
        options: Options,
        *,
        backend: KernelBackend,
    ) -> torch.Tensor:
        """See `LinearMethod`."""
        (scale_O,) = weight.companions
        return int8_linear(x_RI, weight, scale_O, options, backend=backend)
