"""The sliding windows of a model's layers."""

from __future__ import annotations

from engine.models.config import ModelConfig


def layer_windows(config: ModelConfig) -> tuple[int | None, ...] | None:
    """Of each layer, in order; None where no layer has one."""
    windows = tuple(layer.attention.window for layer in config.layers)
    return windows if any(windows) else None
