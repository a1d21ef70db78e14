"""Qwen2 and Qwen2.5: biases on the query, key and value projections only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.layers.kinds import LayerKind
from engine.models.decoder_options import Options
from engine.models.sizes import Sizes
from engine.models.windows import switched_windows

OPTIONS = Options(
    defaults={"max_window_layers": 28, "num_key_value_heads": 32, "sliding_window": 4096},
    has_windows=True,
)


def layers(source: Mapping[str, Any], sizes: Sizes) -> tuple[LayerKind, ...]:
    """Some layers may have a sliding window."""
    layer = sizes.layer(qkv_bias=True)
    return sizes.windowed(sizes.alike(layer), switched_windows(source, sizes.num_layers))
