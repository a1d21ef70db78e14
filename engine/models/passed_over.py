"""Tensors that checkpoints hold and no model here needs."""

from __future__ import annotations

import re

from engine.models.config import ModelConfig

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_FREQUENCIES = "rotary_emb.inv_freq"


class PassedOver:
    """The set of their names: rotary frequencies of old checkpoints, which are computed, and the
    layers behind the last one that predict tokens further ahead, where transformers drops them."""

    def __init__(self, config: ModelConfig) -> None:
        self._num_layers = config.num_layers
        self._extra_layers = config.extra_layers

    def __contains__(self, name: object) -> bool:
        if name == f"model.{_FREQUENCIES}":
            return True
        found = _LAYER.fullmatch(name) if isinstance(name, str) else None
        if found is None:
            return False
        layer, rest = int(found[1]), found[2]
        if layer < self._num_layers:
            return rest == f"self_attn.{_FREQUENCIES}"
        return layer in self._extra_layers
