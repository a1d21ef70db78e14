"""Mistral: Llama without biases, its layers all with a sliding window or all without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.layers.kinds import LayerKind
from engine.models.decoder_options import Options
from engine.models.sizes import Sizes
from engine.models.windows import windows_of

OPTIONS = Options(defaults={"num_key_value_heads": 8, "sliding_window": 4096}, has_windows=True)


def layers(source: Mapping[str, Any], sizes: Sizes) -> tuple[LayerKind, ...]:
    """`sliding_window` counts for every layer, whatever `layer_types` and switches say."""
    windows = windows_of(source, [True] * sizes.num_layers)
    return sizes.windowed(sizes.alike(sizes.layer()), windows)
