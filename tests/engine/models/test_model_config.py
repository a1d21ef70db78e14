"""config.json dicts: what they mean, and what is wrong with the wrong ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import transformers

from engine.errors import CheckpointError, UnknownArchitecture
from engine.models.config import read_config
from engine.models.config_keys import HANDLED
from engine.models.registry import ARCHITECTURES, find
from tests.helpers.layer_windows import layer_windows

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
    return {**LLAMA, "num_key_value_heads": 2, **changes}


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
    for layer in config.layers:
        assert (layer.attention.qkv_bias, layer.attention.o_bias, layer.mlp.bias) == (qkv, o, mlp)
        assert layer.attention.qk_norm == ("head" if qk_norm else "none")


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
    ("changes", "windows"),
    [
        ({"architectures": ["MistralForCausalLM"]}, (64, 64)),
        ({"architectures": ["Qwen2ForCausalLM"], "max_window_layers": 1}, (None, 64)),
        ({"architectures": ["Qwen2ForCausalLM"], "max_window_layers": 0}, (64, 64)),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "layer_types": ["sliding_attention", "full_attention"],
                "max_window_layers": 2,
            },
            (64, None),
        ),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0]}, (None, 64)),
        (
            {
                "architectures": ["SmolLM3ForCausalLM"],
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (64, None),
        ),
        (
            {"architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": 2, "head_dim": 16},
            (64, None),
        ),
    ],
)
def test_a_sliding_window_is_that_of_its_layers(
    changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    source = with_(use_sliding_window=True, sliding_window=64, hidden_act="silu", **changes)
    config = read_config(source)
    assert layer_windows(config) == windows
    # No context is longer than this.
    assert layer_windows(read_config({**source, "sliding_window": 128})) is None


@pytest.mark.parametrize("arch", ["LlamaForCausalLM", "Olmo2ForCausalLM"])
def test_a_window_is_refused_where_no_layer_may_have_one(arch: str) -> None:
    with pytest.raises(UnknownArchitecture, match="sliding_window 64") as caught:
        read_config(with_(architectures=[arch], sliding_window=64, use_sliding_window=True))
    assert caught.value.field == "sliding_window"


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["MistralForCausalLM"], "sliding_window": None},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 128},
        {"architectures": ["LlamaForCausalLM"], "sliding_window": 64},
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
        {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "use_sliding_window": True},
        {"architectures": ["SmolLM3ForCausalLM"], "sliding_window": 64},
    ],
)
def test_a_sliding_window_that_does_not_apply_is_none(changes: dict[str, Any]) -> None:
    assert layer_windows(read_config(with_(**changes))) is None


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
        assert layer_windows(read_config({**mistral, **changes})) == (4096, 4096)
    assert layer_windows(read_config({**mistral, "sliding_window": None})) is None
    assert layer_windows(read_config({**mistral, "max_position_embeddings": 4096})) is None


def test_smollm3_does_not_rotate_every_fourth_layer() -> None:
    smollm3 = with_(architectures=["SmolLM3ForCausalLM"], num_hidden_layers=6)
    for changes, rotates in (
        ({}, [1, 1, 1, 0, 1, 1]),
        ({"no_rope_layer_interval": 3}, [1, 1, 0, 1, 1, 0]),
        ({"no_rope_layers": [0, 1, 1, 1, 1, 0, 1]}, [0, 1, 1, 1, 1, 0]),
    ):
        config = read_config({**smollm3, **changes})
        assert [int(layer.attention.rope is not None) for layer in config.layers] == rotates
    assert read_config(smollm3).tie_word_embeddings
    assert read_config(smollm3).rope.theta == 2_000_000.0


GEMMA: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 7,
    "intermediate_size": 96,
    "max_position_embeddings": 8192,
}


def test_gemma3_takes_the_defaults_of_its_class() -> None:
    config = read_config({**GEMMA, "sliding_window": 512, "rope_scaling": None})
    full, sliding = config.layers[5].attention, config.layers[6].attention
    assert [layer.attention.window for layer in config.layers] == [512] * 5 + [None, 512]
    assert full.rope is not None and sliding.rope is not None
    assert (full.rope.theta, sliding.rope.theta) == (1e6, 1e4)
    assert (config.attention_scale, config.embedding_scale) == (256**-0.5, 8.0)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.tie_word_embeddings
    assert config.vocab_size == 262208


def test_gemma3_scales_positions_of_full_layers_only() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    older = {"rope_theta": 5e5, "rope_local_base_freq": 3e4, "rope_scaling": linear}
    newer = {
        "rope_parameters": {
            "full_attention": {**linear, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
        }
    }
    for settings in (older, newer):
        config = read_config({**GEMMA, **settings})
        full, sliding = config.layers[5].attention.rope, config.layers[0].attention.rope
        assert full is not None and sliding is not None
        assert (full.rope_type, full.factor, full.theta) == ("linear", 8.0, 5e5)
        assert (sliding.rope_type, sliding.factor, sliding.theta) == ("default", 1.0, 3e4)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
        ({"layer_types": ["chunked_attention"] * 7}, "layer_types"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "yarn", "factor": 2.0},
                    "sliding_attention": {"rope_type": "dynamic", "factor": 2.0},
                }
            },
            "rope_parameters",
        ),
    ],
)
def test_what_gemma3_might_compute_and_is_not_served_is_named(
    changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(UnknownArchitecture, match=field) as caught:
        read_config({**GEMMA, **changes})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("arch", "changes", "field"),
    [
        ("Gemma3ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types"),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("Gemma3ForCausalLM", {"sliding_window": None}, "sliding_window"),
        (
            "Qwen2ForCausalLM",
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": 64},
            "layer_types",
        ),
        (
            "Qwen3ForCausalLM",
            {
                "layer_types": ["sliding_attention"] * 2,
                "sliding_window": None,
                "use_sliding_window": True,
            },
            "sliding_window",
        ),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, "no_rope_layers"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 2]}, "no_rope_layers"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": []}, "no_rope_layers"),
        ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        (
            "SmolLM3ForCausalLM",
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": 64},
            "layer_types",
        ),
    ],
)
def test_what_layers_cannot_be_built_from_is_named(
    arch: str, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(CheckpointError, match=field) as caught:
        read_config(with_(architectures=[arch], **changes))
    assert caught.value.field == field


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
    assert read_config(with_(**INERT)) == read_config(with_())


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
        ("per_layer_config", {"1": {"sliding_window": 8}}),
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


def config_class(arch: str) -> Any:
    """That of transformers."""
    name = "Gemma3TextConfig" if arch.startswith("Gemma3") else arch.removesuffix("ForCausalLM")
    return getattr(transformers, name if name.endswith("Config") else f"{name}Config")


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_a_key_that_is_left_out_has_the_value_that_transformers_takes(arch: str) -> None:
    """Or it is asked for by its name. Tokens are generation_config.json's affair."""
    base = with_(
        architectures=[arch],
        hidden_size=1024,
        num_attention_heads=64,
        num_key_value_heads=2,
        num_hidden_layers=30,
        head_dim=32,
        max_position_embeddings=8192,
        rope_theta=5e5,
        tie_word_embeddings=False,
        **{**SWITCHES, "rope_scaling": None},
    )
    if arch in ("LlamaForCausalLM", "Olmo2ForCausalLM", "Glm4MoeForCausalLM"):
        base["use_sliding_window"] = False
    asked_for = []
    for field in dataclasses.fields(config_class(arch)):
        key, default = field.name, field.default
        if key.endswith("_token_id") or key not in HANDLED | find(arch).OPTIONS.reads:
            continue
        left_out = {name: value for name, value in base.items() if name != key}
        try:
            config = read_config(left_out)
        except CheckpointError as error:
            assert error.field == key
            asked_for.append(key)
        else:
            assert config == read_config({**left_out, key: default}), key
    assert "num_key_value_heads" not in asked_for


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_null_is_no_way_to_leave_a_key_out(arch: str) -> None:
    for key in find(arch).OPTIONS.defaults.keys() - {"num_key_value_heads", "sliding_window"}:
        with pytest.raises(CheckpointError, match=key) as caught:
            read_config(with_(architectures=[arch], **{key: None}))
        assert caught.value.field == key


