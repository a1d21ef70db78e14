"""OLMo 2 (arXiv:2501.00656): norms after attention and MLP, and over all query and key heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.layers.kinds import LayerKind
from engine.models.config_keys import flag
from engine.models.decoder_options import Options
from engine.models.sizes import Sizes

OPTIONS = Options()


def layers(source: Mapping[str, Any], sizes: Sizes) -> tuple[LayerKind, ...]:
    """`attention_bias` sets all four attention biases."""
    bias = bool(flag(source, "attention_bias"))
    return sizes.alike(
        sizes.layer(
            qkv_bias=bias,
            o_bias=bias,
            qk_norm="projection",
            norm_place="after",
            weighting="wide",
            rope_wide=True,
        )
    )
