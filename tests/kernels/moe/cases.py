"""Routers of every family in small, as transformers configures them, and their rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from kernels.routing import RoutingRule

HIDDEN, INNER = 64, 32


@dataclass(frozen=True)
class Family:
    """A block of transformers, the fields of its configuration, and the rule that it follows."""

    block: type[torch.nn.Module]
    config: type[Any]
    fields: dict[str, Any]
    rule: RoutingRule

    def build(self, dtype: torch.dtype, seed: int = 0) -> torch.nn.Module:
        """The block with random weights of the scales that trained ones have."""
        config = self.config(hidden_size=HIDDEN, **self.fields)
        config._experts_implementation = "grouped_mm"
        block = self.block(config).to(dtype).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for tensor in block.parameters():
            drawn = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(drawn * (1.5 * tensor.shape[-1] ** -0.5))
        bias = getattr(block.gate, "e_score_correction_bias", None)
        if bias is not None:
            # A cast of the whole model would have rounded it.
            block.gate.e_score_correction_bias = torch.randn(bias.shape, generator=generator) * 0.2
        return block


_QWEN = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": INNER}
_DEEPSEEK = {
    "num_experts_per_tok": 3,
    "moe_intermediate_size": INNER,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.5,
}
_GROUPS = {"n_group": 4, "topk_group": 2}
_SIGMOID = RoutingRule(
    num_experts=24,
    top_k=3,
    score="sigmoid",
    normalised=True,
    wide_logits=True,
    scale=2.5,
    group_score="top2_sum",
    num_groups=4,
    top_groups=2,
)

FAMILIES: dict[str, Family] = {
    "qwen3": Family(
        Qwen3MoeSparseMoeBlock,
        transformers.Qwen3MoeConfig,
        {**_QWEN, "norm_topk_prob": True},
        RoutingRule(num_experts=8, top_k=3, normalised=True, rounded_weights=True),
    ),
    "qwen2": Family(
        Qwen2MoeSparseMoeBlock,
        transformers.Qwen2MoeConfig,
        {**_QWEN, "norm_topk_prob": False, "shared_expert_intermediate_size": 48},
        RoutingRule(num_experts=8, top_k=3, rounded_weights=True),
    ),
    "olmoe": Family(
        OlmoeSparseMoeBlock,
        transformers.OlmoeConfig,
        {"num_experts": 7, "num_experts_per_tok": 2, "intermediate_size": INNER},
        RoutingRule(num_experts=7, top_k=2, rounded_weights=True),
    ),
    "mixtral": Family(
        MixtralSparseMoeBlock,
        transformers.MixtralConfig,
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": INNER},
        RoutingRule(num_experts=8, top_k=2, normalised=True),
    ),
    "deepseek v2 lite": Family(
        DeepseekV2Moe,
        transformers.DeepseekV2Config,
        {**_DEEPSEEK, "n_routed_experts": 12, "topk_method": "greedy"},
        RoutingRule(num_experts=12, top_k=3, wide_logits=True, scale=2.5),
    ),
    "deepseek v2": Family(
        DeepseekV2Moe,
        transformers.DeepseekV2Config,
        {**_DEEPSEEK, **_GROUPS, "n_routed_experts": 12, "topk_method": "group_limited_greedy"},
        RoutingRule(
            num_experts=12,
            top_k=3,
            wide_logits=True,
            scale=2.5,
            group_score="max",
            num_groups=4,
            top_groups=2,
        ),
    ),
    "deepseek v3": Family(
        DeepseekV3MoE,
        transformers.DeepseekV3Config,
        {**_DEEPSEEK, **_GROUPS, "n_routed_experts": 24, "norm_topk_prob": True},
        _SIGMOID,
    ),
    "glm4": Family(
        Glm4MoeMoE,
        transformers.Glm4MoeConfig,
        {**_DEEPSEEK, **_GROUPS, "n_routed_experts": 24, "norm_topk_prob": True},
        _SIGMOID,
    ),
}


def bias_of(block: torch.nn.Module) -> torch.Tensor | None:
    """What chooses beside the scores."""
    bias = getattr(block.gate, "e_score_correction_bias", None)
    assert bias is None or isinstance(bias, torch.Tensor)
    return bias


def tokens(rows: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Hidden states after a norm."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, HIDDEN, generator=generator).to(dtype)


def added_by(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The output of the block's shared expert."""
    if hasattr(block, "shared_experts"):
        added = block.shared_experts(x)
    elif hasattr(block, "shared_expert"):
        added = torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    else:
        return None
    assert isinstance(added, torch.Tensor)
    return added
