"""Tiny random mixtures of experts of transformers, a class a family."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from trainer_bridge.adapters.buffers import sent_buffers

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_GROUPS = {
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 1.5,
}
_OWN: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "qwen2_moe": {
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [0],
    },
    "mixtral": {"intermediate_size": 24, "sliding_window": None},
    "olmoe": {"intermediate_size": 24},
    "deepseek_v2": {**_LATENT, **_GROUPS, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_LATENT, **_GROUPS, "norm_topk_prob": True},
    "glm4_moe": {**_GROUPS, "head_dim": 16, "norm_topk_prob": True, "use_qk_norm": True},
}
_NUM_EXPERTS = {
    "mixtral": "num_local_experts",
    "deepseek_v2": "n_routed_experts",
    "deepseek_v3": "n_routed_experts",
    "glm4_moe": "n_routed_experts",
}
FAMILIES = tuple(_OWN)
WITH_BIAS = ("deepseek_v3", "glm4_moe")
"""Families whose routers have a correction bias."""


def tiny_experts(family: str, seed: int = 0, *, experts: int = 8, **overrides: Any) -> Any:
    """A tiny transformers model, float32, with every parameter and correction bias random.

    The first or second of its three layers is dense where the class has dense layers. Where
    `experts` are in no four groups, there is one group.
    """
    sizes = {**SIZES, **_OWN[family], _NUM_EXPERTS.get(family, "num_experts"): experts}
    if "n_group" in sizes and experts % sizes["n_group"]:
        sizes |= {"n_group": 1, "topk_group": 1}
    architecture = getattr(transformers, _class_name(family))
    config = architecture.config_class(**{**sizes, **overrides})
    model = architecture(config).float().eval()
    model.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name.rpartition(".")[0].rpartition(".")[2]
            parameter.copy_(1 + 0.2 * noise if is_norm else 0.15 * noise)
        for _, buffer in sent_buffers(model):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


def _class_name(family: str) -> str:
    names = {"qwen3_moe": "Qwen3Moe", "qwen2_moe": "Qwen2Moe", "glm4_moe": "Glm4Moe"}
    names |= {"deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3"}
    return f"{names.get(family, family.capitalize())}ForCausalLM"
