"""Qwen3 dense: per-head norms of queries and keys, and a head dim of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.models.config_keys import flag
from engine.models.decoder_options import Options


def options(source: Mapping[str, Any]) -> Options:
    """`attention_bias` sets all four attention biases."""
    attention_bias = bool(flag(source, "attention_bias"))
    return Options(
        qkv_bias=attention_bias, o_bias=attention_bias, qk_norm=True, default_head_dim=128
    )
