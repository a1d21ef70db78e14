"""What llama.cpp's files of one architecture have of their own, and what config.json says of it.

Where a file says nothing, what counts is in llama.cpp's source: `src/llama-model.cpp` for what a
model computes, `convert_hf_to_gguf.py` for how its tensors are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from engine.errors import CheckpointError, UnknownArchitecture

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_FULL, _SLIDING = "full_attention", "sliding_attention"


def _unchanged(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    """The common keys say everything."""


@dataclass(frozen=True, kw_only=True)
class GGUFFamily:
    """One `general.architecture`.

    architecture, model_type: as in config.json.
    reads: keys below the architecture's prefix that `complete` reads, and the key of config.json
        that says the same; `complete` adds to a config.json dict what they and the architecture
        itself say, from the file's metadata.
    layer_names: Hugging Face's names of a layer's tensors where they are others than Llama's.
    pairs_rows: rows of q and k lie as llama.cpp's rotation of neighbours wants them.
    norm_offset: what the converter adds to the weights of norms.
    """

    architecture: str
    model_type: str
    reads: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    complete: Callable[[Mapping[str, Any], dict[str, Any]], None] = _unchanged
    layer_names: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    pairs_rows: bool = False
    norm_offset: float = 0.0


def _complete_smollm3(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    # No key says so.
    config["no_rope_layer_interval"] = 4


def _complete_gemma3(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    num_layers = config["num_hidden_layers"]
    window = metadata.get("gemma3.attention.sliding_window") or None
    slides = [False] * num_layers if window is None else _gemma3_pattern(metadata, num_layers)
    config["sliding_window"] = window
    config["layer_types"] = [_SLIDING if slide else _FULL for slide in slides]
    local = {"rope_type": "default", "rope_theta": _base(metadata, "gemma3.rope.freq_base_swa")}
    config["rope_parameters"] = {_FULL: config["rope_parameters"], _SLIDING: local}
    # The largest model divides by its heads' share of the hidden size; its depth tells which it is.
    largest = num_layers == 62
    per_head = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = per_head if largest else config["head_dim"]


def _base(metadata: Mapping[str, Any], key: str) -> float:
    value = metadata.get(key, 10_000.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"{key} is {value!r}, not a positive finite number", field=key)
    return float(value)


def _gemma3_pattern(metadata: Mapping[str, Any], num_layers: int) -> list[bool]:
    key = "gemma3.attention.sliding_window_pattern"
    pattern = metadata.get(key, 6)
    if isinstance(pattern, list):
        if len(pattern) != num_layers or not all(isinstance(slide, bool) for slide in pattern):
            raise CheckpointError(f"{key} is not true or false for each layer", field=key)
        return pattern
    if isinstance(pattern, bool) or not isinstance(pattern, int) or pattern < 1:
        raise CheckpointError(f"{key} is {pattern!r}, not a positive integer", field=key)
    return [(index + 1) % pattern != 0 for index in range(num_layers)]


_POST_NORMS: Mapping[str, str] = MappingProxyType(
    {
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
)
FAMILIES: Mapping[str, GGUFFamily] = MappingProxyType(
    {
        "llama": GGUFFamily(architecture="LlamaForCausalLM", model_type="llama", pairs_rows=True),
        "qwen2": GGUFFamily(architecture="Qwen2ForCausalLM", model_type="qwen2"),
        "qwen3": GGUFFamily(architecture="Qwen3ForCausalLM", model_type="qwen3"),
        "olmo2": GGUFFamily(
            architecture="Olmo2ForCausalLM", model_type="olmo2", layer_names=_POST_NORMS
        ),
        "smollm3": GGUFFamily(
            architecture="SmolLM3ForCausalLM",
            model_type="smollm3",
            complete=_complete_smollm3,
            pairs_rows=True,
        ),
        "gemma3": GGUFFamily(
            architecture="Gemma3ForCausalLM",
            model_type="gemma3_text",
            reads=MappingProxyType(
                {
                    "attention.sliding_window": "sliding_window",
                    "attention.sliding_window_pattern": "layer_types",
                    "rope.freq_base_swa": "rope_local_base_freq",
                }
            ),
            complete=_complete_gemma3,
            layer_names=MappingProxyType({**_POST_NORMS, "ffn_norm": "pre_feedforward_layernorm"}),
            norm_offset=1.0,
        ),
    }
)


def find_family(name: Any) -> GGUFFamily:
    """The family of a file's `general.architecture`. Raises UnknownArchitecture."""
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise UnknownArchitecture(
            f"GGUF architecture {str(name)!r} is not served; known: {', '.join(FAMILIES)}",
            field="general.architecture",
        )
    return family
