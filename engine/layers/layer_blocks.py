"""From the kind of a layer to its module: one line a block."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from engine.layers.attention import Attention
from engine.layers.decoder_layers import NormAfterLayer, NormBeforeLayer, NormBothLayer
from engine.layers.kinds import AttentionKind, DenseMLPKind, LayerKind, NormPlace
from engine.layers.mlp import GatedMLP
from engine.layers.rotary import RotaryTables
from engine.layers.runtime import LayerRuntime

_LAYERS: Mapping[NormPlace, type[Any]] = MappingProxyType(
    {"before": NormBeforeLayer, "after": NormAfterLayer, "both": NormBothLayer}
)
_ATTENTIONS: Mapping[type[Any], type[Any]] = MappingProxyType({AttentionKind: Attention})
_MLPS: Mapping[type[Any], type[Any]] = MappingProxyType({DenseMLPKind: GatedMLP})


def build_layer(
    index: int, kind: LayerKind, rotaries: RotaryTables, *, runtime: LayerRuntime
) -> nn.Module:
    """Layer `index` of a model, an `engine.layers.decoder_layers.DecoderLayer`."""
    attention = _ATTENTIONS[type(kind.attention)](
        index, kind.hidden_size, kind.attention, rotaries.of(kind.attention), runtime=runtime
    )
    mlp = _MLPS[type(kind.mlp)](kind.hidden_size, kind.mlp, runtime=runtime)
    layer: nn.Module = _LAYERS[kind.norm_place](kind, attention, mlp, runtime=runtime)
    return layer
