"""Where the frozen reference model of a trainer is between its passes, and during them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch.func import functional_call

Reference = AbstractContextManager[Any]
"""Entered for as long as the model is computed with; gives what is called like a transformers
causal LM and has its `device`. Entered again and again, once at a time."""


def reference_of(model: torch.nn.Module, device: torch.device, *, on_host: bool) -> Reference:
    """A reference that is whole in this process; its parameters have the dtype to compute in.

    on_host: its weights stay in host memory and are on `device` only while they are used. Where
    the device is the host, both are the same.
    """
    if on_host:
        return HostReference(model, device)
    return nullcontext(model.to(device))


class HostReference:
    """A model in host memory that computes on `device`: entering it copies its weights there,
    leaving it drops them.

    The model itself is never changed, so a pass that fails leaves it as it was.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        if device.type == "cuda":
            for parameter in model.parameters():
                parameter.data = parameter.data.pin_memory()
        self.module = model
        self.device = device
        self._moved: dict[str, torch.Tensor] = {}

    def __enter__(self) -> Self:
        tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        self._moved = {
            name: tensor.detach().to(self.device, non_blocking=True)
            for name, tensor in tensors.items()
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._moved = {}

    def __call__(self, **inputs: Any) -> Any:
        """What the model returns, computed on `device`. Only between entering and leaving."""
        assert self._moved, "the weights are in host memory"
        return functional_call(self.module, self._moved, (), inputs)
