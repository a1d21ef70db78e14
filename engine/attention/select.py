"""Which attention back end serves, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.attention.base import AttentionBackend
from engine.config import AttentionBackendName
from engine.errors import InvalidRequest
from engine.kv.pool import KVPool


@dataclass(frozen=True)
class Choice:
    """A back end and the reason it was taken, for the log."""

    backend: AttentionBackend
    reason: str


def select(
    name: AttentionBackendName,
    pool: KVPool,
    *,
    num_heads: int,
    scale: float,
    device: torch.device,
) -> Choice:
    """Build the back end `name`; 'auto' takes Triton on a GPU and torch on a CPU.

    Raises InvalidRequest when the back end cannot run on `device`.
    """
    if name == "auto":
        found = "triton" if device.type == "cuda" else "torch_native"
        reason = f"auto: {device.type} device"
    else:
        found, reason = name, "asked for"
    if found == "triton":
        if device.type != "cuda":
            raise InvalidRequest(
                "'triton' needs a GPU; use 'torch_native' or 'auto' on a CPU", field="attention"
            )
        from engine.attention.triton import TritonBackend

        return Choice(TritonBackend(pool, scale=scale), reason)
    from engine.attention.torch_native import TorchNativeBackend

    return Choice(TorchNativeBackend(pool, num_heads=num_heads, scale=scale), reason)
