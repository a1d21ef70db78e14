"""The metadata of a GGUF file as a config.json dict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from engine.errors import CheckpointError, UnknownArchitecture
from engine.models.gguf_families import find_family
from engine.models.gguf_file import GGUFFile
from engine.models.gguf_keys import READ, Sizes, check_gguf_keys

_ROPE_NUMBERS = frozenset(
    key.removeprefix("rope.")
    for key in READ
    if key.startswith("rope.") and key != "rope.scaling.type"
)
_SCALINGS = ("none", "linear", "yarn")
_TOKENS: Mapping[str, str] = MappingProxyType(
    {
        "eos_token_id": "tokenizer.ggml.eos_token_id",
        "bos_token_id": "tokenizer.ggml.bos_token_id",
        "frequency_divisors": "rope_freqs.weight",
        "mlp_bias": "blk.0.ffn_gate.bias",
        "attention_bias": "blk.0.attn_q.bias",
    }
)
_OPTIONAL = ("num_key_value_heads", "head_dim")
_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """What config.json would say of the model in `file`.

    Raises UnknownArchitecture for an architecture that is not served, CheckpointError
    naming the key for metadata that is missing.
    """
    metadata = file.metadata
    architecture = str(metadata.get("general.architecture"))
    family = find_family(architecture)
    config = _sizes(metadata, architecture)
    sizes = _checked_sizes(config, architecture, _scaling(metadata, architecture))
    check_gguf_keys(metadata, architecture, sizes, family.reads)
    _refuse_lists(file, architecture)
    config["architectures"] = [family.architecture]
    config["model_type"] = family.model_type
    config["vocab_size"] = _embedding_rows(file)
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    config["rope_parameters"] = _rope(file, architecture)
    config["eos_token_id"] = _eos_ids(metadata)
    config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    config["pad_token_id"] = metadata.get("tokenizer.ggml.padding_token_id")
    family.complete(metadata, config)
    return config


def gguf_key(architecture: str, key: str) -> str:
    """The key of a GGUF file that says what `key` of config.json says; `key` if none does."""
    for own, name in (*find_family(architecture).reads.items(), *READ.items()):
        if name == key:
            return f"{architecture}.{own}"
    return _TOKENS.get(key, key)


def _sizes(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    sizes = {}
    for key, name in READ.items():
        if key.startswith("rope."):
            continue
        full_key = f"{architecture}.{key}"
        if full_key in metadata:
            sizes[name] = _uniform(full_key, metadata[full_key])
        elif name not in _OPTIONAL:
            raise CheckpointError(f"the GGUF file has no {full_key!r}", field=full_key)
    # Without it llama.cpp takes this, whatever the architecture's default elsewhere.
    if "num_key_value_heads" not in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return sizes


def _uniform(key: str, value: Any) -> Any:
    """A value that may be listed layer by layer."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise UnknownArchitecture(f"layers with different {key} are not served", field=key)
    return value[0]


def _checked_sizes(config: dict[str, Any], architecture: str, scaling: str) -> Sizes:
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    for name in sizes:
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            key = gguf_key(architecture, name)
            raise CheckpointError(f"{key} is {value!r}, not a positive integer", field=key)
    if "head_dim" not in config:
        heads = config["num_attention_heads"]
        if config["hidden_size"] % heads:
            key = gguf_key(architecture, "num_attention_heads")
            raise CheckpointError(
                f"{key} {heads} does not divide the embedding length {config['hidden_size']}",
                field=key,
            )
        # llama.cpp derives it for every architecture; Qwen3's configuration would not.
        config["head_dim"] = config["hidden_size"] // heads
    return Sizes(
        head_dim=config["head_dim"],
        hidden_size=config["hidden_size"],
        context_length=config["max_position_embeddings"],
        scaling=scaling,
    )


def _refuse_lists(file: GGUFFile, architecture: str) -> None:
    for key in file.string_lists:
        if key.startswith(f"{architecture}."):
            raise UnknownArchitecture(
                f"the GGUF file has {key}, a list of strings, which is not served", field=key
            )


def _scaling(metadata: Mapping[str, Any], architecture: str) -> str:
    """The rope type; llama.cpp scales linearly where a file has a factor and no type."""
    rope = f"{architecture}.rope."
    factors = (metadata.get(f"{rope}{key}") for key in ("scaling.factor", "scale_linear"))
    default = "linear" if any(factor not in (None, 0, 1) for factor in factors) else "none"
    found = metadata.get(f"{rope}scaling.type", default)
    if found not in _SCALINGS:
        raise UnknownArchitecture(
            f"{rope}scaling.type {found!r} is not served; known: {', '.join(_SCALINGS)}",
            field=f"{rope}scaling.type",
        )
    return str(found)


def _embedding_rows(file: GGUFFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError("the GGUF file has no 'token_embd.weight'", field="token_embd.weight")
    return embedding.shape[0]


def _rope(file: GGUFFile, architecture: str) -> dict[str, Any]:
    prefix = f"{architecture}.rope."
    own = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    for key in _ROPE_NUMBERS & own.keys():
        if isinstance(own[key], bool) or not isinstance(own[key], int | float):
            raise CheckpointError(
                f"{prefix}{key} is {own[key]!r}, not a number", field=f"{prefix}{key}"
            )
    rope: dict[str, Any] = {"rope_theta": own.get("freq_base", 10000.0), "rope_type": "default"}
    if "rope_freqs.weight" in file.tensors:
        rope["frequency_divisors"] = file.dequantize("rope_freqs.weight").tolist()
    scaling = _scaling(file.metadata, architecture)
    if scaling != "yarn" and own.get("scaling.attn_factor", 1) not in (0, 1):
        key = f"{prefix}scaling.attn_factor"
        raise UnknownArchitecture(
            f"{key} {own['scaling.attn_factor']} is served with YaRN alone", field=key
        )
    if scaling == "none":
        return rope
    rope["rope_type"] = scaling
    rope["factor"] = own.get("scaling.factor", own.get("scale_linear", 1.0))
    if scaling == "linear":
        return rope
    if "scaling.original_context_length" in own:
        rope["original_max_position_embeddings"] = own["scaling.original_context_length"]
    if own.get("scaling.attn_factor"):
        # llama.cpp multiplies YaRN's own factor by it; config.json replaces that factor.
        own_factor = 0.1 * math.log(max(rope["factor"], 1.0)) + 1.0
        rope["attention_factor"] = own["scaling.attn_factor"] * own_factor
    rope["beta_fast"] = own.get("scaling.yarn_beta_fast")
    rope["beta_slow"] = own.get("scaling.yarn_beta_slow")
    return rope


def _eos_ids(metadata: Mapping[str, Any]) -> list[int]:
    found = [metadata.get(f"tokenizer.ggml.{key}") for key in _EOS_KEYS]
    return list(dict.fromkeys(token for token in found if token is not None))
