"""Qwen1.5 and Qwen2 with experts: Qwen2's attention, experts, and a shared one that is gated."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from engine.layers.kinds import DenseMLPKind, LayerKind, MoeKind, SharedExpertKind
from engine.models.config_keys import flag, whole_number
from engine.models.decoder_options import Options
from engine.models.mixtures import chosen, one_of, spaced, switched
from engine.models.sizes import Sizes
from engine.models.windows import layer_types, switched_types, windows_of
from kernels.routing import RoutingRule

_COUNT_KEYS = ("num_experts",)
_DEFAULT_COUNT = 60
_SHARED_KEY = "shared_expert_intermediate_size"
_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "decoder_sparse_step": 1,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        _SHARED_KEY: 5632,
        "sliding_window": 4096,
    }
)
OPTIONS = Options(
    reads=frozenset({*_COUNT_KEYS, *_DEFAULTS, "mlp_only_layers"}),
    defaults=_DEFAULTS,
    has_windows=True,
)


def layers(source: Mapping[str, Any], sizes: Sizes) -> tuple[LayerKind, ...]:
    """`qkv_bias` sets the biases of queries, keys and values."""
    layer = sizes.layer(qkv_bias=switched(source, "qkv_bias"))
    key, num_experts = one_of(source, _COUNT_KEYS, _DEFAULT_COUNT)
    kinds = [layer] * sizes.num_layers
    if num_experts:
        experts = _experts(source, key, num_experts)
        kinds = sizes.mixed(layer, experts, spaced(source, sizes.num_layers))
    return sizes.windowed(kinds, _windows(source, sizes.num_layers))


def _experts(source: Mapping[str, Any], count_key: str, num_experts: int) -> MoeKind:
    shared = DenseMLPKind(intermediate_size=whole_number(source, _SHARED_KEY), size_key=_SHARED_KEY)
    return MoeKind(
        routing=RoutingRule(
            num_experts=num_experts,
            top_k=chosen(source, num_experts, count_key),
            normalised=switched(source, "norm_topk_prob"),
            rounded_weights=True,
        ),
        intermediate_size=whole_number(source, "moe_intermediate_size"),
        shared=SharedExpertKind(name="shared_expert", mlp=shared, gated=True),
        count_key=count_key,
    )


def _windows(source: Mapping[str, Any], num_layers: int) -> list[int | None]:
    """Windows of the layers that `layer_types` says, or of every other one of the first
    `max_window_layers`, where `use_sliding_window` is on."""
    types = layer_types(source, num_layers)
    if types is not None:
        return switched_types(source, types)
    switched_on = bool(flag(source, "use_sliding_window"))
    first = whole_number(source, "max_window_layers") if switched_on else 0
    return windows_of(source, [index % 2 == 0 and index < first for index in range(num_layers)])
