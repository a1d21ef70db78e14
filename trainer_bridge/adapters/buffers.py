"""Buffers that are weights: they travel with the parameters, in float32 whatever those are in.

Most buffers of a transformers model are constants that an engine computes itself. The correction
bias of a sigmoid router is none: it decides which experts are chosen (DeepSeek-V3, arXiv
2412.19437, section 2.1.2), and a rounding of it chooses others.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

SENT_BUFFERS = frozenset({"e_score_correction_bias"})
"""Last parts of the names of buffers that travel."""


def is_sent_buffer(name: str) -> bool:
    """Whether a tensor of this name is a buffer that travels, and stays float32."""
    return name.rpartition(".")[2] in SENT_BUFFERS


def sent_buffers(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers of a module that travel, with their names, in its order."""
    for name, buffer in model.named_buffers():
        if is_sent_buffer(name):
            yield name, buffer.detach()


def keep_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Float32 copies of the buffers that travel, in host memory, for `restore_buffers`."""
    return {name: b.to("cpu", torch.float32, copy=True) for name, b in sent_buffers(model)}


def restore_buffers(model: torch.nn.Module, kept: dict[str, torch.Tensor]) -> None:
    """Give a module back the buffers that `keep_buffers` copied, in float32: a cast of the whole
    module (`.bfloat16()`, and so DeepSpeed's engine) has rounded them."""
    for name, buffer in model.named_buffers():
        if name in kept:
            buffer.data = kept[name].to(buffer.device)


def wire_dtype(name: str, wire: torch.dtype | None) -> torch.dtype | None:
    """The dtype that a tensor of this name is sent in, where parameters are sent in `wire`."""
    return torch.float32 if is_sent_buffer(name) else wire
