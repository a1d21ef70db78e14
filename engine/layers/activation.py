"""The gated activations of an MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from engine.config import KernelBackend
from engine.layers.kinds import Activation
from kernels.activation import gelu_tanh_mul, silu_mul

_KERNELS: Mapping[Activation, Callable[..., torch.Tensor]] = MappingProxyType(
    {"silu": silu_mul, "gelu_tanh": gelu_tanh_mul}
)


class GatedActivation:
    """activation(gate) * up of a merged gate-and-up projection (arXiv:2002.05202)."""

    def __init__(self, activation: Activation, backend: KernelBackend) -> None:
        self.kernel = _KERNELS[activation]
        self.backend = backend

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up [..., 2 * I] -> [..., I]."""
        return self.kernel(gate_up, backend=self.backend)
