"""KV pools of keys and values of heads, and attention over heads that are rotated already."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.attention.base import AttentionStep
from engine.kv.layout import HeadLayout
from engine.kv.pool import KVPool
from kernels.testing import RotatedHeads


def head_pool(
    *,
    num_layers: int,
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    windows: Sequence[int | None] | None = None,
    scaled: bool = False,
    **options,
) -> KVPool:
    """windows: of each layer; None for none. scaled: fp8. options: of the pool."""
    layouts = [
        HeadLayout(
            num_kv_heads=num_kv_heads,
            key_dim=head_dim,
            value_dim=head_dim,
            dtype=dtype,
            scaled=scaled,
            window=window,
        )
        for window in windows or (None,) * num_layers
    ]
    assert len(layouts) == num_layers
    return KVPool(
        layouts,
        num_pages=num_pages,
        page_size=page_size,
        device=torch.device(device),
        **options,
    )


def attend(
    step: AttentionStep, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Write keys and values [T, K, D] of a layer, then attend with queries [T, H, D]."""
    return step.attend(layer, step.writes.store(layer, RotatedHeads(q, k, v)))
