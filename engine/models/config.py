"""What a model is made of, read from a config.json dict. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError, UnknownArchitecture
from engine.layers.rope_config import RopeConfig, read_rope
from engine.models.options import Options
from engine.models.registry import find


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One dense decoder. Sizes count elements; `max_position` counts tokens.

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
    _refuse_unserved(source, options)
    num_heads = _integer(source, "num_attention_heads")
    hidden_size = _integer(source, "hidden_size")
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        num_layers=_integer(source, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_kv_heads(source, num_heads),
        head_dim=_head_dim(source, options, hidden_size, num_heads),
        intermediate_size=_integer(source, "intermediate_size"),
        vocab_size=_integer(source, "vocab_size"),
        rms_norm_eps=float(_needed(source, "rms_norm_eps")),
        rope=read_rope(source),
        max_position=_integer(source, "max_position_embeddings"),
        tie_word_embeddings=bool(source.get("tie_word_embeddings", False)),
        qkv_bias=options.qkv_bias,
        o_bias=options.o_bias,
        mlp_bias=options.mlp_bias,
        qk_norm=options.qk_norm,
        eos_token_ids=_eos_ids(source, generation or {}),
        bos_token_id=_bos_id(source, generation or {}),
        torch_dtype=source.get("dtype") or source.get("torch_dtype"),
    )


def _needed(source: Mapping[str, Any], key: str) -> Any:
    value = source.get(key)
    if value is None:
        raise CheckpointError(f"the model's configuration has no {key!r}", field=key)
    return value


def _integer(source: Mapping[str, Any], key: str) -> int:
    value = _needed(source, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
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


def _refuse_unserved(source: Mapping[str, Any], options: Options) -> None:
    activation = source.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnknownArchitecture(
            f"hidden_act {activation!r} is not served; known: silu", field="hidden_act"
        )
    if source.get("quantization_config"):
        method = source["quantization_config"].get("quant_method", "unnamed")
        raise UnknownArchitecture(
            f"quantization_config: checkpoints quantised by {method!r} are not served",
            field="quantization_config",
        )
    if _slides(source, options):
        raise UnknownArchitecture(
            f"sliding_window {source['sliding_window']} is not served: only full attention is",
            field="sliding_window",
        )


def _slides(source: Mapping[str, Any], options: Options) -> bool:
    """Whether any layer sees less than the whole context."""
    window = source.get("sliding_window")
    if window is None or not source.get("use_sliding_window", options.slides_by_default):
        return False
    layer_types = source.get("layer_types")
    if layer_types is not None:
        return "sliding_attention" in layer_types
    if "max_window_layers" in source:
        return bool(source["max_window_layers"] < _integer(source, "num_hidden_layers"))
    return bool(window < _integer(source, "max_position_embeddings"))


def _eos_ids(source: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    ids = generation.get("eos_token_id")
    ids = source.get("eos_token_id") if ids is None else ids
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (int(ids),)


def _bos_id(source: Mapping[str, Any], generation: Mapping[str, Any]) -> int | None:
    own = generation.get("bos_token_id")
    return source.get("bos_token_id") if own is None else own
