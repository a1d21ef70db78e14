"""GLM-4.5 to 4.7 with experts (arXiv:2508.06471): half of each head turns, the first layers are
dense, and the router chooses by groups and by a bias, as DeepSeek-V3's does."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from engine.layers.kinds import LayerKind
from engine.layers.rope_config import RopeConfig, read_rope
from engine.models.config_keys import flag
from engine.models.decoder_options import Options
from engine.models.deepseek_experts import V3_DEFAULTS, V3_READS, v3_experts
from engine.models.mixtures import count, switched
from engine.models.sizes import Sizes

_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        **V3_DEFAULTS,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "num_key_value_heads": 8,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "use_qk_norm": False,
    }
)
_DEFAULT_COUNT = 128


def _rope(source: Mapping[str, Any]) -> RopeConfig:
    return read_rope({"partial_rotary_factor": 0.5, **source}, may_be_partial=True)


OPTIONS = Options(
    reads=V3_READS | _DEFAULTS.keys(),
    defaults=_DEFAULTS,
    rope=_rope,
    # Of GLM-4.5-Air and of GLM-4.5: they predict a token more than the next.
    extra_layers=frozenset({46, 92}),
)


def layers(source: Mapping[str, Any], sizes: Sizes) -> tuple[LayerKind, ...]:
    """`attention_bias` sets the biases of queries, keys and values; `use_qk_norm` norms heads."""
    layer = sizes.layer(
        qkv_bias=bool(flag(source, "attention_bias")),
        qk_norm="head" if switched(source, "use_qk_norm") else "none",
    )
    experts = v3_experts(source, _DEFAULT_COUNT)
    first = count(source, "first_k_dense_replace")
    return tuple(sizes.mixed(layer, experts, [index >= first for index in range(sizes.num_layers)]))
