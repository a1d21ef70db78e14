"""Gemma 3, text (arXiv:2503.19786): layers with a sliding window and a rotary base of their own
between layers that see everything, norms on both sides of attention and MLP, scaled embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from engine.errors import UnknownArchitecture
from engine.layers.kinds import LayerKind
from engine.layers.rope_config import RopeConfig, read_rope
from engine.models.config_keys import flag, number, whole_number
from engine.models.decoder_options import Options
from engine.models.sizes import Sizes
from engine.models.windows import SLIDING, layer_types, listed_windows

_FULL = "full_attention"
_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "head_dim": 256,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10_000.0,
        "rope_theta": 1_000_000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
        "vocab_size": 262208,
    }
)
_ROPE_KEYS = ("max_position_embeddings", "partial_rotary_factor")


def _rope_settings(source: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What `rope_parameters` says of one kind of layers, as a config.json of that alone."""
    own = {key: source[key] for key in _ROPE_KEYS if key in source}
    both = source.get("rope_parameters")
    if both is None:
        return own
    if not isinstance(both, Mapping) or not set(both) <= {_FULL, SLIDING}:
        raise UnknownArchitecture(
            f"rope_parameters {both!r} is not served: Gemma 3 has settings for {_FULL} and for "
            f"{SLIDING}",
            field="rope_parameters",
        )
    return {**own, "rope_parameters": both.get(kind)}


def _global_rope(source: Mapping[str, Any]) -> RopeConfig:
    """Of the layers that see everything: the only ones that a context extension changes."""
    settings = _rope_settings(source, _FULL)
    older = {"rope_scaling": source.get("rope_scaling"), "rope_theta": source.get("rope_theta")}
    return _as_trained(read_rope({**older, **settings}))


def _local_rope(source: Mapping[str, Any]) -> RopeConfig:
    older = {"rope_theta": source.get("rope_local_base_freq")}
    return _as_trained(read_rope({**older, **_rope_settings(source, SLIDING)}))


def _as_trained(rope: RopeConfig) -> RopeConfig:
    """`rope`, unless transformers, which trains, would pass over a setting of it: it looks for
    `truncate` beside the settings of both kinds of layers, where no file has it."""
    if not rope.truncate:
        raise UnknownArchitecture(
            "rope setting 'truncate' is False, which transformers does not compute for Gemma 3",
            field="truncate",
        )
    return rope


OPTIONS = Options(
    reads=frozenset(
        {
            "hidden_activation",
            "query_pre_attn_scalar",
            "rope_local_base_freq",
            "sliding_window_pattern",
            # Where transformers keeps the pattern that `layer_types` came from.
            "_sliding_window_pattern",
        }
    ),
    defaults=_DEFAULTS,
    has_windows=True,
    activation_key="hidden_activation",
    activations=("gelu_pytorch_tanh",),
    rope=_global_rope,
    scales_embedding=True,
    # Its residual stream was trained in bfloat16 and passes 65504.
    overflows_float16=True,
)


def layers(source: Mapping[str, Any], sizes: Sizes) -> tuple[LayerKind, ...]:
    """`layer_types` says which layers slide; without it all but every sixth, or whichever
    `sliding_window_pattern` counts. `attention_bias` sets all four attention biases."""
    bias = bool(flag(source, "attention_bias"))
    seeing_all = sizes.layer(
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        norm_place="both",
        weighting="offset",
        activation="gelu_tanh",
        scale=number(source, "query_pre_attn_scalar") ** -0.5,
    )
    local = replace(seeing_all.attention, rope=_reaching(_local_rope(source), source, sizes))
    sliding = replace(seeing_all, attention=local)
    slides = _slides(source, sizes.num_layers)
    kinds = [sliding if slide else seeing_all for slide in slides]
    return sizes.windowed(kinds, listed_windows(source, slides))


def _reaching(local: RopeConfig, source: Mapping[str, Any], sizes: Sizes) -> RopeConfig:
    """`local`, unless it is scaled by a length that the other layers' settings exceed."""
    trained = whole_number(source, "max_position_embeddings")
    if local.rope_type == "dynamic" and sizes.positions > trained:
        raise UnknownArchitecture(
            f"rope_parameters: type dynamic of {SLIDING} is served up to {trained} positions, "
            f"but those of {_FULL} reach {sizes.positions}",
            field="rope_parameters",
        )
    return local


def _slides(source: Mapping[str, Any], num_layers: int) -> list[bool]:
    types = layer_types(source, num_layers)
    if types is not None:
        return [kind == SLIDING for kind in types]
    pattern = whole_number(source, "sliding_window_pattern")
    return [(index + 1) % pattern != 0 for index in range(num_layers)]
