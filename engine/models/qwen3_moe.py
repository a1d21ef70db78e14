"""Qwen3 with experts (arXiv:2505.09388): Qwen3's attention, and experts without a shared one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from engine.layers.kinds import LayerKind, MoeKind
from engine.models.config_keys import flag, whole_number
from engine.models.decoder_options import Options
from engine.models.mixtures import chosen, one_of, spaced, switched
from engine.models.sizes import Sizes
from engine.models.windows import windows_of
from kernels.routing import RoutingRule

# transformers writes the second.
_COUNT_KEYS = ("num_experts", "num_local_experts")
_DEFAULT_COUNT = 128
_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
    }
)
OPTIONS = Options(
    reads=frozenset({*_COUNT_KEYS, *_DEFAULTS, "mlp_only_layers"}),
    defaults=_DEFAULTS,
    has_windows=True,
)


def layers(source: Mapping[str, Any], sizes: Sizes) -> tuple[LayerKind, ...]:
    """`attention_bias` sets all four attention biases; `use_sliding_window` gives every layer its
    window."""
    bias = bool(flag(source, "attention_bias"))
    layer = sizes.layer(qkv_bias=bias, o_bias=bias, qk_norm="head")
    key, num_experts = one_of(source, _COUNT_KEYS, _DEFAULT_COUNT)
    kinds = [layer] * sizes.num_layers
    if num_experts:
        experts = _experts(source, key, num_experts)
        kinds = sizes.mixed(layer, experts, spaced(source, sizes.num_layers))
    slides = bool(flag(source, "use_sliding_window"))
    return sizes.windowed(kinds, windows_of(source, [slides] * sizes.num_layers))


def _experts(source: Mapping[str, Any], count_key: str, num_experts: int) -> MoeKind:
    return MoeKind(
        routing=RoutingRule(
            num_experts=num_experts,
            top_k=chosen(source, num_experts, count_key),
            normalised=switched(source, "norm_topk_prob"),
            rounded_weights=True,
        ),
        intermediate_size=whole_number(source, "moe_intermediate_size"),
        count_key=count_key,
    )
