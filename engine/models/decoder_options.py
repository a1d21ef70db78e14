"""How a family's config.json is read, as far as that is alike for all. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from engine.layers.rope_config import RopeConfig, read_rope


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a family's page says of its config.json.

    reads: keys that the page reads itself, beside those that every family has
        (`engine.models.config_keys.HANDLED`).
    defaults: what transformers takes for keys that a file may leave out.
    default_head_dim: head dim where there is none or null; None is hidden size / heads.
    has_windows: the page serves sliding windows; elsewhere one that applies is refused.
    activation_key, activations: the key that names the gated activation, and the names of the one
        that the page computes.
    rope: reads the rotary settings, of a family with several those that say how far it reaches.
    scales_embedding: rows of the embedding are multiplied by the root of the hidden size.
    overflows_float16: trained checkpoints have activations beyond what float16 holds, so that it
        is refused.
    extra_layers: of files that have more layers than the model, those that transformers drops.
    """

    reads: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    default_head_dim: int | None = None
    has_windows: bool = False
    activation_key: str = "hidden_act"
    activations: tuple[str, ...] = ("silu", "swish")
    rope: Callable[[Mapping[str, Any]], RopeConfig] = read_rope
    scales_embedding: bool = False
    overflows_float16: bool = False
    extra_layers: frozenset[int] = frozenset()