READ_BY_PAGES = frozenset().union(*(find(arch).OPTIONS.reads for arch in ARCHITECTURES))
ODD: list[Any] = [True, -1, 0, 2.5, 1e400, float("nan"), 10**40, "x", [], [None], {}, {"a": 1}]


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
@pytest.mark.parametrize("key", sorted(HANDLED | READ_BY_PAGES))
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


REWARD = {"architectures": ["LlamaForSequenceClassification"]}


@pytest.mark.parametrize(
    "keys, count",
    [
        ({}, 2),
        ({"num_labels": 1}, 1),
        ({"id2label": {"0": "a"}}, 1),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}, "num_labels": 3}, 3),
    ],
)
def test_labels_of_a_classifier_are_those_of_transformers(keys: dict[str, Any], count: int) -> None:
    assert read_config(with_(**REWARD, **keys)).num_labels == count
    assert transformers.LlamaConfig(**keys).num_labels == count
    assert read_config(with_(**keys)).num_labels == 0


@pytest.mark.parametrize(
    "key, keys",
    [
        ("num_labels", {"num_labels": 0}),
        ("num_labels", {"num_labels": True}),
        ("num_labels", {"num_labels": 3, "id2label": {"0": "a"}}),
        ("id2label", {"id2label": {}}),
        ("id2label", {"id2label": ["a"]}),
    ],
)
def test_labels_that_say_nothing_are_named(key: str, keys: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=key) as caught:
        read_config(with_(**REWARD, **keys))
    assert caught.value.field == key
