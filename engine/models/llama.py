"""Llama 1 to 3, and models of its shape such as SmolLM2: the plain decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.layers.kinds import LayerKind
from engine.models.config_keys import flag
from engine.models.decoder_options import Options
from engine.models.sizes import Sizes

OPTIONS = Options()


def layers(source: Mapping[str, Any], sizes: Sizes) -> tuple[LayerKind, ...]:
    """`attention_bias` sets all four attention biases, `mlp_bias` those of the MLP."""
    attention_bias = bool(flag(source, "attention_bias"))
    return sizes.alike(
        sizes.layer(
            qkv_bias=attention_bias,
            o_bias=attention_bias,
            mlp_bias=bool(flag(source, "mlp_bias")),
        )
    )
