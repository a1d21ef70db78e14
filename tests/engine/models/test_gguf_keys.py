"""Keys of GGUF files: computed, without effect, or refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engine.errors import CheckpointError, ModelError, UnknownArchitecture
from engine.models.gguf_families import FAMILIES
from engine.models.gguf_keys import HARMLESS, NEUTRAL, READ
from engine.models.locate import locate
from tests.helpers.gguf_writer import add_key
from tests.helpers.layer_windows import layer_windows
from tests.helpers.tiny_models import SIZES, write_tiny_gguf

HEAD_DIM = SIZES["hidden_size"] // SIZES["num_attention_heads"]


def write(path: Path, changes: dict[str, Any], arch: str = "llama") -> Path:
    """A file without weights but for the embedding; `changes` set keys, None leaves one out."""
    keys: dict[str, Any] = {
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": SIZES["hidden_size"],
        f"{arch}.block_count": 2,
        f"{arch}.feed_forward_length": 96,
        f"{arch}.attention.head_count": SIZES["num_attention_heads"],
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        **changes,
    }
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in keys.items():
        if value is not None:
            add_key(writer, key, value)
    writer.add_tensor("token_embd.weight", np.zeros((100, SIZES["hidden_size"]), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"llama.vocab_size": 7},
        {"llama.rope.dimension_count": HEAD_DIM},
        {"llama.attention.key_length": HEAD_DIM, "llama.attention.value_length": HEAD_DIM},
        {"llama.attention.scale": HEAD_DIM**-0.5},
        {"llama.attention.sliding_window": 128},
        {"llama.attention.sliding_window": 0},
        {"llama.attention.causal": True},
        {"llama.logit_scale": 1.0, "llama.residual_scale": 1.0, "llama.embedding_scale": 0.0},
        {"llama.attn_logit_softcapping": 0.0},
        {"llama.expert_count": 0, "llama.expert_used_count": 0},
        {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [96, 96]},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 8.0},
        {"llama.rope.scaling.finetuned": True},
        {"llama.some.new.key": 0, "llama.another": False, "llama.list": [0, 0], "llama.text": ""},
        {"qwen2.attention.scale": 3.0, "vendor.note": "x", "general.name": "x"},
        {"general.type": "model", "split.count": 0},
    ],
)
def test_keys_that_change_nothing_are_passed_over(changes: dict[str, Any], tmp_path: Path) -> None:
    plain = locate(write(tmp_path / "plain.gguf", {}), "random").config
    config = locate(write(tmp_path / "x.gguf", changes), "random").config
    kv = 2 if "llama.attention.head_count_kv" in changes else plain.num_kv_heads
    assert (config.num_kv_heads, config.rope) == (kv, plain.rope)
    assert config.max_position == plain.max_position == 128


REFUSED: list[tuple[str, Any]] = [
    ("attention.scale", 0.5),
    ("attention.clamp_kqv", 8.0),
    ("attention.max_alibi_bias", 8.0),
    ("attention.causal", False),
    ("attention.sliding_window", 64),
    ("attention.sliding_window", [64, 0]),
    ("attention.value_length", 2 * HEAD_DIM),
    ("attention.temperature_scale", 0.1),
    ("attention.kv_lora_rank", 512),
    ("attn_logit_softcapping", 50.0),
    ("final_logit_softcapping", 30.0),
    ("logit_scale", 0.25),
    ("residual_scale", 0.22),
    ("embedding_scale", 12.0),
    ("expert_count", 8),
    ("expert_weights_scale", 2.5),
    ("use_parallel_residual", True),
    ("pooling_type", 1),
    ("rope.dimension_count", HEAD_DIM // 2),
    ("rope.dimension_sections", [4, 4, 4, 4]),
    ("rope.scaling.type", "longrope"),
    ("rope.scaling.attn_factor", 1.2),
    ("rope.scaling.alpha", 1000.0),
    ("rope.scaling.yarn_log_multiplier", 0.1),
    ("rope.scaling.yarn_ext_factor", 0.5),
    ("attention.head_count_kv", [2, 4]),
    ("feed_forward_length", [96, 128]),
    ("some.new.key", 1),
    ("some.new.flag", True),
    ("some.new.text", "gelu"),
    ("some.new.list", [0, 1]),
    ("some.new.names", ["a"]),
]


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_a_key_that_would_have_to_be_computed_is_refused(
    key: str, value: Any, arch: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.gguf", {f"{arch}.{key}": value}, arch)
    with pytest.raises(UnknownArchitecture, match=key) as caught:
        locate(path, "random")
    assert caught.value.field == f"{arch}.{key}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("context_length", 0),
        ("context_length", "128"),
        ("embedding_length", 63),
        ("block_count", 0),
        ("attention.head_count", 0),
        ("attention.head_count_kv", 3),
        ("attention.layer_norm_rms_epsilon", 0.0),
        ("attention.layer_norm_rms_epsilon", math.nan),
        ("feed_forward_length", 1.5),
        ("rope.freq_base", 0.0),
        ("rope.freq_base", "x"),
        ("rope.scaling.factor", -2.0),
        ("rope.scaling.factor", math.inf),
        ("rope.scaling.factor", "4"),
        *((key, None) for key in ("context_length", "block_count", "attention.head_count")),
    ],
)
def test_a_value_that_cannot_be_computed_with_is_named(
    key: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        locate(write(tmp_path / "x.gguf", {f"llama.{key}": value}), "random")
    heads = "llama.attention.head_count"
    assert caught.value.field in {f"llama.{key}", heads if key == "embedding_length" else ""}
    assert caught.value.field in caught.value.message


@pytest.mark.parametrize("scaling", ["linear", "yarn"])
@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan])
def test_a_scaling_by_no_factor_is_named(scaling: str, factor: float, tmp_path: Path) -> None:
    rope = {"llama.rope.scaling.type": scaling, "llama.rope.scaling.factor": factor}
    with pytest.raises(CheckpointError) as caught:
        locate(write(tmp_path / "x.gguf", rope), "random")
    assert caught.value.field == "llama.rope.scaling.factor"


def test_scaling_that_is_computed(tmp_path: Path) -> None:
    factor = {"llama.rope.scaling.factor": 4.0}
    linear = locate(write(tmp_path / "a.gguf", factor), "random").config
    assert (linear.rope.rope_type, linear.rope.factor) == ("linear", 4.0)
    older = locate(write(tmp_path / "b.gguf", {"llama.rope.scale_linear": 4.0}), "random").config
    assert older.rope == linear.rope
    yarn = {
        **factor,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.original_context_length": 128,
        "llama.rope.scaling.yarn_beta_fast": 16.0,
        "llama.rope.scaling.yarn_ext_factor": 1.0,
    }
    config = locate(write(tmp_path / "c.gguf", yarn), "random").config
    assert (config.rope.rope_type, config.rope.beta_fast) == ("yarn", 16.0)
    assert config.max_position == 512


def test_a_file_that_is_no_whole_model_is_named(tmp_path: Path) -> None:
    for key, value in {"general.type": "adapter", "split.count": 3}.items():
        with pytest.raises(CheckpointError) as caught:
            locate(write(tmp_path / "x.gguf", {key: value}), "random")
        assert caught.value.field == key
    with pytest.raises(CheckpointError, match=r"general\.alignment"):
        locate(write(tmp_path / "x.gguf", {"general.alignment": 24}), "random")


def test_head_dim_of_qwen3_is_the_files_own(tmp_path: Path) -> None:
    assert locate(write(tmp_path / "x.gguf", {}, "qwen3"), "random").config.head_dim == HEAD_DIM


def test_gemma3_says_what_llama_cpp_takes_for_granted(tmp_path: Path) -> None:
    plain = {"gemma3.block_count": 7, "gemma3.rope.freq_base": 1e6}
    windowed = {**plain, "gemma3.attention.sliding_window": 64}
    config = locate(write(tmp_path / "a.gguf", windowed, "gemma3"), "random").config
    assert layer_windows(config) == (64,) * 5 + (None, 64)
    full, sliding = config.layers[5].attention.rope, config.layers[0].attention.rope
    assert full is not None and sliding is not None
    assert (full.theta, sliding.theta) == (1e6, 1e4)
    assert config.attention_scale == HEAD_DIM**-0.5
    assert config.tie_word_embeddings
    # Without a window all layers are of the one kind.
    config = locate(write(tmp_path / "b.gguf", plain, "gemma3"), "random").config
    assert layer_windows(config) is None
    assert {layer.attention.rope for layer in config.layers} == {config.rope}
    said = {
        **windowed,
        "gemma3.rope.freq_base_swa": 3e4,
        "gemma3.attention.sliding_window_pattern": 2,
    }
    config = locate(write(tmp_path / "c.gguf", said, "gemma3"), "random").config
    assert layer_windows(config) == (64, None) * 3 + (64,)
    local = config.layers[0].attention.rope
    assert local is not None and local.theta == pytest.approx(3e4)
    listed = {**windowed, "gemma3.attention.sliding_window_pattern": [True] + [False] * 6}
    config = locate(write(tmp_path / "d.gguf", listed, "gemma3"), "random").config
    assert layer_windows(config) == (64,) + (None,) * 6
    # Only the largest has another scale, and only its depth says so.
    largest = {
        **windowed,
        "gemma3.block_count": 62,
        "gemma3.attention.key_length": 2 * HEAD_DIM,
        "gemma3.attention.value_length": 2 * HEAD_DIM,
    }
    config = locate(write(tmp_path / "e.gguf", largest, "gemma3"), "random").config
    assert (config.head_dim, config.attention_scale) == (2 * HEAD_DIM, HEAD_DIM**-0.5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.key_length_swa", 2 * HEAD_DIM),
        ("rope.dimension_count_swa", HEAD_DIM // 2),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
    ],
)
def test_what_gemma3_might_have_and_is_not_served_is_named(
    key: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(UnknownArchitecture, match=key) as caught:
        locate(write(tmp_path / "x.gguf", {f"gemma3.{key}": value}, "gemma3"), "random")
    assert caught.value.field == f"gemma3.{key}"


def test_smollm3_does_not_rotate_every_fourth_layer(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"smollm3.block_count": 5}, "smollm3")
    layers = locate(path, "random").config.layers
    assert [layer.attention.rope is None for layer in layers] == [False] * 3 + [True, False]


def test_no_key_has_two_fates() -> None:
    assert not READ.keys() & HARMLESS
    assert not READ.keys() & NEUTRAL.keys()
    assert not HARMLESS & NEUTRAL.keys()


@pytest.mark.parametrize("odd", [True, -1, 0, 2.5, math.inf, "x", [1, 2], [0.5], ["a"]])
@pytest.mark.parametrize("key", sorted({*READ, *HARMLESS, *NEUTRAL, *FAMILIES["gemma3"].reads}))
def test_an_odd_value_is_read_or_named(key: str, odd: Any, tmp_path: Path) -> None:
    for arch in ("llama", "gemma3"):
        try:
            locate(write(tmp_path / "x.gguf", {f"{arch}.{key}": odd}, arch), "random")
        except ModelError as error:
            assert error.field and error.field in error.message


def test_what_the_converter_writes_is_served(tmp_path: Path) -> None:
    for arch in FAMILIES:
        model = write_tiny_gguf(tmp_path / f"{arch}.gguf", arch)
        config = locate(tmp_path / f"{arch}.gguf").config
        assert config.num_layers == model.config.num_hidden_layers
