"""Mistral without a sliding window: Llama without biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.models.decoder_options import Options


def options(source: Mapping[str, Any]) -> Options:
    """No option is left to the configuration."""
    return Options(default_window=4096)
