"""Qwen2 and Qwen2.5: biases on the query, key and value projections only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.models.decoder_options import Options


def options(source: Mapping[str, Any]) -> Options:
    """No option is left to the configuration."""
    return Options(qkv_bias=True)
