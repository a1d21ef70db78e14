"""Keys of config.json that change what a model computes, and what becomes of each.

A key is read by `engine/models/config.py`, `engine/layers/rope_config.py` or the family's page
(`Options.reads`) and computed; or it is one of `NEUTRAL`, whose other values are refused; or it is
unknown. An unknown key whose name speaks of the computation (`_COMPUTES`) is refused unless its
value switches nothing on; any other is of no concern here, as in transformers. Torch-free.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from engine.errors import CheckpointError, UnknownArchitecture
from engine.layers.kinds import LayerKind
from engine.models.decoder_options import Options

HANDLED = frozenset(
    {
        "architectures",
        "attention_bias",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "max_window_layers",
        "mlp_bias",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "qkv_bias",
        "quantization_config",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "torch_dtype",
        "use_sliding_window",
        "vocab_size",
    }
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "add_cross_attention": (None, False),
        "alibi": (None, False),
        "attention_chunk_size": (None,),
        "attention_multiplier": (None,),
        "attn_logit_softcapping": (None, 0),
        "clip_qkv": (None,),
        "embedding_multiplier": (None, 1),
        "final_logit_softcapping": (None, 0),
        "hidden_activation": (None, "silu", "swish"),
        "is_causal": (None, True),
        "is_encoder_decoder": (None, False),
        "kv_lora_rank": (None, 0),
        "logit_scale": (None, 1),
        "logits_scaling": (None, 1),
        "n_routed_experts": (None, 0),
        "no_rope_layer_interval": (None, 0),
        "no_rope_layers": (None, []),
        "num_experts": (None, 0),
        "num_local_experts": (None, 0),
        "parallel_attn": (None, False),
        "per_layer_config": (None, {}),
        "pruned_heads": (None, {}, []),
        "q_lora_rank": (None, 0),
        "qk_layernorm": (None, False),
        "query_pre_attn_scalar": (None,),
        "residual_multiplier": (None, 1),
        "scale_depth": (None,),
        "scale_emb": (None, 1),
        "use_bidirectional_attention": (None, False),
        "use_parallel_residual": (None, False),
        "use_qk_norm": (None, False),
    }
)
"""Keys of related architectures, and the values with which they change nothing."""
_COMPUTES = re.compile(
    r"soft_?cap|logit_cap|multiplier|scal(e|ing|ar)|expert|moe|window|attention_chunk|rope|rotary"
    r"|alibi|qk_norm|qk_layernorm|residual|bias|sinks?\b|mup|lora_rank|linear_attn|mamba|ssm"
    r"|block_type|layer_type|_act$|activation"
)
# No window, and as many heads as there are of queries.
_MAY_BE_NULL = frozenset({"num_key_value_heads", "sliding_window"})
# They speak of training, of printing or of how to compute, not of what.
_HARMLESS = frozenset(
    {
        "activation_checkpointing",
        "initializer_scale",
        "moe_aux_loss_coef",
        "num_experts_per_tok",
        "router_aux_loss_coef",
    }
)


def filled(source: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """A config.json dict with what its family takes for keys that it leaves out.

    Raises CheckpointError for a null in place of such a key: only of a few does it say something.
    """
    for key in options.defaults.keys() - _MAY_BE_NULL:
        if key in source and source[key] is None:
            raise CheckpointError(
                f"{key!r} is null in the model's configuration; give it a value or leave it out",
                field=key,
            )
    return {**options.defaults, **source}


def check_keys(source: Mapping[str, Any], options: Options) -> None:
    """Refuse a config.json dict with a key that its architecture would not compute.

    Raises UnknownArchitecture naming the key, CheckpointError for a switch that is none.
    """
    for key, value in source.items():
        if key in options.reads:
            continue
        if key in NEUTRAL:
            if not any(_same(value, neutral) for neutral in NEUTRAL[key]):
                raise _unserved(key, value)
        elif key in HANDLED or key in _HARMLESS or not _COMPUTES.search(key):
            continue
        elif not switches_nothing(value):
            raise _unserved(key, value)


def check_biases(source: Mapping[str, Any], layer: LayerKind) -> None:
    """Refuse a config.json dict that asks for biases which its layers do not have.

    Raises UnknownArchitecture naming the key, CheckpointError for a switch that is none.
    """
    qkv_bias, mlp_bias = layer.attention.qkv_bias, layer.mlp.bias
    for key, has in (("attention_bias", qkv_bias), ("mlp_bias", mlp_bias)):
        if flag(source, key) and not has:
            raise _unserved(key, source[key])
    if flag(source, "qkv_bias") not in (None, qkv_bias):
        raise _unserved("qkv_bias", source["qkv_bias"])


def switches_nothing(value: Any) -> bool:
    """Whether a value of an unknown key is none, off, zero, empty or a factor of one."""
    return value is None or (value == 1 and value is not True) or not value


def flag(source: Mapping[str, Any], key: str) -> bool | None:
    """true, false or nothing. Raises CheckpointError naming the key for another type."""
    value = source.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{key!r} is {value!r}, not true or false", field=key)
    return value


def needed(source: Mapping[str, Any], key: str) -> Any:
    """The value of a key. Raises CheckpointError naming it where there is none."""
    value = source.get(key)
    if value is None:
        raise CheckpointError(f"the model's configuration has no {key!r}", field=key)
    return value


def whole_number(source: Mapping[str, Any], key: str) -> int:
    """A whole number above zero. Raises CheckpointError naming the key for anything else."""
    value = needed(source, key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise CheckpointError(f"{key!r} is {value!r}, not a positive integer", field=key)
    return value


def number(source: Mapping[str, Any], key: str) -> float:
    """A finite number above zero. Raises CheckpointError naming the key for anything else."""
    value = source.get(key)
    try:
        found = math.nan if isinstance(value, bool | str) else float(value or math.nan)
    except (TypeError, OverflowError):
        found = math.nan
    if not (math.isfinite(found) and found > 0):
        raise CheckpointError(f"{key!r} is {value!r}, not a positive finite number", field=key)
    return found


def token_ids(source: Mapping[str, Any], key: str) -> tuple[int, ...] | None:
    """A token id or a list of them; None where there is none. Raises CheckpointError naming the
    key for anything else."""
    value = source.get(key)
    if value is None:
        return None
    listed = value if isinstance(value, list) else [value]
    for item in listed:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < 2**31:
            raise CheckpointError(f"{key!r} is {value!r}: {item!r} is no token id", field=key)
    return tuple(listed)


def _same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _unserved(key: str, value: Any) -> UnknownArchitecture:
    return UnknownArchitecture(
        f"{key!r} is {value!r} in the model's configuration, which is not served", field=key
    )
