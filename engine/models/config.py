"""What a model is made of, read from a config.json dict. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError, UnknownArchitecture
from engine.layers.rope_config import RopeConfig, read_rope, served_positions
from engine.models.config_keys import check_keys, flag, number, token_ids
from engine.models.decoder_options import Options
from engine.models.registry import find


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One dense decoder. Sizes count elements; `max_position` counts tokens that are served.

    eos_token_ids: tokens that end a generation; generation_config.json's where it has any.
    torch_dtype: dtype of the files ("bfloat16"); None where they do not say.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    torch_dtype: str | None


def read_config(
    source: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The model that a config.json dict describes.

    generation: dict of generation_config.json, if there is one; its token ids win.
    Raises UnknownArchitecture for an architecture, activation, window or rope type that is
    not served; CheckpointError, naming the key, for a missing or malformed entry.
    """
    architecture = _architecture(source)
    options = find(architecture).options(source)
    rope = read_rope(source)
    positions = served_positions(rope, _integer(source, "max_position_embeddings"))
    _refuse_unserved(source, options, positions)
    num_heads = _integer(source, "num_attention_heads")
    hidden_size = _integer(source, "hidden_size")
    head_dim = _head_dim(source, options, hidden_size, num_heads)
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        num_layers=_integer(source, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_kv_heads(source, num_heads),
        head_dim=head_dim,
        intermediate_size=_integer(source, "intermediate_size"),
        vocab_size=_integer(source, "vocab_size"),
        rms_norm_eps=_epsilon(source),
        rope=_fitted(rope, head_dim),
        max_position=positions,
        tie_word_embeddings=bool(flag(source, "tie_word_embeddings")),
        qkv_bias=options.qkv_bias,
        o_bias=options.o_bias,
        mlp_bias=options.mlp_bias,
        qk_norm=options.qk_norm,
        eos_token_ids=_eos_ids(source, generation or {}),
        bos_token_id=_bos_id(source, generation or {}),
        torch_dtype=_dtype(source),
    )


def _needed(source: Mapping[str, Any], key: str) -> Any:
    value = source.get(key)
    if value is None:
        raise CheckpointError(f"the model's configuration has no {key!r}", field=key)
    return value


def _epsilon(source: Mapping[str, Any]) -> float:
    _needed(source, "rms_norm_eps")
    return number(source, "rms_norm_eps")


def _fitted(rope: RopeConfig, head_dim: int) -> RopeConfig:
    """`rope` if it suits heads of `head_dim`."""
    if head_dim % 2:
        raise UnknownArchitecture(
            f"head_dim {head_dim} is odd, and rotary embeddings turn pairs", field="head_dim"
        )
    divisors = rope.frequency_divisors
    if divisors is not None and len(divisors) != head_dim // 2:
        raise CheckpointError(
            f"{len(divisors)} rotary divisors do not fit a head_dim of {head_dim}",
            field="frequency_divisors",
        )
    return rope


def _integer(source: Mapping[str, Any], key: str) -> int:
    value = _needed(source, key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise CheckpointError(f"{key!r} is {value!r}, not a positive integer", field=key)
    return value


def _architecture(source: Mapping[str, Any]) -> str:
    names = _needed(source, "architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(
            f"'architectures' is {names!r}, not a list with a class name", field="architectures"
        )
    return names[0]


def _kv_heads(source: Mapping[str, Any], num_heads: int) -> int:
    if source.get("num_key_value_heads") is None:
        return num_heads
    num_kv_heads = _integer(source, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"num_key_value_heads {num_kv_heads} does not divide num_attention_heads {num_heads}",
            field="num_key_value_heads",
        )
    return num_kv_heads


def _head_dim(source: Mapping[str, Any], options: Options, hidden_size: int, num_heads: int) -> int:
    if source.get("head_dim") is not None:
        return _integer(source, "head_dim")
    if options.default_head_dim is not None:
        return options.default_head_dim
    if hidden_size % num_heads:
        raise CheckpointError(
            f"num_attention_heads {num_heads} does not divide hidden_size {hidden_size}, "
            "and there is no 'head_dim'",
            field="head_dim",
        )
    return hidden_size // num_heads


def _refuse_unserved(source: Mapping[str, Any], options: Options, positions: int) -> None:
    activation = source.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnknownArchitecture(
            f"hidden_act {activation!r} is not served; known: silu", field="hidden_act"
        )
    quantised = source.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise UnknownArchitecture(
            f"quantization_config: checkpoints quantised by {method!r} are not served",
            field="quantization_config",
        )
    check_keys(source, options)
    layer_types = _layer_types(source)
    if _slides(source, options, positions, layer_types):
        raise UnknownArchitecture(
            f"sliding_window {source.get('sliding_window', options.default_window)} is not "
            "served: only full attention is",
            field="sliding_window",
        )


def _layer_types(source: Mapping[str, Any]) -> list[str] | None:
    found = source.get("layer_types")
    if found is None:
        return None
    if not isinstance(found, list):
        raise CheckpointError(f"'layer_types' is {found!r}, not a list", field="layer_types")
    for kind in found:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnknownArchitecture(
                f"layer_types: {kind!r} is not served; known: full_attention", field="layer_types"
            )
    return found


def _slides(
    source: Mapping[str, Any], options: Options, positions: int, layer_types: list[str] | None
) -> bool:
    """Whether any layer sees less than the whole context."""
    window = source.get("sliding_window", options.default_window)
    if window is None:
        return False
    if options.default_window is not None:
        # The window is all that these architectures look at.
        return _integer({"sliding_window": window}, "sliding_window") < positions
    if not flag(source, "use_sliding_window"):
        return False
    window = _integer(source, "sliding_window")
    if layer_types is not None:
        return "sliding_attention" in layer_types
    first = source.get("max_window_layers")
    if first is None:
        return window < positions
    if isinstance(first, bool) or not isinstance(first, int):
        raise CheckpointError(
            f"'max_window_layers' is {first!r}, not an integer", field="max_window_layers"
        )
    return first < _integer(source, "num_hidden_layers")


def _eos_ids(source: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    ids = token_ids(generation, "eos_token_id")
    return (token_ids(source, "eos_token_id") if ids is None else ids) or ()


def _bos_id(source: Mapping[str, Any], generation: Mapping[str, Any]) -> int | None:
    for place in (generation, source):
        ids = token_ids(place, "bos_token_id")
        if ids is not None and len(ids) != 1:
            raise CheckpointError(f"'bos_token_id' is {ids}, not one id", field="bos_token_id")
        if ids is not None:
            return ids[0]
    return None


def _dtype(source: Mapping[str, Any]) -> str | None:
    for key in ("dtype", "torch_dtype"):
        value = source.get(key)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{key!r} is {value!r}, not the name of a dtype", field=key)
        if value:
            return value
    return None
