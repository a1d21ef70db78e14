"""config.json dicts: what they mean, and what is wrong with the wrong ones."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import CheckpointError, UnknownArchitecture
from engine.models.config import read_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}


def with_(**changes: Any) -> dict[str, Any]:
    return {**LLAMA, **changes}


def test_defaults_of_a_minimal_llama() -> None:
    config = read_config(LLAMA)
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert not config.tie_word_embeddings
    assert config.eos_token_ids == ()
    assert config.bos_token_id is None
    assert config.torch_dtype is None


@pytest.mark.parametrize("key", list(LLAMA))
def test_a_missing_key_is_named(key: str) -> None:
    source = {name: value for name, value in LLAMA.items() if name != key}
    with pytest.raises(CheckpointError, match=key) as caught:
        read_config(source)
    assert caught.value.field == key


@pytest.mark.parametrize("value", [0, -1, 2.5, "64", True])
def test_a_size_that_is_no_positive_integer_is_named(value: object) -> None:
    with pytest.raises(CheckpointError, match="hidden_size"):
        read_config(with_(hidden_size=value))


def test_an_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(UnknownArchitecture, match=r"'GPT2LMHeadModel'.*LlamaForCausalLM.*Qwen3"):
        read_config(with_(architectures=["GPT2LMHeadModel"]))


@pytest.mark.parametrize(
    ("arch", "qkv", "o", "mlp", "qk_norm"),
    [
        ("LlamaForCausalLM", True, True, True, False),
        ("MistralForCausalLM", False, False, False, False),
        ("Qwen2ForCausalLM", True, False, False, False),
        ("Qwen3ForCausalLM", True, True, False, True),
    ],
)
def test_options_by_architecture(arch: str, qkv: bool, o: bool, mlp: bool, qk_norm: bool) -> None:
    config = read_config(with_(architectures=[arch], attention_bias=True, mlp_bias=True))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (qkv, o, mlp)
    assert config.qk_norm == qk_norm


def test_qwen3_has_a_head_dim_of_its_own() -> None:
    assert read_config(with_(architectures=["Qwen3ForCausalLM"])).head_dim == 128
    assert read_config(with_(architectures=["Qwen3ForCausalLM"], head_dim=32)).head_dim == 32


def test_generation_config_wins_the_end_tokens() -> None:
    source = with_(eos_token_id=2, bos_token_id=1)
    assert read_config(source).eos_token_ids == (2,)
    config = read_config(source, {"eos_token_id": [5, 6]})
    assert (config.eos_token_ids, config.bos_token_id) == ((5, 6), 1)
    assert read_config(source, {"eos_token_id": None}).eos_token_ids == (2,)


def test_both_names_of_the_dtype() -> None:
    assert read_config(with_(dtype="bfloat16")).torch_dtype == "bfloat16"
    assert read_config(with_(torch_dtype="float16")).torch_dtype == "float16"


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["MistralForCausalLM"], "sliding_window": 64},
        {
            "architectures": ["Qwen2ForCausalLM"],
            "sliding_window": 64,
            "use_sliding_window": True,
            "max_window_layers": 1,
        },
        {
            "architectures": ["Qwen3ForCausalLM"],
            "sliding_window": 64,
            "use_sliding_window": True,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ],
)
def test_a_sliding_window_that_applies_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnknownArchitecture, match="sliding_window 64"):
        read_config(with_(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["MistralForCausalLM"], "sliding_window": None},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 128},
        {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "max_window_layers": 1},
        {
            "architectures": ["Qwen2ForCausalLM"],
            "sliding_window": 64,
            "use_sliding_window": True,
            "max_window_layers": 2,
        },
        {
            "architectures": ["Qwen2ForCausalLM"],
            "sliding_window": 64,
            "use_sliding_window": False,
        },
    ],
)
def test_a_sliding_window_that_does_not_apply_is_served(changes: dict[str, Any]) -> None:
    assert read_config(with_(**changes)).architecture == changes["architectures"][0]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type"),
    ],
)
def test_what_is_not_served_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UnknownArchitecture, match=field) as caught:
        read_config(with_(**changes))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 5}, "head_dim"),
        ({"architectures": []}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError, match=field) as caught:
        read_config(with_(**changes))
    assert caught.value.field == field
