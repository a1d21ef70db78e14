"""config.json dicts: what they mean, and what is wrong with the wrong ones."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import CheckpointError, UnknownArchitecture
from engine.models.config import read_config
from engine.models.config_keys import HANDLED

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
    config = read_config(with_(architectures=[arch], attention_bias=qkv, mlp_bias=mlp))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (qkv, o, mlp)
    assert config.qk_norm == qk_norm


@pytest.mark.parametrize(
    ("arch", "key"),
    [
        ("MistralForCausalLM", "attention_bias"),
        ("MistralForCausalLM", "mlp_bias"),
        ("Qwen2ForCausalLM", "mlp_bias"),
        ("Qwen3ForCausalLM", "mlp_bias"),
    ],
)
def test_a_bias_that_the_architecture_lacks_is_refused(arch: str, key: str) -> None:
    with pytest.raises(UnknownArchitecture, match=key) as caught:
        read_config(with_(architectures=[arch], **{key: True}))
    assert caught.value.field == key


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
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
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


def test_mistral_slides_by_default_and_looks_at_nothing_else() -> None:
    mistral = with_(architectures=["MistralForCausalLM"], max_position_embeddings=8192)
    for changes in (
        {},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"sliding_window": 4096, "layer_types": ["full_attention"] * 2},
    ):
        with pytest.raises(UnknownArchitecture, match="sliding_window 4096"):
            read_config({**mistral, **changes})
    assert read_config({**mistral, "sliding_window": None}).max_position == 8192
    assert read_config({**mistral, "max_position_embeddings": 4096}).max_position == 4096


# As transformers writes them, or as people add them: nothing of it is computed.
INERT: dict[str, Any] = {
    "_name_or_path": "x",
    "transformers_version": "4.57.1",
    "attention_dropout": 0.1,
    "initializer_range": 0.02,
    "pretraining_tp": 2,
    "use_cache": True,
    "chunk_size_feed_forward": 0,
    "id2label": {"0": "a"},
    "auto_map": {},
    "unsloth_version": "2025.1",
    "pad_token_id": -1,
    "hidden_activation": None,
    "num_experts": 0,
    "num_experts_per_tok": 2,
    "logit_scale": 1.0,
    "some_new_multiplier": 1.0,
    "some_new_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": 0.0,
}


def test_keys_that_change_nothing_are_passed_over() -> None:
    assert read_config(with_(**INERT)) == read_config(LLAMA)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.0625),
        ("logits_scaling", 8.0),
        ("residual_multiplier", 0.22),
        ("embedding_multiplier", 12),
        ("attention_multiplier", 0.015625),
        ("query_pre_attn_scalar", 256),
        ("clip_qkv", 8),
        ("num_local_experts", 8),
        ("n_routed_experts", 64),
        ("no_rope_layers", [1, 0]),
        ("attention_chunk_size", 8192),
        ("hidden_activation", "gelu_pytorch_tanh"),
        ("use_qk_norm", True),
        ("qkv_bias", True),
        ("kv_lora_rank", 512),
        ("is_encoder_decoder", True),
        ("scale_emb", 12),
        ("some_new_softcap", 5.0),
        ("local_rope_theta", 10000.0),
        ("some_new_bias", True),
        ("some_new_multiplier", 1.5),
        ("mlp_activation", "relu2"),
    ],
)
def test_a_key_that_would_have_to_be_computed_is_refused(key: str, value: object) -> None:
    with pytest.raises(UnknownArchitecture, match=key) as caught:
        read_config(with_(**{key: value}))
    assert caught.value.field == key


ODD: list[Any] = [True, -1, 0, 2.5, 1e400, float("nan"), 10**40, "x", [], [None], {}, {"a": 1}]


@pytest.mark.parametrize("arch", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("key", sorted(HANDLED))
def test_an_odd_value_is_read_or_named(key: str, arch: str) -> None:
    for odd in ODD:
        for base in (with_(architectures=[arch]), with_(architectures=[arch], **SWITCHES)):
            try:
                read_config({**base, key: odd}, {"eos_token_id": None})
            except (CheckpointError, UnknownArchitecture) as error:
                assert error.field and error.field in error.message, (odd, error)


SWITCHES: dict[str, Any] = {
    "sliding_window": 64,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("listed", [[2, None], [True], ["2"], "2", -1, 2.0])
def test_end_tokens_that_are_no_ids_are_named(listed: object) -> None:
    for source, generation in ((with_(eos_token_id=listed), {}), (LLAMA, {"eos_token_id": listed})):
        with pytest.raises(CheckpointError, match="eos_token_id") as caught:
            read_config(source, generation)
        assert caught.value.field == "eos_token_id"
