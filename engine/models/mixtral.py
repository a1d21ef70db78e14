"""Mixtral (arXiv:2401.04088): Mistral with experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.layers.kinds import ExpertNames, LayerKind, MoeKind
from engine.models.decoder_options import Options
from engine.models.mixtures import chosen, one_of
from engine.models.sizes import Sizes
from engine.models.windows import windows_of
from kernels.routing import RoutingRule

_COUNT_KEYS = ("num_local_experts", "num_experts")
_DEFAULT_COUNT = 8
OPTIONS = Options(
    # Noise of training alone.
    reads=frozenset({*_COUNT_KEYS, "num_experts_per_tok", "router_jitter_noise"}),
    defaults={
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "rope_theta": 1_000_000.0,
    },
    has_windows=True,
)
_NAMES = ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")


def layers(source: Mapping[str, Any], sizes: Sizes) -> tuple[LayerKind, ...]:
    """`intermediate_size` is that of an expert; `sliding_window` counts for every layer."""
    key, num_experts = one_of(source, _COUNT_KEYS, _DEFAULT_COUNT)
    experts = MoeKind(
        routing=RoutingRule(
            num_experts=num_experts,
            top_k=chosen(source, num_experts, key),
            normalised=True,
        ),
        intermediate_size=sizes.intermediate_size,
        names=_NAMES,
        count_key=key,
        size_key="intermediate_size",
    )
    everywhere = [True] * sizes.num_layers
    kinds = sizes.mixed(sizes.layer(), experts, everywhere)
    return sizes.windowed(kinds, windows_of(source, everywhere))
