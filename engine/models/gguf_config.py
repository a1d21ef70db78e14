"""The metadata of a GGUF file as a config.json dict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from engine.errors import CheckpointError, UnknownArchitecture
from engine.models.gguf_file import GGUFFile

_ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
)
_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "intermediate_size": "feed_forward_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "max_position_embeddings": "context_length",
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
    if architecture not in _ARCHITECTURES:
        raise UnknownArchitecture(
            f"GGUF architecture {architecture!r} is not served; known: {', '.join(_ARCHITECTURES)}",
            field="general.architecture",
        )
    config = _sizes(metadata, architecture)
    config["architectures"] = [_ARCHITECTURES[architecture]]
    # llama.cpp and transformers call the kinds that are served alike.
    config["model_type"] = architecture
    config["vocab_size"] = _embedding_rows(file)
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    config["rope_parameters"] = _rope(file, architecture)
    config["eos_token_id"] = _eos_ids(metadata)
    config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    return config


def _sizes(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    sizes = {}
    for name, key in _KEYS.items():
        full_key = f"{architecture}.{key}"
        if full_key in metadata:
            sizes[name] = metadata[full_key]
        elif name not in _OPTIONAL:
            raise CheckpointError(f"the GGUF file has no {full_key!r}", field=full_key)
    if isinstance(sizes.get("num_key_value_heads"), list):
        raise UnknownArchitecture(
            "layers with different numbers of KV heads are not served",
            field=f"{architecture}.attention.head_count_kv",
        )
    return sizes


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
    rope: dict[str, Any] = {"rope_theta": own.get("freq_base", 10000.0), "rope_type": "default"}
    if "rope_freqs.weight" in file.tensors:
        rope["frequency_divisors"] = file.dequantize("rope_freqs.weight").tolist()
    scaling = own.get("scaling.type", "linear" if "scale_linear" in own else "none")
    if scaling == "none":
        return rope
    rope["rope_type"] = scaling
    rope["factor"] = own.get("scaling.factor", own.get("scale_linear"))
    if "scaling.original_context_length" in own:
        rope["original_max_position_embeddings"] = own["scaling.original_context_length"]
    if "scaling.attn_factor" in own:
        # llama.cpp multiplies YaRN's own factor by it; config.json replaces that factor.
        own_factor = 0.1 * math.log(max(rope["factor"], 1.0)) + 1.0
        rope["attention_factor"] = own["scaling.attn_factor"] * own_factor
    rope["beta_fast"] = own.get("scaling.yarn_beta_fast")
    rope["beta_slow"] = own.get("scaling.yarn_beta_slow")
    return rope


def _eos_ids(metadata: Mapping[str, Any]) -> list[int]:
    found = [metadata.get(f"tokenizer.ggml.{key}") for key in _EOS_KEYS]
    return list(dict.fromkeys(token for token in found if token is not None))
