"""From the kind of a layer to its module: one line a block."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from engine.layers.attention import Attention
from engine.layers.decoder_layers import (
    FeedForward,
    NormAfterLayer,
    NormBeforeLayer,
    NormBothLayer,
)
from engine.layers.kinds import AttentionKind, LayerKind, MoeKind, NormPlace
from engine.layers.mlp import GatedMLP
from engine.layers.moe import MoeBlock
from engine.layers.rotary import RotaryTables
from engine.layers.runtime import LayerRuntime

_LAYERS: Mapping[NormPlace, type[Any]] = MappingProxyType(
    {"before": NormBeforeLayer, "after": NormAfterLayer, "both": NormBothLayer}
)
_ATTENTIONS: Mapping[type[Any], type[Any]] = MappingProxyType({AttentionKind: Attention})


def build_layer(
    index: int, kind: LayerKind, rotaries: RotaryTables, *, runtime: LayerRuntime
) -> nn.Module:
    """Layer `index` of a model, an `engine.layers.decoder_layers.DecoderLayer`."""
    attention = _ATTENTIONS[type(kind.attention)](
        index, kind.hidden_size, kind.attention, rotaries.of(kind.attention), runtime=runtime
    )
    mlp = _mlp(index, kind, runtime)
    layer: nn.Module = _LAYERS[kind.norm_place](kind, attention, mlp, runtime=runtime)
    return layer


def _mlp(index: int, kind: LayerKind, runtime: LayerRuntime) -> FeedForward:
    if isinstance(kind.mlp, MoeKind):
        return MoeBlock(index, kind.hidden_size, kind.mlp, runtime=runtime)
    return GatedMLP(kind.hidden_size, kind.mlp, runtime=runtime)
