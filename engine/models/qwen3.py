"""Qwen3 dense: per-head norms of queries and keys, and a head dim of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.layers.kinds import LayerKind
from engine.models.config_keys import flag
from engine.models.decoder_options import Options
from engine.models.sizes import Sizes
from engine.models.windows import switched_windows

OPTIONS = Options(
    defaults={"max_window_layers": 28, "num_key_value_heads": 32, "sliding_window": 4096},
    default_head_dim=128,
    has_windows=True,
)


def layers(source: Mapping[str, Any], sizes: Sizes) -> tuple[LayerKind, ...]:
    """`attention_bias` sets all four attention biases; some layers may have a sliding window."""
    bias = bool(flag(source, "attention_bias"))
    layer = sizes.layer(qkv_bias=bias, o_bias=bias, qk_norm="head")
    return sizes.windowed(sizes.alike(layer), switched_windows(source, sizes.num_layers))
