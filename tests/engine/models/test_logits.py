"""Logits of every architecture and option against transformers, float32."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.models.locate import locate
from tests.helpers.dense_context import dense_logits
from tests.helpers.load_tiny import load_path
from tests.helpers.tiny_models import write_fused, write_tiny

TOLERANCE = 1e-4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

GEMMA_TYPES = ["full_attention", "sliding_attention"] * 4
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 24}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1}),
    ("llama", {"rope_parameters": LINEAR}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": YARN}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    ("mistral", {"sliding_window": 16}),
    ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}),
    ("qwen3", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}),
    ("smollm3", {}),
    ("smollm3", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("smollm3", {"no_rope_layers": [0, 1, 1, 0]}),
    ("smollm3", {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 11}),
    ("gemma3", {}),
    ("gemma3", {"tie_word_embeddings": False, "query_pre_attn_scalar": 20, "sliding_window": 1}),
    ("gemma3", {"attention_bias": True, "num_key_value_heads": 1, "sliding_window": 200}),
    ("gemma3", {"num_hidden_layers": 8, "layer_types": GEMMA_TYPES, "rope_parameters": GEMMA_ROPE}),
    ("olmo2", {}),
    ("olmo2", {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 4}),
    ("olmo2", {"num_key_value_heads": 1, "rope_parameters": YARN}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": True, "tie_word_embeddings": True, "attention_bias": True}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [], "num_experts_per_tok": 8}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 9}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"qkv_bias": False, "norm_topk_prob": True, "rope_parameters": YARN}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    ("mixtral", {}),
    ("mixtral", {"sliding_window": 16, "num_local_experts": 5, "tie_word_embeddings": True}),
    ("glm4_moe", {}),
    ("glm4_moe", {"use_qk_norm": True, "attention_bias": True, "n_group": 1}),
    ("glm4_moe", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.25}}),
    ("glm4_moe", {"n_group": 4, "topk_group": 3, "norm_topk_prob": False}),
]
MIXTURES = ("qwen3_moe", "qwen2_moe", "mixtral", "glm4_moe")


def _largest_difference(reference: Any, path: Path) -> float:
    ids_T = torch.randint(0, 100, (63,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected_TV = reference(ids_T[None]).logits[0]
    got_TV = dense_logits(load_path(path), ids_T)
    assert got_TV.dtype == torch.float32
    return float((got_TV - expected_TV).abs().max())


@pytest.mark.parametrize(("arch", "overrides"), CASES)
def test_logits_equal_transformers(arch: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    reference = write_tiny(tmp_path, arch, **overrides)
    assert _largest_difference(reference, tmp_path) <= TOLERANCE


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_yarn_as_a_model_card_switches_it_on(arch: str, tmp_path: Path) -> None:
    write_tiny(tmp_path, arch, max_position_embeddings=32)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    card = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    path.write_text(json.dumps({**config, "rope_theta": theta, "rope_scaling": card}))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).float().eval()
    # 63 positions: beyond those of pretraining.
    assert locate(tmp_path).config.max_position == 128
    assert _largest_difference(reference, tmp_path) <= TOLERANCE
    without = {**config, "rope_theta": theta, "max_position_embeddings": 128}
    path.write_text(json.dumps(without))
    assert _largest_difference(reference, tmp_path) > 100 * TOLERANCE


@pytest.mark.parametrize("arch", MIXTURES)
def test_experts_in_one_tensor_equal_transformers(arch: str, tmp_path: Path) -> None:
    reference = write_tiny(tmp_path, arch)
    write_fused(tmp_path, reference)
    assert _largest_difference(reference, tmp_path) <= TOLERANCE


@pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral"])
def test_experts_in_files_of_either_form_equal_transformers(arch: str, tmp_path: Path) -> None:
    """Some tensors of a sharded folder fused, the others one by one."""
    reference = write_tiny(tmp_path, arch, max_shard_size=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    fused = {
        n: t for n, t in reference.state_dict().items() if n.endswith("2.mlp.experts.gate_up_proj")
    }
    (name,) = fused
    parts = re.compile(r"layers\.2\..*experts\.\d+\.(gate_proj|up_proj|w1|w3)\.weight")
    for file in sorted(set(index.values())):
        kept = {n: t for n, t in load_file(tmp_path / file).items() if not parts.search(n)}
        save_file(kept, tmp_path / file)
    save_file(fused, tmp_path / "fused.safetensors")
    index = {n: file for n, file in index.items() if not parts.search(n)} | {
        name: "fused.safetensors"
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert _largest_difference(reference, tmp_path) <= TOLERANCE


def test_sharded_checkpoint_equals_transformers(tmp_path: Path) -> None:
    reference = write_tiny(tmp_path, "llama", max_shard_size=60_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert _largest_difference(reference, tmp_path) <= TOLERANCE


def test_other_weights_give_other_logits(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a", "llama", seed=0)
    other = write_tiny(tmp_path / "b", "llama", seed=1)
    assert _largest_difference(other, tmp_path / "a") > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("llama", {}),
        ("olmo2", {}),
        ("smollm3", {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}),
        ("gemma3", {}),
        ("qwen3_moe", {}),
    ],
)
def test_bfloat16_is_close_to_transformers(
    arch: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    reference = write_tiny(tmp_path, arch, dtype=torch.bfloat16, **overrides)
    ids_T = torch.arange(63)
    with torch.inference_mode():
        expected_TV = reference(ids_T[None]).logits[0].float()
    got_TV = dense_logits(load_path(tmp_path, dtype=torch.bfloat16), ids_T)
    assert float((got_TV - expected_TV).abs().mean()) <= 0.02 * float(expected_TV.abs().mean())
